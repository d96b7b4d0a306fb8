"""Fixed workflows as controls: they answer the held-out problems through the environment of the policy beside them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.cli import configuration_of
from fastgrpo.config import Config
from fastgrpo.config_files import read_toml
from fastgrpo.errors import UserError
from fastgrpo.evaluation import evaluate_model, measured_rows, summary
from fastgrpo.flow.adaptivity import adaptivity_table
from fastgrpo.flow.baselines import ALONE, RANDOM, Control, always, candidates, drawn, fixed_workflows, run_control
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.types import Problem
from fastgrpo.ranks.collectives import of_replica, replica_share
from fastgrpo.record.comparison import gains, markdown, write_comparison
from fastgrpo.record.problem_statistics import stages_of
from fastgrpo.rollouts.asking import all_of, opened
from fastgrpo.run_folder import only_writer
from fastgrpo.tasks import problems_of, refuse_none_held_out, task_of
from fastgrpo.types import EvalRow, Group


async def compare(config: Config, models: Mapping[str, str], *, controls: bool = True) -> list[EvalRow]:
    """The rows of every fixed workflow, with `controls`, and of each of the `models` on the held-out problems.

    Raises UserError where the task has no workflows, where none is held out, or where nothing could be measured.
    """
    task = task_of(config)
    if not task.distilled:
        raise UserError("fixed workflows answer problems with tests: leave task and data.reward as they are by default")
    # A cached answer costs nothing and takes no time.
    config = msgspec.structs.replace(config, workers=msgspec.structs.replace(config.workers, cache_dir=""))
    train, held_out = found = problems_of(task, config)
    refuse_none_held_out(found)
    async with of_replica(opened(task.open_environment(config, None)), config.engine.tensor_parallel) as environment:
        rows = await baselines(environment, train, held_out, config) if controls else []
        for stage, model in models.items():
            rows += await evaluate_model(model, environment, held_out, config, stage)
    return rows


async def baselines(
    environment: WorkflowEnvironment | None, train: Sequence[Problem], held_out: Sequence[Problem], config: Config
) -> list[EvalRow]:
    """Every fixed workflow on `held_out`, `eval.samples` of each problem; collective over the ranks.

    The best one is chosen by its mean reward, as many samples each, on as many of the `train` problems as are held out:
    one sample each had chosen the worst of them on thirty questions.
    """

    async def measured(controls: Mapping[str, Control], problems: Sequence[Problem]) -> dict[str, list[EvalRow]]:
        """The rows of each; all run at once, for most of a workflow is waiting."""
        share = problems[replica_share(config.engine.tensor_parallel)]
        groups: Sequence[list[Group]] = [[] for _ in controls]
        if environment is not None:
            drawing = {"samples": config.eval.samples, "seed": config.seed}
            runs = (run_control(environment, share, control, **drawing) for control in controls.values())
            groups = await all_of(runs)
        return {name: measured_rows(found, name, config) for name, found in zip(controls, groups, strict=True)}

    tried = random.Random(f"{config.seed}/best").sample(train, min(len(train), len(held_out)))
    texts = candidates(config.eval.drafts)
    rewards = await measured({name: always(code) for name, code in texts.items()}, tried)
    best = max(rewards, key=lambda name: summary(rewards[name]).get("reward", -math.inf))
    controls = {name: always(code) for name, code in fixed_workflows(config.eval.drafts).items()}
    controls[RANDOM] = drawn(environment.worker.names if environment else ())
    controls[f"best on training problems: {best}"] = always(texts[best])
    return [row for rows in (await measured(controls, held_out)).values() for row in rows]


def policies(model: str) -> dict[str, str]:
    """The folders to evaluate by what they are: beside a model after RL also the one that its run began from."""
    file = configuration_of(model)
    if file is None:
        return {"policy": model}
    own = Path(file).parent / "sft"
    if Path(model).resolve() == own:
        return {"SFT only": model}
    start = Path(read_toml(Path(file)).get("model.path") or own)
    began = start.name == "sft" and start.is_dir()
    return {"SFT only": str(start), "SFT + RL": model} if began else {"policy": model}


def write_rows(folder: Path, name: str, rows: Sequence[EvalRow]) -> str:
    """The comparison of the rows' stages in `folder` (`write_comparison`); returns its Markdown."""
    plain = [row.plain() for row in rows]
    with only_writer(folder):
        return write_comparison(folder, name, plain, "\n".join([*_gains(plain), _adaptivity(plain)]))


def _gains(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table for each worker: stages of several begin with its name."""
    for alone in stages_of(rows):
        if alone.endswith(ALONE):
            own = [row for row in rows if row["stage"].startswith(alone.removesuffix(ALONE))]
            yield f"## What is gained over {alone}, and what it costs\n\n{gains(own, alone)}"


def _adaptivity(rows: Sequence[Mapping[str, Any]]) -> str:
    table = adaptivity_table(rows)
    return f"## How the workflows follow the query\n\n{markdown(table)}" if len(table) > 1 else ""
