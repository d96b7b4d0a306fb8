"""Stage 2, reinforcement learning: `python -m fastgrpo.train`.

prompts -> generate (vLLM) -> workflows run in jails -> hidden tests -> group advantages -> packed GRPO loss -> AdamW ->
weights in place into vLLM -> the next step. Without `--model` the embedded policy goes through stage 1 first.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from fastgrpo.cli import parse
from fastgrpo.config import Config
from fastgrpo.distributed import joined_ranks, over_ranks, rank_and_world
from fastgrpo.doctor import require_ready
from fastgrpo.errors import UserError, run_program
from fastgrpo.evaluate import evaluate, save_rows, summary
from fastgrpo.learner import Learner, open_learner, to_samples
from fastgrpo.log import RunLog
from fastgrpo.metrics import Experience, rollout_metrics, sample_records
from fastgrpo.plan import print_plan
from fastgrpo.report import write_report
from fastgrpo.rollout import Environment, Rollouts, device_thread, generator
from fastgrpo.runtime import load_problems, open_environment, open_log, run_async, sampling_of, share_cores
from fastgrpo.sft import warm_start
from fastgrpo.telemetry import GpuMonitor


async def train(
    config: Config,
    *,
    resume: bool = False,
    load_problems: Callable[[Config], tuple[list[Any], list[Any]]] = load_problems,
    open_environment: Callable[[Config, RunLog], AbstractAsyncContextManager[Any]] = open_environment,
) -> None:
    """The warm start where it is wanted, GRPO, evaluation on held-out problems before and after, the report.

    Another task brings its own problems and environment (see `rollout.Environment`), and its own `--model`.
    """
    problems, held_out = load_problems(config)
    with open_log(config, resume=resume) as log:
        async with open_environment(config, log) as environment:
            model = Path(config.model.path or await warm_start(config, environment, problems, log))
            with open_learner(config, model, resume=resume) as learner:

                async def measure(stage: str) -> dict[str, float]:
                    rows = await evaluate(learner.engine, environment, learner.tokenizer, held_out, config, stage)
                    save_rows(config.folder / "evaluation.json", rows)
                    log.say(f"held out, {stage}: " + ", ".join(f"{k} {v:.3f}" for k, v in summary(rows).items()))
                    return summary(rows)

                if learner.step == 0:
                    await measure("sft")
                await improve(learner, environment, problems, config, log)
                measured = await measure("grpo")
                learner.save(score=measured.get("reward"))
        if log.folder is not None:
            log.say(f"report: {write_report(log.folder)}")


async def improve(
    learner: Learner, environment: Environment, problems: Sequence[Any], config: Config, log: RunLog
) -> None:
    """GRPO to step `grpo.steps`, with checkpoints; cancelled, it leaves one.

    With `grpo.max_lag` 1 the rollouts of step k + 1 begin as soon as the weights of step k are there, and decode while
    step k computes its gradient; the weights change once their last completion has left the engine. The last step
    generates ahead too, so that more steps later go on to the same numbers.
    """
    lag, first = config.grpo.max_lag, learner.step
    if lag:
        share_cores()
    begun: dict[int, Rollouts] = {}

    def begin(step: int) -> Rollouts:
        return Rollouts(
            face,
            environment,
            learner.tokenizer,
            draw_problems(problems, config, step),
            group_size=config.grpo.group_size,
            sampling=sampling_of(config),
            seed=config.seed * 1_000_003 + step,
        )

    async def complete() -> Experience:
        """The rollouts of the next update, all rewarded."""
        if learner.experience is None:
            learner.experience = await finished(begun[learner.step], config)
            del begun[learner.step]
        return learner.experience

    async def save() -> None:
        """A checkpoint, with the next update's rollouts where the weights that they came from are gone."""
        if lag and learner.step > first:
            await complete()
        learner.save()

    log.stage("grpo", config.grpo.steps, done=first)
    async with generator(learner.engine, own_stream=lag > 0) as face:
        try:
            with GpuMonitor() as gpu:
                while learner.step < config.grpo.steps:
                    for step in range(learner.step + (learner.experience is not None), learner.step + lag + 1):
                        begun[step] = begun.get(step) or begin(step)
                    with log.phase("generate"):
                        if learner.experience is None:
                            await begun[learner.step].generated()
                    with log.phase("execute"):
                        experience = await complete()
                    with log.phase("train"):
                        ahead = list(begun.values())
                        metrics = await update_beside(ahead, learner, log) if ahead else learner.update(log.timer)
                    with log.phase("sync"):
                        metrics |= learner.sync()
                    log.samples(learner.step, experience.records)
                    log.step(learner.step, metrics | over_ranks(experience.metrics) | gpu.take())
                    with log.phase("checkpoint"):
                        if learner.step % config.checkpoint.every == 0:
                            await save()
            if lag and learner.step > first:
                await complete()
        except asyncio.CancelledError:
            await save()
            raise
        finally:
            for rollouts in begun.values():
                await rollouts.cancel()


async def finished(rollouts: Rollouts, config: Config) -> Experience:
    """Samples, metrics and records of `rollouts`; raises UserError where every one failed for reasons of ours."""
    groups = await rollouts.groups()
    executions = [rollout.executions[-1] for group in groups for rollout in group.rollouts]
    if all(rollout.reward is None for group in groups for rollout in group.rollouts):
        raise UserError(f"every rollout of a step failed: {executions[0].error}")
    metrics = rollout_metrics(groups, rollouts.seconds)
    return Experience(to_samples(groups, config.grpo), metrics, list(sample_records(groups)))


async def update_beside(ahead: Sequence[Rollouts], learner: Learner, log: RunLog) -> dict[str, float]:
    """One update in a thread of its own; the weights change once the rollouts `ahead` need the engine no more."""

    async def generated() -> None:
        for rollouts in ahead:
            await rollouts.generated()

    def before_step() -> None:
        with log.phase("generate"):
            engine_free.result()

    loop = asyncio.get_running_loop()
    engine_free = asyncio.run_coroutine_threadsafe(generated(), loop)
    with device_thread("training") as thread:
        update = loop.run_in_executor(thread, learner.update, log.timer, before_step)
        try:
            metrics = await asyncio.shield(update)
            # An update of no sample at all waits for nobody.
            await asyncio.wrap_future(engine_free)
            return metrics
        finally:
            engine_free.cancel()
            await asyncio.gather(update, return_exceptions=True)


def draw_problems(problems: Sequence[Any], config: Config, step: int) -> list[Any]:
    """This rank's problems of `step`: consecutive pieces of endless shuffles, a function of seed and step alone."""
    rank, world = rank_and_world()
    first = step * config.grpo.prompts_per_step
    chosen: list[Any] = []
    for position in range(first + rank, first + config.grpo.prompts_per_step, world):
        epoch, index = divmod(position, len(problems))
        order = random.Random(f"{config.seed}/order/{epoch}").sample(range(len(problems)), len(problems))
        chosen.append(problems[order[index]])
    return chosen


def main() -> None:
    """Train as the command line says, or print the plan."""
    command = parse(sys.argv[1:], program="fastgrpo.train")
    if command.dry_run:
        return print_plan(command.config)
    require_ready()
    with joined_ranks():
        run_async(lambda: train(command.config, resume=command.resume))


if __name__ == "__main__":
    run_program(main)
