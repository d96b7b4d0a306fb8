"""Evaluation on problems that were never trained on: `python -m fastgrpo.evaluate --model PATH`."""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.cli import parse, run_async
from fastgrpo.config import Config
from fastgrpo.doctor import require_ready
from fastgrpo.engine.engine import Engine, open_engine
from fastgrpo.errors import UserError, run_program
from fastgrpo.flow.adaptivity import adaptivity, observed_of
from fastgrpo.plan import print_plan
from fastgrpo.policy.chat import Chat, load_chat
from fastgrpo.ranks.collectives import gather_all, joined_ranks, of_replica, rank_and_world, replica_share
from fastgrpo.record.problem_statistics import thirds
from fastgrpo.rollouts.environment import Environment
from fastgrpo.rollouts.experience import first_failure
from fastgrpo.rollouts.rollouts import Sampling, collect
from fastgrpo.tasks import task_of

log = logging.getLogger(__name__)


class EvalRow(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled completion of one held-out problem, with the environment's metrics of it.

    `difficulty` in [0, 1] is the problem's, where it has one; `workflow` is what there is to read.
    """

    stage: str
    problem_id: str
    status: str
    reward: float
    metrics: dict[str, float]
    difficulty: float | None = None
    workflow: str = ""


async def evaluate(
    engine: Engine, environment: Environment, chat: Chat, problems: Sequence[Any], config: Config, stage: str
) -> list[EvalRow]:
    """`config.eval.samples` rollouts of each problem; those that failures of the environment ended are left out.

    Each replica takes its share of the problems; every rank returns all rows.
    """
    groups = await collect(
        engine,
        environment,
        chat,
        problems[replica_share(config.engine.tensor_parallel)],
        group_size=config.eval.samples,
        sampling=replace(Sampling.of(config), temperature=config.eval.temperature),
        seed=config.seed + 7_919,
        ranks=config.engine.tensor_parallel,
    )
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if failed := sum(rollout.reward is None for rollout in rollouts):
        reason = first_failure(groups)
        log.warning("%d of %d rollouts are left out of the evaluation: %s", failed, len(rollouts), reason)
    rows = [
        EvalRow(
            stage=stage,
            problem_id=group.problem.id,
            status=rollout.result.status,
            reward=rollout.reward.total,
            metrics=rollout.result.metrics,
            difficulty=getattr(group.problem, "difficulty", None),
            workflow=rollout.result.record.get("workflow") or rollout.completions[-1],
        )
        for group in groups
        for rollout in group.rollouts
        if rollout.reward is not None
    ]
    return [row for share in gather_all(rows, "the other ranks' evaluation") for row in share]


def summary(rows: Sequence[EvalRow]) -> dict[str, float]:
    """Means over `rows`: the reward, and each of the environment's metrics over the rows that have it.

    Where the rows have a `complexity`, also its means on the easiest and on the hardest third of the problems; where
    they have workers' calls, how the policy adapts to the problem (`fastgrpo.flow.adaptivity`).
    """
    if not rows:
        return {}
    plain = [msgspec.structs.asdict(row) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    means = {name: statistics.fmean(row.metrics[name] for row in rows if name in row.metrics) for name in names}
    means["reward"] = statistics.fmean(row.reward for row in rows)
    return means | _by_difficulty(rows) | adaptivity(observed_of(plain))


def _by_difficulty(rows: Sequence[EvalRow]) -> dict[str, float]:
    means = {}
    parts = thirds([msgspec.structs.asdict(row) for row in rows])
    for name, problems in (("easy", parts[0]), ("hard", parts[-1])):
        part = [row.metrics for row in rows if row.problem_id in problems]
        values = [metrics["complexity"] for metrics in part if "complexity" in metrics]
        if values:
            means[f"complexity_{name}"] = statistics.fmean(values)
    return means


def save_rows(path: Path, rows: Sequence[EvalRow]) -> None:
    """Replace the rows of the same stages in the JSON list at `path`, keeping those of others; the first rank writes.

    Raises UserError where the disk is full; the file is then as it was.
    """
    if rank_and_world()[0] != 0:
        return
    stages = {row.stage for row in rows}
    kept = [row for row in read_rows(path) if row.stage not in stages]
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode([*kept, *rows]), indent=1))
        partial.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space and continue with --resume") from error


def read_rows(path: Path) -> list[EvalRow]:
    """The rows of an earlier evaluation; none where there was none."""
    return msgspec.json.decode(path.read_bytes(), type=list[EvalRow]) if path.exists() else []


async def _main(config: Config) -> None:
    if not config.model.path:
        raise UserError("evaluate needs --model PATH: a Hugging Face folder, such as a checkpoint of a run")
    task = task_of(config)
    _, held_out = task.load_problems(config)
    async with of_replica(task.open_environment(config, None), config.engine.tensor_parallel) as environment:
        with open_engine(config, Path(config.model.path)) as engine:
            chat = load_chat(config.model.path, config.model)
            rows = await evaluate(engine, environment, chat, held_out, config, "evaluate")
    if held_out and not rows:
        raise UserError("nothing was evaluated: every rollout failed for the reason above, which is not the model's")
    if rank_and_world()[0] == 0:
        for name, value in summary(rows).items():
            print(f"{name:16} {value:.4f}")


def main() -> None:
    """Evaluate `--model PATH` on the held-out problems and print the means."""
    command = parse(sys.argv[1:], program="fastgrpo.evaluate", of_run=True)
    if command.dry_run:
        return print_plan(command.config)
    require_ready()
    with joined_ranks(command.config.engine.tensor_parallel):
        run_async(lambda: _main(command.config))


if __name__ == "__main__":
    run_program(main)
