"""Where a micro-batch's forward and backward go, of any shape: seconds, MFU, and the longest kernels of a GPU.

    python bench/profile_training.py [--size qwen3-next/8] [--groups 2] [--kernels 20] [--save FILE]

Random weights, no engine: groups of 8 completions of 1,024 tokens to a prompt of 512, which is computed once, with the
layers as a run has them and gradients in bf16 `.grad`. The fastest of three; one more is profiled.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from engine_setup import report, save, saved_model
from model_shapes import CUDA, GIB, PEAK_FLOPS, SHAPES, device_name, named, random_samples, synchronize, timed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastgrpo.config import Grpo
from fastgrpo.policy.loading import load_policy
from fastgrpo.training.flops import training_flops
from fastgrpo.training.loss import policy_loss
from fastgrpo.training.packing import pack

PROMPT, COMPLETION, MEMBERS = (512, 1024, 8) if CUDA else (16, 16, 4)


def by_kernel(run: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds and launches of each of the GPU's kernels, copies among them, while `run` runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
    spent, launches = Counter[str](), Counter[str]()
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CUDA:
            spent[event.key] += event.self_device_time_total / 1e3
            launches[event.key] += event.count
    return spent, launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b" if CUDA else "tiny")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--kernels", type=int, default=20, help="how many are named")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    with saved_model(options.size) as folder:
        kind = {"device": "cuda", "dtype": torch.bfloat16} if CUDA else {}
        policy = load_policy(folder, **kind)  # type: ignore[arg-type]
    samples = random_samples(len(policy.head_weight), PROMPT, COMPLETION, options.groups, MEMBERS)
    (batch,) = pack(samples, [1e-6] * len(samples), 10**9, policy.device)
    tokens = len(batch.input_ids_T)
    title = f"Forward and backward of {tokens} tokens, {named(options.size)}"
    print(f"{title}; {device_name()}, torch {torch.__version__}")

    def run() -> None:
        policy_loss(policy, batch, Grpo(tis_cap=0.0)).loss.backward()
        synchronize()

    run()
    seconds = min(timed(run)[1] for _ in range(3))
    mfu = training_flops(policy.model, [batch]) / seconds / PEAK_FLOPS
    report("forward and backward, ms; MFU", f"{1e3 * seconds:.1f}; {mfu:.1%}")
    if CUDA:
        report("peak memory, weights and gradients included, GiB", f"{torch.cuda.max_memory_allocated() / GIB:.1f}")
        spent, launches = by_kernel(run)
        report("kernels, ms in all; launches", f"{spent.total():.1f}; {launches.total()}")
        for name, spent_ms in spent.most_common(options.kernels):
            print(f"    {spent_ms:7.2f} ms  {launches[name]:5d} x  {name[:110]}")
    if options.save:
        save(options.save, title)


if __name__ == "__main__":
    main()
