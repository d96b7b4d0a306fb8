"""Evaluation on problems that were never trained on: `python -m fastgrpo.evaluate --model PATH`."""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from fastgrpo.cli import parse
from fastgrpo.config import Config
from fastgrpo.doctor import require_ready
from fastgrpo.engine.engine import Engine
from fastgrpo.errors import UserError, run_program
from fastgrpo.policy.chat import Chat, load_chat
from fastgrpo.ranks.collectives import gather_all, joined_ranks, rank_and_world, replica_share
from fastgrpo.rollouts.rollouts import Environment, collect
from fastgrpo.runtime import load_problems, of_replica, open_engine, open_environment, run_async, sampling_of
from fastgrpo.types import Problem

log = logging.getLogger(__name__)


class EvalRow(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled workflow of one held-out problem."""

    stage: str
    problem_id: str
    difficulty: float
    status: str
    pass_rate: float
    complexity: float
    reward: float
    workflow: str


async def evaluate(
    engine: Engine, environment: Environment, chat: Chat, problems: Sequence[Problem], config: Config, stage: str
) -> list[EvalRow]:
    """`config.eval.samples` rollouts of each problem; those that our own failures ended are left out.

    Each replica takes its share of the problems; every rank returns all rows.
    """
    groups = await collect(
        engine,
        environment,
        chat,
        problems[replica_share(config.engine.tensor_parallel)],
        group_size=config.eval.samples,
        sampling=replace(sampling_of(config), temperature=config.eval.temperature),
        seed=config.seed + 7_919,
        ranks=config.engine.tensor_parallel,
    )
    failed = [rollout for group in groups for rollout in group.rollouts if rollout.reward is None]
    if failed:
        rollouts, reason = sum(len(group.rollouts) for group in groups), failed[0].executions[-1].error
        log.warning("%d of %d workflows are left out of the evaluation: %s", len(failed), rollouts, reason)
    rows = [
        EvalRow(
            stage=stage,
            problem_id=group.problem.id,
            difficulty=group.problem.difficulty,
            status=rollout.executions[-1].status,
            pass_rate=rollout.executions[-1].pass_rate,
            complexity=rollout.executions[-1].complexity,
            reward=rollout.reward.total,
            workflow=rollout.executions[-1].workflow or rollout.completions[-1],
        )
        for group in groups
        for rollout in group.rollouts
        if rollout.reward is not None
    ]
    return [row for share in gather_all(rows, "the other ranks' evaluation") for row in share]


def summary(rows: Sequence[EvalRow]) -> dict[str, float]:
    """Means over `rows`, and the mean complexity on the easiest and on the hardest third of the problems."""
    if not rows:
        return {}
    ranked = sorted(rows, key=lambda row: (row.difficulty, row.problem_id))
    third = max(len(ranked) // 3, 1)
    return {
        "pass_rate": statistics.fmean(row.pass_rate for row in rows),
        "reward": statistics.fmean(row.reward for row in rows),
        "invalid": statistics.fmean(row.status == "invalid" for row in rows),
        "complexity": statistics.fmean(row.complexity for row in rows),
        "complexity_easy": statistics.fmean(row.complexity for row in ranked[:third]),
        "complexity_hard": statistics.fmean(row.complexity for row in ranked[-third:]),
    }


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
    _, held_out = load_problems(config)
    async with of_replica(open_environment(config), config) as environment:
        with open_engine(config, Path(config.model.path)) as engine:
            chat = load_chat(config.model.path, config.model)
            rows = await evaluate(engine, environment, chat, held_out, config, "evaluate")
    if held_out and not rows:
        raise UserError("nothing was evaluated: every workflow failed for the reason above, which is not the model's")
    if rank_and_world()[0] == 0:
        for name, value in summary(rows).items():
            print(f"{name:16} {value:.4f}")


def main() -> None:
    """Evaluate `--model PATH` on the held-out problems and print the means."""
    command = parse(sys.argv[1:], program="fastgrpo.evaluate", of_run=True)
    require_ready()
    with joined_ranks(command.config.engine.tensor_parallel):
        run_async(lambda: _main(command.config))


if __name__ == "__main__":
    run_program(main)
