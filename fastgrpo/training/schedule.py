"""When rollouts happen: with `grpo.max_lag` those of the next updates decode while this one computes its gradient."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import torch

from fastgrpo.config import Config
from fastgrpo.errors import UserError
from fastgrpo.ranks.collectives import gather_all, rank_and_world, replica_leader
from fastgrpo.record.log import RunLog
from fastgrpo.rollouts.environment import Agent, Environment, at_step
from fastgrpo.rollouts.experience import (
    Experience,
    Tally,
    add_lag,
    add_passes,
    sample_records,
    tally_of,
    tally_over_ranks,
    varies,
)
from fastgrpo.rollouts.generator import Generator, device_thread, open_generator
from fastgrpo.rollouts.rollouts import Rollouts
from fastgrpo.training.advantage import shape_rewards, to_samples
from fastgrpo.training.learner import Learner
from fastgrpo.types import Group, Sampling


class Schedule:
    """The rollouts under way for a learner's next updates, at most `grpo.max_lag` further than the next one.

    Those of update k + `max_lag` begin as soon as the weights of update k are there, so that no token is older. The
    weights change once the last completion of all that are under way has left the engine; with `grpo.in_flight` at the
    next pause between two of its steps. A checkpoint holds those that earlier weights have a part in, because those
    weights are gone; it is begun before they are done, and they join it when they are.
    """

    def __init__(
        self,
        generator: Generator,
        learner: Learner,
        environment: Environment | Agent,
        draw: Callable[[int, int], list[Any]],
        config: Config,
    ) -> None:
        # By which others may draw, too, between two updates: the weights change in none of them.
        self.generator = generator
        self._learner, self._environment, self._draw = learner, environment, draw
        self._config = config
        # By step, with the number of updates behind the weights that they began with.
        self._begun: dict[int, tuple[Rollouts, int]] = {}
        # Checkpoints that rollouts are still to join, with the step of the last of these and what has come so far.
        self._lacking: list[tuple[int, int, list[Experience]]] = []
        self._synced: dict[str, float] = {}
        # Of the next update's rollouts.
        self._passes: dict[str, tuple[float, float]] = {}

    async def generated(self) -> None:
        """Begin the rollouts that are due and wait until the next update's need the engine no more."""
        self._begin_due()
        if not self._learner.experiences:
            await self._begun[self._learner.step][0].generated()

    async def experience(self) -> Experience:
        """The next update's rollouts, all with their results."""
        learner = self._learner
        if not learner.experiences:
            await self._finish(learner.step)
        return learner.experiences[0]

    async def tally(self, experience: Experience) -> Tally:
        """The numbers of all ranks' rollouts of the next update.

        Raises UserError, after a checkpoint, where the environment failed more of them than `grpo.max_infrastructure`.
        """
        tally, limit = tally_over_ranks(experience.tally), self._config.grpo.max_infrastructure
        failed, rollouts = tally.sums["infrastructure"], tally.sums["rollouts"]
        if failed <= limit * rollouts and failed < rollouts:
            self._passes = tally.passes
            return tally
        # A resumed run draws these rollouts, and what came after them, again: a checkpoint may hold them by now.
        self._learner.experiences.clear()
        self._lacking.clear()
        self._learner.save(anew=True)
        raise UserError(
            f"{failed:.0f} of {rollouts:.0f} rollouts of a step failed for a reason that is not the policy's: "
            f"{tally.failure} (grpo.max_infrastructure is {limit:g}); mend it, continue with --resume"
        )

    async def update(self, log: RunLog) -> dict[str, float]:
        """The learner's update on these rollouts; returns its metrics."""
        step = self._learner.step
        try:
            if not self._begun:
                return self._learner.update(log.timer)
            return await update_beside(self._engine_free, self._learner, log)
        finally:
            # An interrupted update may have changed the weights all the same.
            made = self._learner.step > step
            if made:
                self._learner.curriculum.add(self._passes)
            if self.generator.paused:
                with log.phase("sync"):
                    self._synced = self._go_on(sync=made)

    def sync(self) -> dict[str, float]:
        """The learner's sync after an update, where it has not been made under way; returns its metrics."""
        return self._synced if self._config.grpo.in_flight else self._learner.sync()

    async def save(self) -> None:
        """Begin a checkpoint: returns when the state is copied, while rollouts go on and those that are due begin.

        What earlier weights have a part in joins it when it is done; from then on a resumed run goes on to the same
        numbers, with `grpo.in_flight` unset. One that was killed before draws those rollouts anew.
        """
        learner = self._learner
        if self._config.grpo.in_flight:
            # Parity can be checked where the engine has nothing to do.
            for rollouts, _ in self._begun.values():
                await rollouts.generated()
            await self.generator.pause()
            self._go_on(sync=True)
        if earlier := [step for step, (_, version) in self._begun.items() if version < learner.step]:
            self._lacking.append((learner.step, max(earlier), list(learner.experiences)))
        # Ranks that hold one vLLM together would decode and copy by collectives of two threads.
        if learner.step < self._config.grpo.steps and self.generator.ranks == 1:
            self._begin_due()
        # This ends with the thread, also where it is cancelled: nothing changes the weights that are being copied.
        with device_thread("checkpoint") as thread:
            await asyncio.get_running_loop().run_in_executor(thread, learner.save)

    async def settle(self) -> None:
        """Finish the rollouts that weights before the present ones have a part in."""
        for step in sorted(self._begun):
            if self._begun[step][1] < self._learner.step:
                await self._finish(step)

    async def cancel(self) -> None:
        """Drop what is under way."""
        for rollouts, _ in self._begun.values():
            await rollouts.cancel()

    async def _engine_free(self) -> None:
        """Wait until the weights may change."""
        if self._config.grpo.in_flight:
            return await self.generator.pause()
        for rollouts, _ in list(self._begun.values()):
            await rollouts.generated()

    def _go_on(self, *, sync: bool) -> dict[str, float]:
        """End the engine's pause, with new weights where `sync`; returns the sync's metrics."""
        try:
            return self._learner.sync() if sync else {}
        finally:
            self.generator.resume()

    def _begin_due(self) -> None:
        learner = self._learner
        for step in range(learner.step + len(learner.experiences), learner.step + self._config.grpo.max_lag + 1):
            self._begun[step] = self._begun.get(step) or (self._begin(step), learner.step)

    async def _finish(self, step: int) -> None:
        """Wait for the rollouts of `step`, which come after those that the learner and checkpoints have."""
        experience = await self._finished(step)
        del self._begun[step]
        self._learner.experiences.append(experience)
        for _, _, joined in self._lacking:
            joined.append(experience)
        complete = [(saved, joined) for saved, last, joined in self._lacking if last == step]
        self._lacking = self._lacking[len(complete) :]
        for saved, joined in complete:
            self._learner.join(saved, joined)

    async def _finished(self, step: int) -> Experience:
        """The step's rollouts with their results, and those that replace its groups without variance.

        Every replica replaces its own, in rounds that all ranks begin together, until no group is lacking anywhere or
        `grpo.refill` rounds are over (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2).
        """
        batches = [self._begun[step][0]]
        groups = await self._rewarded(batches[0])
        wanted, leader = len(groups), replica_leader(self.generator.ranks)
        for extra in range(1, self._config.grpo.refill + 1):
            lacking = gather_all(
                wanted - sum(varies(group, by_terms=self._by_terms) for group in groups),
                "the groups that the other ranks lack",
            )
            if not any(lacking):
                break
            if lacking[leader]:
                batches.append(self._begin(step, extra, lacking[leader]))
                self._begun[step] = batches[-1], self._learner.step
                groups = groups + await self._rewarded(batches[-1])
        return self._experience(step, groups, batches, refilled=len(groups) - wanted)

    @property
    def _by_terms(self) -> bool:
        return self._config.grpo.reward_scale == "terms"

    async def _rewarded(self, rollouts: Rollouts) -> list[Group]:
        groups = await rollouts.groups()
        shape_rewards(groups, self._config.grpo)
        return groups

    def _experience(self, step: int, groups: list[Group], batches: Sequence[Rollouts], refilled: int) -> Experience:
        # A rank without groups has its part in it too: a batch's deviation is that of all ranks.
        samples = to_samples(groups, self._config.grpo)
        if not groups:
            return Experience([], Tally(), [])
        seconds, last = max(batch.waited for batch in batches)
        waited = seconds, f"rank {rank_and_world()[0]}: {last}"
        seconds = sum(batch.seconds for batch in batches)
        tally = tally_of(groups, seconds, waited, by_terms=self._by_terms)
        tails = [batch.after_answers for batch in batches if batch.after_answers is not None]
        if tails:
            tally.peaks["tail_after_answers_s"] = max(tails)
        if self._config.grpo.straggler_s:
            tally.sums["stragglers"] = float(sum(batch.stragglers for batch in batches))
        if self._config.grpo.refill:
            tally.sums["groups_refilled"] = float(refilled)
        if self._config.grpo.max_lag:
            add_lag(tally, groups, step)
        if self._config.grpo.curriculum:
            add_passes(tally, groups)
        return Experience(samples, tally, list(sample_records(groups)))

    def _begin(self, step: int, extra: int = 0, most: int | None = None) -> Rollouts:
        """The step's rollouts; with `extra`, those of `most` problems of its further batch of that number."""
        seed = self._config.seed * 1_000_003 + step
        return Rollouts(
            self.generator,
            at_step(self._environment, step),
            self._learner.chat,
            self._draw(step, extra)[:most],
            group_size=self._config.grpo.group_size,
            sampling=Sampling.of(self._config),
            seed=f"{seed}/refill/{extra}" if extra else str(seed),
            paired=True,
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
        with nothing_here_garbage():
            try:
                yield schedule
            finally:
                await schedule.cancel()


async def update_beside(engine_free: Callable[[], Awaitable[None]], learner: Learner, log: RunLog) -> dict[str, float]:
    """One update in a thread of its own; the weights change once `engine_free`, awaited when all else is done, allows.

    It has been awaited when this returns, whether or not the update changed anything. Cancelled where the update is
    made all the same, this returns its metrics, and the caller is cancelled at its next `await`.
    """
    asked, loop, free = asyncio.Event(), asyncio.get_running_loop(), Future[None]()

    async def waited() -> None:
        await asked.wait()
        await engine_free()

    def tell(waiting: asyncio.Task[None]) -> None:
        if waiting.cancelled():
            free.cancel()
        elif error := waiting.exception():
            free.set_exception(error)
        else:
            free.set_result(None)

    def before_step() -> None:
        loop.call_soon_threadsafe(asked.set)
        with log.phase("generate"):
            free.result()

    waiting = asyncio.create_task(waited())
    waiting.add_done_callback(tell)
    with device_thread("training") as thread:
        update = loop.run_in_executor(thread, learner.update, log.timer, before_step)
        try:
            metrics = await asyncio.shield(update)
            # An update of no sample at all waits for nobody.
            asked.set()
            with log.phase("generate"):
                await asyncio.shield(waiting)
            return metrics
        except BaseException as error:
            waiting.cancel()
            await asyncio.gather(update, waiting, return_exceptions=True)
            task, lost = asyncio.current_task(), update.cancelled() or update.exception()
            if lost or task is None or not isinstance(error, asyncio.CancelledError):
                raise
            if waiting.cancelled():
                await engine_free()
            task.cancel()
            return update.result()


@contextmanager
def nothing_here_garbage() -> Iterator[None]:
    """Collections of garbage pass over all that is there at the beginning of the block.

    The event loop stands still in a collection, and all rollouts with it: a quarter of a second where all of torch,
    transformers and the problems is looked through.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def share_cores() -> None:
    """Without a GPU: half the cores for training, as many as the engine takes (`Engine`), since both work at once."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
