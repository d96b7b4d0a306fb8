"""The experiments of docs/experiments.md: `python -m fastgrpo.experiments NAME [--section.key VALUE]`.

Each composes training and evaluation with other keys, in one process, and leaves Markdown, plots and the raw rows under
`runs/experiments/NAME`. What is finished there is not done again, and a training that was cut goes on. Where `--model`
is named, trainings start from it, and experiments that only measure take it for the trained policy.
"""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

import os
import sys
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.cli import parse, run_async
from fastgrpo.config import Config, resolve
from fastgrpo.config_files import flat, to_toml
from fastgrpo.doctor import require_ready
from fastgrpo.errors import UserError, run_program
from fastgrpo.evaluate import EvalRow, compare, policies, read_rows, save_rows, write_rows
from fastgrpo.plan import print_plan
from fastgrpo.policy.hub import with_local_model
from fastgrpo.train import train
from fastgrpo.training.checkpoint import Checkpoints

Rows = list[EvalRow]
PERFORMANCE_ONLY = {"reward.complexity": 0.0, "reward.efficiency": 0.0, "reward.diversity": 0.0}


def sft_subset(config: Config, folder: Path) -> Rows:
    """How far supervised fine-tuning alone gets on HumanEval, or on `data.problems` of it."""
    held_out = config.data.held_out
    keys = {
        "data.dataset": "humaneval",
        "data.weights": 1.0,
        "data.held_out": held_out[0] if isinstance(held_out, tuple) else held_out,
        "grpo.steps": 0,
    }
    run = trained(config, folder, "sft", keys)
    return rows_of_run(run, {"sft": "SFT only"}) + measured(folder / "controls.json", partial(compare, run, {}))


def reward_ablation(config: Config, folder: Path) -> Rows:
    """The pass rate as the only reward against the full one."""
    full = trained(config, folder, "full", {})
    alone = trained(config, folder, "performance-only", PERFORMANCE_ONLY)
    rows = rows_of_run(full, {"sft": "SFT only", "grpo": "full reward"})
    return rows + rows_of_run(alone, {"grpo": "performance only"})


def weights(config: Config, folder: Path) -> Rows:
    """The weights of complexity and efficiency, each at nothing and at twice what is configured."""
    rows = rows_of_run(trained(config, folder, "as-configured", {}), {"sft": "SFT only", "grpo": "as configured"})
    for term in ("complexity", "efficiency"):
        for factor in (0, 2):
            keys = {f"reward.{term}": factor * getattr(config.reward, term)}
            run = trained(config, folder, f"{term}-x{factor}", keys)
            rows += rows_of_run(run, {"grpo": f"{term} x {factor}"})
    return rows


def worker_swap(config: Config, folder: Path) -> Rows:
    """A policy trained with the first worker, answered by each of the `workers.others` without training again."""
    workers = config.workers.by_name()
    if len(workers) < 2:
        raise UserError("worker-swap needs another worker: add a table [workers.others.NAME]; docs/configuration.md")
    model = policy(with_worker(config, config.workers.name), folder)
    rows: Rows = []
    for name in workers:
        found = measured(folder / f"{name}.json", partial(compare, with_worker(config, name), {"policy": model}))
        rows += [msgspec.structs.replace(row, stage=f"{name}: {row.stage}") for row in found]
    return rows


def cost(config: Config, folder: Path) -> Rows:
    """What the policy gains over the fixed workflows, and what it costs beside them."""
    model = policy(config, folder)
    return measured(folder / "comparison.json", partial(compare, config, policies(model)))


def hacking(config: Config, folder: Path) -> Rows:
    """Public against hidden pass rates before and after RL: a gap that grows is a test that is gamed."""
    model = policy(config, folder)
    return measured(folder / "policies.json", partial(compare, config, policies(model), controls=False))


EXPERIMENTS: Mapping[str, Callable[[Config, Path], Rows]] = {
    "sft-subset": sft_subset,
    "reward-ablation": reward_ablation,
    "worker-swap": worker_swap,
    "weights": weights,
    "cost": cost,
    "hacking": hacking,
}


def with_worker(config: Config, name: str) -> Config:
    """The configuration with the worker called `name` as the only one."""
    return msgspec.structs.replace(config, workers=config.workers.by_name()[name])


def trained(config: Config, folder: Path, name: str, keys: Mapping[str, Any]) -> Config:
    """The configuration of the run `name` in `folder`, which differs by `keys`, once it has been trained to its end."""
    run = resolve(flat(config) | dict(keys) | {"name": name, "runs": str(folder)})
    if not (run.folder / "report.html").exists():
        train(run, resume=(run.folder / "config.toml").exists())
    return run


def policy(config: Config, folder: Path) -> str:
    """The folder of the trained policy: the model that is named, else that of a run in `folder`."""
    if config.model.path:
        return config.model.path
    return str(Checkpoints(trained(config, folder, "policy", {}).folder / "checkpoints").latest())


def rows_of_run(run: Config, stages: Mapping[str, str]) -> Rows:
    """The rows of a run's own evaluations, under the names that `stages` gives them."""
    rows = read_rows(run.folder / "evaluation.json")
    return [msgspec.structs.replace(row, stage=stages[row.stage]) for row in rows if row.stage in stages]


def measured(path: Path, measure: Callable[[], Coroutine[Any, Any, Rows]]) -> Rows:
    """The rows of a measurement, made once and kept at `path`."""
    if not path.exists():
        save_rows(path, run_async(measure))
    return read_rows(path)


def perform(name: str, config: Config) -> str:
    """Do what is left of the experiment `name` and return its Markdown, which is also in its folder.

    Raises UserError for an unknown name, and where the folder is of another configuration.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"there is no experiment {name!r}: choose one of {', '.join(EXPERIMENTS)}")
    folder = Path(config.runs) / "experiments" / name
    saved = folder / "config.toml"
    if saved.exists() and saved.read_text(encoding="utf-8") != to_toml(config):
        raise UserError(f"{folder} was made with another configuration: move it away, or set --runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saved.write_text(to_toml(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; free space or set --runs") from None
    return write_rows(folder, "results", EXPERIMENTS[name](config, folder))


def main() -> None:
    """Perform the experiment named on the command line and print its tables."""
    command = parse(sys.argv[1:], program="fastgrpo.experiments", positional="NAME", of_run=True)
    if len(command.arguments) != 1:
        raise UserError(f"name one experiment: {', '.join(EXPERIMENTS)}")
    if command.dry_run:
        return print_plan(command.config)
    if "RANK" in os.environ:
        raise UserError("experiments run in one process: start them without torchrun")
    require_ready()
    print(perform(command.arguments[0], with_local_model(command.config)))


if __name__ == "__main__":
    run_program(main)
