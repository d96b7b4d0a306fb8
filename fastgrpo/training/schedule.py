"""The rollouts of coming updates: with `grpo.max_lag` 1 they decode while the present one computes its gradient."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastgrpo.config import Config
from fastgrpo.errors import UserError
from fastgrpo.record.log import RunLog
from fastgrpo.rollouts.experience import Experience, rollout_metrics, sample_records
from fastgrpo.rollouts.rollouts import Environment, Generator, Rollouts, device_thread, generator
from fastgrpo.runtime import sampling_of, share_cores
from fastgrpo.training.learner import Learner, to_samples


class Ahead:
    """The rollouts under way for a learner's next updates, at most `grpo.max_lag` further than the next one.

    Those of update k + 1 begin as soon as the weights of update k are there, and the weights change once their last
    completion has left the engine. A checkpoint holds them, because the weights that they came from are gone.
    """

    def __init__(
        self,
        face: Generator,
        learner: Learner,
        environment: Environment,
        draw: Callable[[int], list[Any]],
        config: Config,
    ) -> None:
        self._face, self._learner, self._environment, self._draw = face, learner, environment, draw
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
        """The next update's rollouts, all rewarded. Raises UserError where every one failed for reasons of ours."""
        learner = self._learner
        if learner.experience is None:
            learner.experience = await _finished(self._begun[learner.step], self._config)
            del self._begun[learner.step]
        return learner.experience

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

    def _begin(self, step: int) -> Rollouts:
        return Rollouts(
            self._face,
            self._environment,
            self._learner.chat,
            self._draw(step),
            group_size=self._config.grpo.group_size,
            sampling=sampling_of(self._config),
            seed=self._config.seed * 1_000_003 + step,
        )


@asynccontextmanager
async def rollouts_ahead(
    learner: Learner, environment: Environment, draw: Callable[[int], list[Any]], config: Config
) -> AsyncIterator[Ahead]:
    """`Ahead` over the learner's engine, which nobody else may use meanwhile; `draw(step)` gives a step's problems."""
    lag = config.grpo.max_lag
    if lag:
        share_cores()
    async with generator(learner.engine, own_stream=lag > 0, ranks=config.engine.tensor_parallel) as face:
        ahead = Ahead(face, learner, environment, draw, config)
        try:
            yield ahead
        finally:
            await ahead.cancel()


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


async def _finished(rollouts: Rollouts, config: Config) -> Experience:
    groups = await rollouts.groups()
    if not groups:
        return Experience([], {}, [])
    executions = [rollout.executions[-1] for group in groups for rollout in group.rollouts]
    if all(rollout.reward is None for group in groups for rollout in group.rollouts):
        raise UserError(f"every rollout of a step failed: {executions[0].error}")
    metrics = rollout_metrics(groups, rollouts.seconds)
    return Experience(to_samples(groups, config.grpo), metrics, list(sample_records(groups)))
