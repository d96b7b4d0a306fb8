"""Weak scaling: 64 prompts x 8 completions on each GPU, the sharded optimizer, and its all-gather beside one of NCCL.

    torchrun --nproc-per-node 2 bench/bench_ranks.py [--size 1.5b] [--save FILE]

Run it with `--nproc-per-node 1` on the same machine for the base of the scaling. The rows are the slowest rank's. The
all-gather of the updated weights into vLLM's memory is the weight sync; its floor is one NCCL all-gather of the bytes.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from engine_setup import (
    CUDA,
    GIB,
    PEAK_FLOPS,
    SHAPES,
    MemoryPeaks,
    Setup,
    Workload,
    flops,
    report,
    save,
    saved_model,
    timed,
)

from fastgrpo.config import Grpo
from fastgrpo.distributed import all_gather, gather_all, joined_ranks, over_ranks
from fastgrpo.learner import to_samples, update
from fastgrpo.optimizer import AdamW

BUDGET = 16384 if CUDA else 512
STEPS = 3


def step(setup: Setup, optimizer: AdamW, number: int, rank: int) -> dict[str, float]:
    """One GRPO step over all ranks: seconds of its phases on the slowest rank."""
    problems, environment = setup.work.problems(1000 * number + rank)
    groups, generate_s = timed(lambda: setup.collect(problems, environment, 1000 * number + rank))
    samples = to_samples(groups, Grpo())
    shares, gather_s = timed(lambda: gather_all(samples, "the rollouts of the other ranks"))
    everything = [sample for share in shares for sample in share]
    _, sleep_s = timed(setup.engine.sleep)
    _, train_s = timed(lambda: update(setup.policy, optimizer, everything, Grpo(), budget=BUDGET))
    _, wake_s = timed(setup.engine.wake)
    sync, sync_s = timed(lambda: setup.engine.sync(setup.policy))
    phases = {"generate": generate_s, "exchange": gather_s, "train": train_s, "rest": sleep_s + wake_s + sync_s}
    ours = phases | {
        "total": sum(phases.values()),
        "parity": sync.parity_mean,
        "flops": flops(setup.policy, everything, BUDGET),
    }
    return over_ranks(ours, dict.fromkeys(ours, max))


def described(numbers: dict[str, float], setup: Setup) -> str:
    """A step's phases; tokens/s of one GPU."""
    tokens = setup.work.generated
    return (
        f"{numbers['total']:.1f} = generate {numbers['generate']:.1f} ({tokens / numbers['generate']:,.0f} tokens/s) "
        f"+ exchange {numbers['exchange']:.2f} + train {numbers['train']:.1f} "
        f"(MFU {numbers['flops'] / numbers['train'] / PEAK_FLOPS:.1%}) + rest {numbers['rest']:.2f}; "
        f"{tokens / numbers['total']:,.0f} tokens/s a GPU in all; parity {numbers['parity']:.4f}"
    )


def collectives(optimizer: AdamW, world: int) -> tuple[float, float, int]:
    """Seconds of the optimizer's all-gather and of one NCCL all-gather of the same bytes; those bytes."""
    shards = optimizer._shards
    parts = [shard.owned for shard in shards]
    one = torch.cat([part.to(parts[0].dtype) for part in parts])
    whole = one.new_empty(world * len(one))
    for function in (lambda: optimizer._gather(shards), lambda: all_gather(whole, one)):
        timed(function)
    ours = median(timed(lambda: optimizer._gather(shards))[1] for _ in range(10))
    floor = median(timed(lambda: all_gather(whole, one))[1] for _ in range(10))
    return ours, floor, whole.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    with joined_ranks() as (rank, world):
        run(options, rank, world)


def run(options: argparse.Namespace, rank: int, world: int) -> None:
    """This rank's part."""
    with saved_model(options.size) if rank == 0 else nullcontext() as mine:
        folder = gather_all(mine, "the model's folder")[0]
        setup = Setup(folder, Workload(options.size))
        gather_all(None, "every rank's engine")
    if CUDA:
        setup.policy.compile_layers()
    optimizer, peaks = setup.optimizer(), MemoryPeaks()
    for number in range(STEPS):
        numbers = step(setup, optimizer, number, rank)
        if rank == 0:
            report(f"{world} ranks, step {number}{' (compiles)' if number == 0 else ''}, s", described(numbers, setup))
    if world > 1:
        ours, floor, size = collectives(optimizer, world)
        if rank == 0:
            report(
                "all-gather of the weights, ms: ours, one of NCCL, ratio",
                f"{1e3 * ours:.2f}, {1e3 * floor:.2f}, {ours / floor:.2f} for {size / GIB:.2f} GiB",
            )
    if rank == 0:
        report("peak memory by the driver, GiB", f"{max(peaks.peaks.values()):.1f}")
        if options.save:
            save(options.save, f"{world} ranks, Qwen2.5 {options.size} shape")
    setup.engine.close()


if __name__ == "__main__":
    main()
