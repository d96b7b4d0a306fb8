"""Evaluation on problems that were never trained on: `python -m fastgrpo.evaluate --model PATH`."""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

import logging
import statistics
import sys
from collections.abc import Callable, Sequence
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
from fastgrpo.rollouts.rollouts import Sampling, collect, fitting
from fastgrpo.tasks import task_of

log = logging.getLogger(__name__)


class EvalRow(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled completion of one held-out problem, with the environment's metrics of it.

    What is no finite number is null in a file, and counts in no mean. `difficulty` in [0, 1] is the problem's, where it
    has one; `workflow` is what there is to read.
    """

    stage: str
    problem_id: str
    status: str
    reward: float | None
    metrics: dict[str, float | None]
    difficulty: float | None = None
    workflow: str = ""


async def evaluate(
    engine: Engine, environment: Environment, chat: Chat, problems: Sequence[Any], config: Config, stage: str
) -> list[EvalRow]:
    """`config.eval.samples` rollouts of each problem; those that failures of the environment ended are left out.

    Each replica takes its share of the problems; every rank returns all rows. Raises UserError where all failed.
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
    rows = [
        EvalRow(
            stage=stage,
            problem_id=group.problem.id,
            status=rollout.result.status,
            reward=rollout.reward.total,
            metrics=dict(rollout.result.metrics),
            difficulty=getattr(group.problem, "difficulty", None),
            workflow=rollout.result.record.get("workflow") or rollout.completions[-1],
        )
        for group in groups
        for rollout in group.rollouts
        if rollout.reward is not None
    ]
    count = sum(len(group.rollouts) for group in groups)
    ranks = gather_all((rows, count, first_failure(groups)), "the other ranks' evaluation")
    everything = [row for share, _, _ in ranks for row in share]
    reason = next((failure for _, _, failure in ranks if failure), "")
    tell_failures(len(everything), sum(count for _, count, _ in ranks), reason, config.grpo.max_infrastructure)
    return everything


def tell_failures(measured: int, rollouts: int, reason: str, limit: float) -> None:
    """Say how many of the `rollouts` the means leave out. Raises UserError where none was `measured`."""
    failed = rollouts - measured
    if failed and not measured:
        raise UserError(f"nothing was evaluated: all {failed} rollouts failed for a reason not the model's: {reason}")
    if failed:
        beyond = f", beyond grpo.max_infrastructure = {limit:g}: the means are those of the rest alone"
        much = beyond if failed > limit * rollouts else ""
        log.warning("%d of %d rollouts are left out of the evaluation%s: %s", failed, rollouts, much, reason)


def leave_out_long(
    problems: Sequence[Any], environment: Environment | None, chat: Chat, config: Config, say: Callable[[str], None]
) -> list[Any]:
    """The `problems` whose prompts leave room for a completion; how many do not is said. Collective over the ranks."""
    ranks = config.engine.tensor_parallel
    fits = fitting(problems, environment, chat, Sampling.of(config)) if environment else []
    fits = gather_all(fits, "the problems that fit")[rank_and_world()[0] // ranks * ranks]
    kept = [problem for problem, fit in zip(problems, fits, strict=True) if fit]
    if len(kept) < len(problems):
        say(f"{len(problems) - len(kept)} of {len(problems)} problems are left out: their prompts are too long")
    return kept


def summary(rows: Sequence[EvalRow]) -> dict[str, float]:
    """Means over `rows`: the reward, and each of the environment's metrics over the rows that have it.

    Where the rows have a `complexity`, also its means on the easiest and on the hardest third of the problems; where
    they have workers' calls, how the policy adapts to the problem (`fastgrpo.flow.adaptivity`).
    """
    if not rows:
        return {}
    plain = [msgspec.structs.asdict(row) for row in rows]
    columns = [row.metrics | {"reward": row.reward} for row in rows]
    names = [*dict.fromkeys(name for row in rows for name in row.metrics), "reward"]
    values = {name: [value for column in columns if (value := column.get(name)) is not None] for name in names}
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    return means | _by_difficulty(rows) | adaptivity(observed_of(plain))


def _by_difficulty(rows: Sequence[EvalRow]) -> dict[str, float]:
    means = {}
    parts = thirds([msgspec.structs.asdict(row) for row in rows])
    for name, problems in (("easy", parts[0]), ("hard", parts[-1])):
        part = [row.metrics for row in rows if row.problem_id in problems]
        values = [value for metrics in part if (value := metrics.get("complexity")) is not None]
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
    """The rows of an earlier evaluation; none where there was none. Raises UserError for what is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[EvalRow]) if path.exists() else []
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} holds no evaluation ({error}): move it away") from error


async def _main(config: Config) -> None:
    if not config.model.path:
        raise UserError("evaluate needs --model PATH: a Hugging Face folder, such as a checkpoint of a run")
    task = task_of(config)
    _, held_out = task.load_problems(config)
    async with of_replica(task.open_environment(config, None), config.engine.tensor_parallel) as environment:
        chat = load_chat(config.model.path, config.model)
        held_out = leave_out_long(held_out, environment, chat, config, _say)
        _say(f"loading {config.model.path} into vLLM")
        with open_engine(config, Path(config.model.path)) as engine:
            count = len(held_out) * config.eval.samples
            _say(f"{count} rollouts of {len(held_out)} held-out problems, {config.eval.samples} of each")
            rows = await evaluate(engine, environment, chat, held_out, config, "evaluate")
    if rank_and_world()[0] == 0:
        for name, value in summary(rows).items():
            print(f"{name:16} {value:.4f}")


def _say(text: str) -> None:
    if rank_and_world()[0] == 0:
        print(text, file=sys.stderr, flush=True)


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
