"""When rollouts happen: with `grpo.max_lag` 1 those of the next update decode while this one computes its gradient."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch

from fastgrpo.config import Config
from fastgrpo.errors import UserError
from fastgrpo.ranks.collectives import gather_all, rank_and_world
from fastgrpo.record.log import RunLog
from fastgrpo.rollouts.agents import Agent
from fastgrpo.rollouts.environment import Environment
from fastgrpo.rollouts.experience import Experience, Tally, first_failure, over_ranks, sample_records, tally_of, varies
from fastgrpo.rollouts.generator import Generator, device_thread, open_generator
from fastgrpo.rollouts.rollouts import Rollouts
from fastgrpo.rollouts.sampling import Sampling
from fastgrpo.training.learner import Learner, to_samples
from fastgrpo.training.shaping import shape_rewards
from fastgrpo.types import Group


class Schedule:
    """The rollouts under way for a learner's next updates, at most `grpo.max_lag` further than the next one.

    Those of update k + 1 begin as soon as the weights of update k are there, and the weights change once their last
    completion has left the engine. A checkpoint holds them, because the weights that they came from are gone.
    """

    def __init__(
        self,
        generator: Generator,
        learner: Learner,
        environment: Environment | Agent,
        draw: Callable[[int, int], list[Any]],
        config: Config,
    ) -> None:
        self._generator, self._learner, self._environment, self._draw = generator, learner, environment, draw
        self._config, self._first = config, learner.step
        self._begun: dict[int, Rollouts] = {}

    async def generated(self) -> None:
        """Begin the rollouts that are due and wait until the next update's need the engine no more."""
        learner = self._learner
        known = learner.experience is not None
        for step in range(learner.step + known, learner.step + self._config.grpo.max_lag + 1):
            self._begun[step] = self._begun.get(step) or self._begin(step)
        if not known:
            await self._begun[learner.step].generated()

    async def experience(self) -> Experience:
        """The next update's rollouts, all with their results."""
        learner = self._learner
        if learner.experience is None:
            learner.experience = await self._finished(learner.step)
            del self._begun[learner.step]
        return learner.experience

    async def tally(self, experience: Experience) -> Tally:
        """The numbers of all ranks' rollouts of the next update.

        Raises UserError, after a checkpoint, where the environment failed more of them than `grpo.max_infrastructure`.
        """
        tally, limit = over_ranks(experience.tally), self._config.grpo.max_infrastructure
        failed, rollouts = tally.sums["infrastructure"], tally.sums["rollouts"]
        if failed <= limit * rollouts and failed < rollouts:
            if self._config.grpo.curriculum:
                self._learner.curriculum.add(tally.passes)
            return tally
        reasons = gather_all(experience.failure, "the other ranks' failures")
        # A resumed run draws these rollouts anew.
        self._learner.experience = None
        self._learner.save()
        raise UserError(
            f"{failed:.0f} of {rollouts:.0f} rollouts of a step failed for a reason that is not the policy's: "
            f"{next(filter(None, reasons))} (grpo.max_infrastructure is {limit:g}); mend it, continue with --resume"
        )

    async def update(self, log: RunLog) -> dict[str, float]:
        """The learner's update on these rollouts; returns its metrics."""
        if not self._begun:
            return self._learner.update(log.timer)
        return await update_beside(list(self._begun.values()), self._learner, log)

    async def save(self) -> None:
        """A checkpoint from which a resumed run goes on to the same numbers."""
        await self.settle()
        self._learner.save()

    async def settle(self) -> None:
        """Finish the next update's rollouts where the weights that they came from are gone."""
        if self._config.grpo.max_lag and self._learner.step > self._first:
            await self.experience()

    async def cancel(self) -> None:
        """Drop what is under way."""
        for rollouts in self._begun.values():
            await rollouts.cancel()

    async def _finished(self, step: int) -> Experience:
        """The step's rollouts with their results, and those that replace its groups without variance.

        Every replica replaces its own, in rounds that all ranks begin together, until no group is lacking anywhere or
        `grpo.refill` rounds are over (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2).
        """
        batches = [self._begun[step]]
        groups = await self._rewarded(batches[0])
        wanted, leader = len(groups), rank_and_world()[0] // self._generator.ranks * self._generator.ranks
        for extra in range(1, self._config.grpo.refill + 1):
            lacking = gather_all(wanted - sum(map(varies, groups)), "the groups that the other ranks lack")
            if not any(lacking):
                break
            if lacking[leader]:
                self._begun[step] = self._begin(step, extra, lacking[leader])
                batches.append(self._begun[step])
                groups = groups + await self._rewarded(batches[-1])
        return self._experience(groups, batches, refilled=len(groups) - wanted)

    async def _rewarded(self, rollouts: Rollouts) -> list[Group]:
        groups = await rollouts.groups()
        shape_rewards(groups, self._config.grpo)
        return groups

    def _experience(self, groups: list[Group], batches: Sequence[Rollouts], refilled: int) -> Experience:
        # A rank without groups has its part in it too: a batch's deviation is that of all ranks.
        samples = to_samples(groups, self._config.grpo)
        if not groups:
            return Experience([], Tally(), [])
        seconds, last = max(batch.waited for batch in batches)
        waited = seconds, f"rank {rank_and_world()[0]}: {last}"
        tally = tally_of(groups, sum(batch.seconds for batch in batches), waited)
        if self._config.grpo.refill:
            tally.sums["groups_refilled"] = float(refilled)
        return Experience(samples, tally, list(sample_records(groups)), first_failure(groups))

    def _begin(self, step: int, extra: int = 0, most: int | None = None) -> Rollouts:
        """The step's rollouts; with `extra`, those of `most` problems of its further batch of that number."""
        seed = self._config.seed * 1_000_003 + step
        return Rollouts(
            self._generator,
            self._environment,
            self._learner.chat,
            self._draw(step, extra)[:most],
            group_size=self._config.grpo.group_size,
            sampling=Sampling.of(self._config),
            seed=f"{seed}/refill/{extra}" if extra else str(seed),
        )


@asynccontextmanager
async def open_schedule(
    learner: Learner, environment: Environment | Agent, draw: Callable[[int, int], list[Any]], config: Config
) -> AsyncIterator[Schedule]:
    """A `Schedule` over the learner's engine, which nobody else may use meanwhile.

    `draw(step, 0)`: the step's problems; `draw(step, extra)`: those of its further batches, from 1 to `grpo.refill`.
    """
    lag = config.grpo.max_lag
    if lag:
        share_cores()
    async with open_generator(learner.engine, own_stream=lag > 0, ranks=config.engine.tensor_parallel) as generator:
        schedule = Schedule(generator, learner, environment, draw, config)
        try:
            yield schedule
        finally:
            await schedule.cancel()


async def update_beside(under_way: Sequence[Rollouts], learner: Learner, log: RunLog) -> dict[str, float]:
    """One update in a thread of its own; the weights change once the rollouts `under_way` need the engine no more."""

    async def generated() -> None:
        for rollouts in under_way:
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


def share_cores() -> None:
    """Without a GPU: half the cores for training, as many as the engine takes (`Engine`), since both work at once."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
