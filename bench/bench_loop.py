"""The training loop itself, `fastgrpo.train.improve`, under any settings and on any number of ranks.

    python bench/bench_loop.py [--size 1.5b] [--steps 4] [--save FILE] [--grpo.max_lag 1] [--section.key VALUE ...]
    torchrun --nproc-per-node 2 bench/bench_loop.py ...

Random weights of the Qwen2.5 shape, 64 prompts x 8 completions on each replica, 512 and 1,024 tokens, a reward that
costs nothing. `--nproc-per-node 1` on the same machine is the base of the weak scaling. The first step compiles.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import cast

from engine_setup import CUDA, SHAPES, Endless, Trivial, Workload, report, save, saved_model

from fastgrpo.config import Config, checked, resolve
from fastgrpo.distributed import gather_all, joined_ranks
from fastgrpo.engine import Engine
from fastgrpo.errors import run_program
from fastgrpo.learner import open_learner
from fastgrpo.runtime import of_replica, open_log, run_async
from fastgrpo.train import improve


def settings(size: str, model: str, runs: str, steps: int, replicas: int) -> dict[str, object]:
    """Dotted values of the configuration for the workload of `replicas`."""
    work = Workload(size)
    return {
        "model.path": model,
        "model.compile": CUDA,
        "runs": runs,
        "engine.max_model_len": work.max_model_len,
        "engine.max_num_seqs": work.sequences,
        "engine.kv_cache_gb": 0.2,
        "engine.parity_threshold": 0.3,
        "grpo.steps": steps,
        "grpo.prompts_per_step": replicas * work.prompts,
        "grpo.group_size": work.group,
        "grpo.max_new_tokens": work.completion_tokens,
        # Two groups.
        "grpo.micro_batch_tokens": 2 * (work.prompt_tokens + work.group * work.completion_tokens),
        "checkpoint.every": steps + 1,
    }


async def loop(config: Config, size: str) -> None:
    """One run of the loop, which leaves its metrics in the run's folder."""
    work, draw = Workload(size), random.Random(0)
    texts = {f"p{number}": work.text(draw) for number in range(config.grpo.steps * config.grpo.prompts_per_step)}
    problems = [SimpleNamespace(id=name, prompt=text, difficulty=0.5) for name, text in texts.items()]
    with open_log(config, resume=False) as log:
        async with of_replica(nullcontext(Trivial(texts)), config) as environment:
            with open_learner(config, Path(config.model.path), resume=False) as learner:
                log.say(learner.plan.table())
                learner.engine = cast(Engine, Endless(learner.engine))
                await improve(learner, environment, problems, config, log)


def metrics(folder: Path) -> dict[str, list[float]]:
    """The run's metrics, each with its values from the second step on."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: [row.get(name, 0.0) for row in rows[1:]] for name in rows[-1] if name != "stage"}


def described(rows: dict[str, list[float]], config: Config, world: int) -> None:
    """Lines of the table: medians of the steps after the first."""
    middle = {name: median(values) for name, values in rows.items()}
    phases = {name: value for name, value in middle.items() if name.startswith("seconds/") and value >= 0.005}
    total = phases.pop("seconds/step")
    tokens = config.grpo.prompts_per_step * config.grpo.group_size * config.grpo.max_new_tokens
    report("seconds a step: all, median", f"{[round(s, 2) for s in rows['seconds/step']]}, {total:.2f}")
    report("  its phases", ", ".join(f"{name.removeprefix('seconds/')} {value:.2f}" for name, value in phases.items()))
    report("tokens/s a GPU in all", f"{tokens / total / world:,.0f}")
    report("tokens/s generated, of all replicas, while they generate", f"{middle['tokens_per_s']:,.0f}")
    report("MFU of forward and backward", f"{middle.get('mfu', float('nan')):.1%}")
    report("parity after the sync, nats; all sampled tokens", f"{middle['parity']:.4f}; {middle['sampler_parity']:.4f}")
    report("sync, ms", f"{1e3 * middle['sync_seconds']:.2f}")
    if CUDA:
        report("peak memory by the driver, GiB", f"{max(rows['gpu/memory_gib']):.1f}")
        report("power, W; utilisation", f"{middle['gpu/power_w']:.0f}; {middle['gpu/utilisation']:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save", type=Path)
    options, keys = parser.parse_known_args()
    given = dict(zip((key.removeprefix("--") for key in keys[::2]), keys[1::2], strict=True))
    overrides = checked(given, source="command line", strict=False)
    tensor_parallel = overrides.get("engine.tensor_parallel", 1)
    with joined_ranks(tensor_parallel) as (rank, world), ExitStack() as stack:
        runs = stack.enter_context(tempfile.TemporaryDirectory())
        mine = stack.enter_context(saved_model(options.size)) if rank == 0 else None
        folder = gather_all(mine, "the model's folder")[0]
        values = settings(options.size, folder, runs, options.steps, world // tensor_parallel)
        config = resolve(values | overrides)
        run_async(lambda: loop(config, options.size))
        if rank == 0:
            described(metrics(config.folder), config, world)
            if options.save:
                changed = "".join(f", {name} {value}" for name, value in given.items())
                save(options.save, f"{world} ranks, Qwen2.5 {options.size} shape{changed}")


if __name__ == "__main__":
    run_program(main)
