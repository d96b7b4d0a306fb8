"""The training loop itself, `fastgrpo.train.improve`, under any settings and on any number of ranks.

    python bench/bench_loop.py [--size 1.5b] [--steps 4] [--save FILE] [--grpo.max_lag 1] [--section.key VALUE ...]
    torchrun --nproc-per-node 2 bench/bench_loop.py ... [--folder FOLDER [--resume]]

Random weights of the shape `--size`, 64 prompts x 8 completions on each replica, 512 and 1,024 tokens, a reward that
costs nothing. `--nproc-per-node 1` on the same machine is the base of the weak scaling, which `bench_scaling.py` runs
whole. The first step compiles. `--folder` keeps model and run, and `--resume` continues the run there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import cast

from engine_setup import Endless, Workload, emit, report, save, save_model
from loop_setup import metrics, settings
from model_shapes import SHAPES, named

from fastgrpo.cli import parse
from fastgrpo.config import Config
from fastgrpo.engine.engine import Engine
from fastgrpo.program import run_async, run_program
from fastgrpo.ranks.collectives import gather_all, joined_ranks, of_replica
from fastgrpo.record.log import open_log
from fastgrpo.train import improve
from fastgrpo.training.learner import open_learner

PROGRAM = "bench_loop"


@contextmanager
def model_and_runs(size: str, folder: Path | None) -> Iterator[tuple[str, str]]:
    """The folders of the model, made where it is not there yet, and of the runs: in `folder`, or a temporary one."""
    with tempfile.TemporaryDirectory() as passing:
        parent = folder or Path(passing)
        model = parent / "model"
        if not model.exists():
            save_model(size, model)
        yield str(model), str(parent / "runs")


async def loop(config: Config, size: str, resume: bool) -> None:
    """One run of the loop, which leaves its metrics in the run's folder."""
    problems, trivial = Workload(size).problems(0, config.grpo.steps * config.grpo.prompts_per_step)
    with open_log(config, resume=resume) as log:
        async with of_replica(nullcontext(trivial), config.engine.tensor_parallel) as environment:
            with open_learner(config, Path(config.model.path), resume=resume) as learner:
                log.say(learner.plan.table())
                learner.engine = cast(Engine, Endless(learner.engine))
                await improve(learner, environment, problems, config, log)


def described(rows: list[dict[str, float]], config: Config, world: int) -> None:
    """Lines of the table: medians over the steps in `rows`."""
    middle = {name: median(row[name] for row in rows if name in row) for name in rows[-1]}
    phases = {name: value for name, value in middle.items() if name.startswith("seconds/") and value >= 0.005}
    total = phases.pop("seconds/step")
    tokens = config.grpo.prompts_per_step * config.grpo.group_size * config.grpo.max_new_tokens
    emit("loop", {"ranks": world, "a GPU": tokens / total / world, "step": max(row["step"] for row in rows)})
    report("seconds a step: all, median", f"{[round(row['seconds/step'], 2) for row in rows]}, {total:.2f}")
    report("  its phases", ", ".join(f"{name.removeprefix('seconds/')} {value:.2f}" for name, value in phases.items()))
    waited = [round(spent, 2) for row in rows if (spent := row.get("seconds/checkpoint", 0.0)) > 0.01]
    report("seconds waited for each checkpoint", ", ".join(map(str, waited)) or "none")
    report("tokens/s a GPU in all", f"{tokens / total / world:,.0f}")
    report("tokens/s generated, of all replicas, while they generate", f"{middle['tokens_per_s']:,.0f}")
    report("MFU of forward and backward", f"{middle.get('mfu', float('nan')):.1%}")
    report("parity after the sync, nats; all sampled tokens", f"{middle['parity']:.4f}; {middle['sampler_parity']:.4f}")
    if "rerouted" in middle:
        report("experts replayed that the trainer would have chosen otherwise", f"{middle['rerouted']:.2%}")
    report("sync, ms", f"{1e3 * middle['sync_seconds']:.2f}")
    if "gpu/memory_gib" in middle:
        report("peak memory by the driver after the first step, GiB", f"{max(r['gpu/memory_gib'] for r in rows):.1f}")
        report("power, W; utilisation", f"{middle['gpu/power_w']:.0f}; {middle['gpu/utilisation']:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    options, keys = parser.parse_known_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first one compiles and is left out")
    if options.resume and not options.folder:
        parser.error("--resume needs the --folder in which the run is")
    # A key without its value ends here, before anything starts.
    tensor_parallel = parse(["--model=later", *keys], program=PROGRAM).config.engine.tensor_parallel
    with joined_ranks(tensor_parallel) as (rank, world), ExitStack() as stack:
        mine = stack.enter_context(model_and_runs(options.size, options.folder)) if rank == 0 else None
        model, runs = gather_all(mine, "the folders of model and run")[0]
        given = settings(Workload(options.size), model, runs, options.steps, world // tensor_parallel)
        config = parse([*given, *keys], program=PROGRAM).config
        run_async(lambda: loop(config, options.size, options.resume))
        if rank == 0:
            described(metrics(config.folder)[1:], config, world)
            if options.save:
                save(options.save, f"{world} ranks, {named(options.size)} {' '.join(keys)}".rstrip())
        # The folders go when every rank is done with them.
        gather_all(None, "the end of the other ranks")


if __name__ == "__main__":
    run_program(main)
