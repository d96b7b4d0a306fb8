"""Stage 2, reinforcement learning: `python -m fastgrpo.train`.

prompts -> generate (vLLM) -> workflows run in jails -> hidden tests -> group advantages -> packed GRPO loss -> AdamW ->
weights in place into vLLM -> the next step. Without `--model` the embedded policy goes through stage 1 first.
"""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from fastgrpo.arguments import configured, given_task, refuse_running_loop
from fastgrpo.config import Config
from fastgrpo.errors import UserError, say_on_stderr, writing
from fastgrpo.evaluation import NothingMeasured, evaluate, leave_out_long, read_rows, save_rows, summary
from fastgrpo.plan import command_to_run, print_plan, run_on_ranks, trainable, with_readable_model
from fastgrpo.program import run_program
from fastgrpo.ranks.collectives import gather_all, is_first_rank, of_replica, rank_and_world
from fastgrpo.ranks.deadlines import met
from fastgrpo.record.gpu import GpuMonitor
from fastgrpo.record.log import RunLog, open_log, refuse_unshared
from fastgrpo.report import write_report
from fastgrpo.rollouts.asking import opened
from fastgrpo.rollouts.environment import Agent, Environment
from fastgrpo.rollouts.generator import Generator
from fastgrpo.run_folder import note_task_from_python, refuse_task_from_python
from fastgrpo.sft import warm_start
from fastgrpo.signals import TERMINATING, signals_handled
from fastgrpo.stopping import stop_if_asked, under_way
from fastgrpo.tasks import (
    Task,
    digests_of,
    problems_of,
    refuse_unfit,
    refuse_untrainable,
    require_model,
    task_of,
)
from fastgrpo.training.checkpoint import Checkpoints
from fastgrpo.training.curriculum import draw_problems
from fastgrpo.training.learner import Learner, open_learner
from fastgrpo.training.remarks import Remarks, seldom_kept
from fastgrpo.training.schedule import Schedule, open_schedule
from fastgrpo.types import EvalRow


def train(
    config: Config | Mapping[str, Any] | None = None,
    *,
    model: str | Path = "",
    dataset: Any = None,
    eval_dataset: Any = None,
    reward: Callable[..., Any] | Sequence[Callable[..., Any]] = (),
    reward_weights: Sequence[float] | None = None,
    environment: Environment | Agent | None = None,
    task: Task | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Path:
    """Train from Python and return the run's folder; `fastgrpo.train(...)` is this function.

    `config`: keys by their dotted names, as on the command line, or a `Config`. `reward`: functions in TRL's form,
    `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, weighted by `reward_weights`, on the
    rows of `dataset` (dicts, a `datasets.Dataset`, a file, a name on the hub); `data.held_out` of them, or
    `eval_dataset`, are evaluated. `environment` takes any problems in place of rows: an `Environment`, or an `Agent`,
    which calls the policy through an OpenAI client (see `rollouts.environment`); one of verifiers brings its own rows.
    `task` is all of that in one (`fastgrpo.tasks`). Without any of them the task is the one that the configuration
    names. `resume` goes on from the run's last checkpoint; `dry_run` prints the plan and starts nothing.
    Raises UserError; KeyboardInterrupt, with a checkpoint left, after Ctrl-C and in the main thread SIGTERM and SIGHUP.
    After `fastgrpo.stop()` it returns, with a checkpoint left.
    """
    refuse_running_loop()
    config = configured(config, str(model) if isinstance(model, Path) else model or "")
    task = given_task(task, environment, reward, reward_weights, dataset, eval_dataset)
    if dry_run:
        print_plan(config, task, refuse_problems=refuse_untrainable, resume=resume)
        return config.folder
    # Python's own Ctrl-C ends in order, too; handlers of signals belong to the main thread.
    main = threading.current_thread() is threading.main_thread()
    with signals_handled(TERMINATING) if main else nullcontext():
        run_here(config, resume=resume, task=task)
    return config.folder


def run_here(config: Config, *, resume: bool, task: Task | None = None) -> None:
    """`run` as the one training of this process, on its rank."""
    with under_way() as training:
        run_on_ranks(config, lambda: training.run(run(config, resume=resume, task=task)))


async def run(config: Config, *, resume: bool = False, task: Task | None = None) -> None:
    """The warm start where it is wanted, GRPO, evaluation on held-out problems before and after, the report.

    `task` None is the one that the configuration names. Raises UserError for what a user can mend.
    """
    refuse_idle_ranks(config)
    refuse_unshared(config.folder)
    named = task is None
    if named and resume:
        refuse_task_from_python(config.folder, "continue from there, with resume=True")
    task = task or task_of(config)
    require_model(config, task)
    refuse_unfit(config, task, resume=resume)
    config = with_readable_model(config, again=resume)
    trainable(config)
    problems, held_out = found = problems_of(task, config)
    refuse_untrainable(config, found)
    data = digests_of(task, config, found) if is_first_rank() else {}
    with open_log(config, resume=resume, data=data) as log:
        if log.folder is not None and not named:
            note_task_from_python(log.folder)
        async with of_replica(opened(task.open_environment(config, log)), config.engine.tensor_parallel) as environment:
            model = Path(config.model.path or await warm_start(config, environment, problems, log))
            if resume:
                # What is added to it in hours must be one.
                read_rows(config.folder / "evaluation.json")
                log.say(where_resumed(config.folder / "checkpoints", model))
            with open_learner(config, model, resume=resume) as learner:

                async def measure(stage: str) -> dict[str, float]:
                    rows = await evaluate(learner.engine, environment, learner.chat, held_out, config, stage)
                    save_rows(config.folder / "evaluation.json", rows)
                    return told(learner.step, rows, log)

                async def measure_beside(generator: Generator) -> dict[str, float]:
                    stage = f"step {learner.step}"
                    try:
                        rows = await evaluate(generator, environment, learner.chat, held_out, config, stage)
                    except NothingMeasured as error:  # the next steps fail likewise, and leave a checkpoint
                        log.say(f"{stage}: {error}")
                        return {}
                    return told(learner.step, rows, log)

                problems = leave_out_long(problems, environment, learner.chat, config, log.say)
                held_out = leave_out_long(held_out, environment, learner.chat, config, log.say)
                log.say(how_many(len(problems), len(held_out), config.grpo.prompts_per_step))
                before = {} if learner.step else await measure("sft")
                await improve(learner, environment, problems, config, log, measure_beside, before)
                # Before the evaluation: whatever ends that, the steps are kept.
                learner.save()
                learner.checkpoints.wait()
                measured = await measure("grpo")
                learner.save(score=measured.get("reward"))
                best = learner.checkpoints.best()
                if config.eval.every and best is not None:
                    log.say(f"the best of the evaluated checkpoints that are kept: {best}")
        if log.folder is not None:
            log.say(f"report: {write_report(log.folder)}")


def how_many(problems: int, held_out: int, step: int) -> str:
    """What a run says of its problems: by default some of a data set are held out, which another trainer would take."""
    drawn = f"; a step draws {step}, some of them more than once" if step > problems else ""
    return f"problems: {problems} to train on{drawn}; {held_out} held out to evaluate on"


def told(step: int, rows: Sequence[EvalRow], log: RunLog) -> dict[str, float]:
    """The means of an evaluation after `step` updates, which are said."""
    if means := summary(rows):
        log.say(f"held out, step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    return means


def where_resumed(folder: Path, model: Path) -> str:
    """From which of a run's checkpoints it goes on, and from the `model` where it has none. Collective.

    Raises UserError where there are some and none is whole: all that the run has logged would be lost.
    """
    checkpoints = Checkpoints(folder)
    if is_first_rank():
        with writing(f"or read all in {folder}", "make all in it readable and writable, then continue with --resume"):
            checkpoints.set_damaged_aside()
    gather_all(None, "the check of the last checkpoint")
    latest, broken = checkpoints.latest(), ", ".join(path.name for path in checkpoints.broken())
    why = "files are missing, cut short or changed"
    if latest is None and broken:
        raise UserError(
            f"no checkpoint in {folder} is whole, of {broken} {why}: copy them anew, or remove the folder to start over"
        )
    if latest is None:
        return f"{folder.parent} has no checkpoint yet: GRPO starts over, from {model}"
    return f"continuing from {latest}" + (f"; {broken} after it cannot be used: {why}" if broken else "")


async def improve(
    learner: Learner,
    environment: Environment | Agent,
    problems: Sequence[Any],
    config: Config,
    log: RunLog,
    measure: Callable[[Generator], Awaitable[dict[str, float]]] | None = None,
    before: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """GRPO to step `grpo.steps`, with checkpoints; cancelled, it leaves one, where several ranks are at one step then.

    After every `eval.every` steps but the last `measure` gives the means of an evaluation: they are logged with the
    next step, which begins with the weights that they are of, and the reward's is the score of a checkpoint of those.
    `before`: such means of the weights that the first step begins with.
    """
    log.stage("grpo", config.grpo.steps, done=learner.step)
    draw = partial(draw_problems, problems, config, curriculum=learner.curriculum)
    remarks = Remarks(config.grpo, log.say)
    if measure is not None and config.eval.every % config.checkpoint.every:
        log.say(seldom_kept(config))

    async def held_out(schedule: Schedule) -> dict[str, float]:
        done, every = learner.step, config.eval.every
        if measure is None or not every or done % every:
            return {}
        means = before
        if done:
            with log.phase("evaluate"):
                means = await measure(schedule.generator)
            if done % config.checkpoint.every == 0:
                learner.save(score=means.get("reward"))
        return {f"held_out/{name}": value for name, value in means.items()}

    async with open_schedule(learner, environment, draw, config) as schedule:
        try:
            with GpuMonitor() as gpu:
                while learner.step < config.grpo.steps:
                    stop_if_asked()
                    evaluated = await held_out(schedule)
                    with log.phase("generate"):
                        await schedule.generated()
                    with log.phase("execute"):
                        experience = await schedule.experience()
                        tally = await schedule.tally(experience)
                    with log.phase("train"):
                        metrics = await schedule.update(log)
                    with log.phase("sync"):
                        metrics |= schedule.sync()
                    log.samples(learner.step, experience.records)
                    values = tally.values()
                    log.step(learner.step, metrics | values | evaluated | gpu.take(), waited_for=tally.waited[1])
                    # An interrupt that came with the update goes on here.
                    await asyncio.sleep(0)
                    remarks.step(values, tally.failure)
                    with log.phase("checkpoint"):
                        learner.checkpoints.check()
                        if learner.step % config.checkpoint.every == 0:
                            await schedule.save()
            await schedule.settle()
        except asyncio.CancelledError:
            if met(f"the checkpoint of step {learner.step}"):
                await schedule.settle()
                learner.save()
            else:
                say_on_stderr(
                    f"interrupted while the ranks were apart, which leaves no checkpoint of step {learner.step}: a "
                    "resumed run goes on from the last periodic one, or starts over where there is none"
                )
            raise


def refuse_idle_ranks(config: Config) -> None:
    """Raises UserError where a step has fewer problems than there are replicas: one would have no rollout at all."""
    problems, size = config.grpo.prompts_per_step, config.engine.tensor_parallel
    replicas = rank_and_world()[1] // size
    if problems < replicas:
        units = "ranks" if size == 1 else f"replicas of {size} ranks"
        raise UserError(f"grpo.prompts_per_step = {problems} is below the {replicas} {units}: raise it")


def main() -> None:
    """Train as the command line says, or print the plan."""
    if command := command_to_run("fastgrpo.train", refuse_problems=refuse_untrainable):
        run_here(command.config, resume=command.resume)


class _Program(ModuleType):
    """This module, which is a program by its name and may be called by it: `fastgrpo.train(...)`."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Program

if __name__ == "__main__":
    run_program(main)
