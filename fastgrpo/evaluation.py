"""Rollouts of problems that were never trained on, as rows, and what their means say."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.config import Config
from fastgrpo.engine.opening import AnyEngine, open_engine
from fastgrpo.errors import UserError, first_line, replace_file, say_on_stderr
from fastgrpo.flow.adaptivity import adaptivity, observed_of
from fastgrpo.policy.chat import Chat, load_chat
from fastgrpo.ranks.collectives import gather_all, is_first_rank, replica_leader, replica_share
from fastgrpo.record.problem_statistics import thirds
from fastgrpo.rollouts.environment import Agent, Environment, name_of
from fastgrpo.rollouts.experience import first_failure
from fastgrpo.rollouts.generator import Generator
from fastgrpo.rollouts.prompts import prompts_fit
from fastgrpo.rollouts.rollouts import collect
from fastgrpo.run_folder import only_writer
from fastgrpo.types import EvalRow, Group, Rollout, Sampling

log = logging.getLogger(__name__)
EVALUATION_SEED = 7_919  # added to the run's seed: an evaluation draws otherwise than training does


class NothingMeasured(UserError):
    """All rollouts of an evaluation failed for a reason that is not the model's."""


async def evaluate(
    engine: AnyEngine | Generator,
    environment: Environment | Agent,
    chat: Chat,
    problems: Sequence[Any],
    config: Config,
    stage: str,
) -> list[EvalRow]:
    """`config.eval.samples` rollouts of each problem; those that failures of the environment ended are left out.

    Each replica takes its share of the problems; every rank returns all rows. Raises NothingMeasured where all failed.
    """
    groups = await _drawn_by(engine, environment, chat, problems, config, config.seed + EVALUATION_SEED)
    return measured_rows(groups, stage, config)


async def _drawn_by(
    engine: AnyEngine | Generator,
    environment: Environment | Agent,
    chat: Chat,
    problems: Sequence[Any],
    config: Config,
    seed: int,
) -> list[Group]:
    """`eval.samples` rollouts of each of this replica's share of the `problems`; none is left out as a straggler."""
    return await collect(
        engine,
        environment,
        chat,
        problems[replica_share(config.engine.tensor_parallel)],
        group_size=config.eval.samples,
        sampling=replace(Sampling.of(config), temperature=config.eval.temperature, straggler_s=0.0, routes=False),
        seed=seed,
        ranks=config.engine.tensor_parallel,
    )


async def rollouts_of_model(
    model: str, environment: Environment | Agent, problems: Sequence[Any], config: Config, seed: int
) -> list[Group]:
    """`eval.samples` rollouts of each problem by the Hugging Face folder `model`, in an engine of its own.

    Each replica has its share. Problems whose prompts are too long are left out; what happens meanwhile is said.
    """
    chat, samples = load_chat(model, config.model), config.eval.samples
    problems = leave_out_long(problems, environment, chat, config, _say)
    _say(f"loading {model} into vLLM")
    with open_engine(config, Path(model)) as engine:
        _say(f"{len(problems) * samples} rollouts of {len(problems)} problems, {samples} of each")
        return await _drawn_by(engine, environment, chat, problems, config, seed)


async def evaluate_model(
    model: str, environment: Environment | Agent, problems: Sequence[Any], config: Config, stage: str
) -> list[EvalRow]:
    """`evaluate` of the Hugging Face folder `model`, as `rollouts_of_model` has it draw."""
    groups = await rollouts_of_model(model, environment, problems, config, config.seed + EVALUATION_SEED)
    return measured_rows(groups, stage, config)


def measured_rows(groups: Sequence[Group], stage: str, config: Config) -> list[EvalRow]:
    """The rows of all ranks' `groups`; a warning tells how many rollouts failed, and why. Collective.

    Raises NothingMeasured where all of them failed.
    """
    count = sum(len(group.rollouts) for group in groups)
    ranks = gather_all((rows_of(groups, stage), count, first_failure(groups)), "the other ranks' evaluation")
    rows = [row for share, _, _ in ranks for row in share]
    reason = next((failure for _, _, failure in ranks if failure), "")
    tell_failures(len(rows), sum(count for _, count, _ in ranks), reason, config.grpo.max_infrastructure)
    return rows


def rows_of(groups: Sequence[Group], stage: str) -> list[EvalRow]:
    """A row for each rollout with a result.

    A `latency_seconds` among the metrics is the environment's: the seconds of writing are added to it.
    """
    return [
        EvalRow(
            stage=stage,
            problem_id=name_of(group.problem),
            status=rollout.result.status,
            reward=rollout.reward.total,
            metrics=_with_writing(rollout),
            difficulty=_difficulty_of(group.problem),
            dataset=_dataset_of(group.problem),
            workflow=_workflow_of(rollout),
        )
        for group in groups
        for rollout in group.rollouts
        if rollout.reward is not None
    ]


def _workflow_of(rollout: Rollout) -> str:
    """The text that the environment's record calls so, else the last completion."""
    text = rollout.result.record.get("workflow")
    return text if text and isinstance(text, str) else rollout.completions[-1]


def _dataset_of(problem: Any) -> str:
    """The problem's own `dataset`, where that is a name: it may have a column of that name with something else."""
    name = getattr(problem, "dataset", "")
    return name if isinstance(name, str) else ""


def _difficulty_of(problem: Any) -> float | None:
    """The problem's own `difficulty`, where that is a number: it may have a column of that name with words."""
    try:
        difficulty = float(getattr(problem, "difficulty", "none"))
    except (TypeError, ValueError):
        return None
    return difficulty if math.isfinite(difficulty) else None


def _with_writing(rollout: Rollout) -> dict[str, float | None]:
    metrics: dict[str, float | None] = dict(rollout.result.metrics)
    latency = metrics.get("latency_seconds")
    return metrics if latency is None else metrics | {"latency_seconds": latency + rollout.writing_s}


def tell_failures(measured: int, rollouts: int, reason: str, limit: float) -> None:
    """Say how many of the `rollouts` the means leave out. Raises NothingMeasured where none was `measured`."""
    failed = rollouts - measured
    if failed and not measured:
        raise NothingMeasured(
            f"nothing was evaluated: all {failed} rollouts failed for a reason not the model's: {reason}"
        )
    if failed:
        beyond = f", beyond grpo.max_infrastructure = {limit:g}: the means are those of the rest alone"
        much = beyond if failed > limit * rollouts else ""
        log.warning("%d of %d rollouts are left out of the evaluation%s: %s", failed, rollouts, much, reason)


def leave_out_long(
    problems: Sequence[Any],
    environment: Environment | Agent | None,
    chat: Chat,
    config: Config,
    say: Callable[[str], None],
) -> list[Any]:
    """The `problems` whose prompts leave room for a completion; how many do not is said. Collective over the ranks."""
    fits = prompts_fit(problems, environment.prompt, chat, Sampling.of(config)) if environment else []
    fits = gather_all(fits, "the problems that fit")[replica_leader(config.engine.tensor_parallel)]
    kept = [problem for problem, fit in zip(problems, fits, strict=True) if fit]
    if len(kept) < len(problems):
        say(f"{len(problems) - len(kept)} of {len(problems)} problems are left out: their prompts are too long")
    return kept


def _say(text: str) -> None:
    if is_first_rank():
        say_on_stderr(text)


def summary(rows: Sequence[EvalRow]) -> dict[str, float]:
    """Means over `rows`: the reward, and each of the environment's metrics over the rows that have it.

    Where the rows have a `complexity`, also its means on the easiest and on the hardest third of the problems; where
    they have what was `spent` in single calls, how the policy adapts to the problem (`fastgrpo.flow.adaptivity`): in
    tokens one call to the worker costs more where the problem is harder, and would already count as adapting.
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

    Makes the folder. Raises UserError where the disk is full; the file is then as it was.
    """
    if not is_first_rank():
        return
    stages = {row.stage for row in rows}
    with only_writer(path.parent):
        kept = [row for row in read_rows(path) if row.stage not in stages]
        text = msgspec.json.format(msgspec.json.encode([*kept, *rows]), indent=1)
        replace_file(path, text, "free space and start this again, a training with --resume")


def read_rows(path: Path) -> list[EvalRow]:
    """The rows of an earlier evaluation; none where there was none. Raises UserError for what is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[EvalRow]) if path.exists() else []
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise UserError(f"{path} holds no evaluation ({first_line(error)}): move it away") from error
