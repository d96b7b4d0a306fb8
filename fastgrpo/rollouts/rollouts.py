"""Rollouts: generation, workflow execution and scoring overlap, because each rollout is one coroutine of its own.

The engine decodes in a thread of its own; a finished completion resumes its rollout at once, whose workflow then runs
in a jail while the engine goes on decoding the others. A batch tells when its last completion has left the engine
(`Rollouts.generated`), so that the weights may change while its last workflows still run.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from fastgrpo.engine.tensor_parallel import Lockstep
from fastgrpo.errors import UserError
from fastgrpo.policy.chat import Chat
from fastgrpo.ranks.collectives import rank_and_world
from fastgrpo.types import Group, RewardTerms, Rollout

if TYPE_CHECKING:
    from fastgrpo.engine.engine import Completion, Engine

Result = TypeVar("Result")


class Environment(Protocol):
    """What the loop needs from a task: any object with these four methods trains with the same engine."""

    def prompt(self, problem: Any) -> str:
        """The text that the policy reads first."""

    async def execute(self, problem: Any, completion: str, seed: int) -> Any:
        """Run one completion; an object with `status` ("infrastructure" = our failure)."""

    def feedback_text(self, execution: Any) -> str:
        """What the policy reads between two rounds."""

    def rewards(self, problem: Any, executions: list[Any]) -> list[RewardTerms | None]:
        """One reward for each execution of a group, None where the failure was ours."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. `deadline_s` bounds the wait for one completion, in seconds."""

    max_new_tokens: int
    max_model_len: int
    temperature: float = 1.0
    rounds: int = 1
    deadline_s: float = 1800.0


class Generator:
    """An asyncio face for the engine's step loop: `await complete(...)` while others are decoding.

    `lockstep`: the ranks that hold the engine together; one that follows has no requests of its own.
    """

    def __init__(self, engine: Engine, thread: ThreadPoolExecutor, lockstep: Lockstep) -> None:
        self._engine, self._thread, self._lockstep, self.ranks = engine, thread, lockstep, lockstep.ranks
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._submitted: list[tuple[int, list[int], dict[str, Any]]] = []
        self._wake = asyncio.Event()
        self._next_key = 0

    async def complete(self, prompt_ids: list[int], *, deadline_s: float, **sampling: Any) -> Completion:
        """One completion; raises TimeoutError after `deadline_s` and whatever the engine raised if it failed."""
        key, self._next_key = self._next_key, self._next_key + 1
        future = self._waiting[key] = asyncio.get_running_loop().create_future()
        self._submitted.append((key, prompt_ids, sampling))
        self._wake.set()
        try:
            return await asyncio.wait_for(future, deadline_s)
        finally:
            self._waiting.pop(key, None)

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Around rollouts: a rank that follows has none, and steps the engine until the leader's are over."""
        self._lockstep.begin()
        yield
        self._lockstep.end()
        if not self._lockstep.leads:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._follow)

    async def drive(self) -> None:
        """Step the engine while requests are open; ends by cancellation, or by failing every open request."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._submitted or self._engine.busy:
                    requests, self._submitted = self._submitted, []
                    self._deliver(await loop.run_in_executor(self._thread, self._advance, requests))
            except Exception as error:
                self._fail(error)
                raise

    def _follow(self) -> None:
        while (requests := self._lockstep.hear()) is not None:
            self._advance(requests)

    def _advance(self, requests: list[tuple[int, list[int], dict[str, Any]]]) -> list[Completion]:
        self._lockstep.tell(requests)
        for key, ids, sampling in requests:
            self._engine.submit(key, ids, **sampling)
        return self._engine.step()

    def _deliver(self, completions: list[Completion]) -> None:
        for completion in completions:
            future = self._waiting.get(completion.key)
            if future is not None and not future.done():
                future.set_result(completion)

    def _fail(self, error: Exception) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)


@asynccontextmanager
async def generator(engine: Engine, *, own_stream: bool = False, ranks: int = 1) -> AsyncIterator[Generator]:
    """A `Generator` whose step loop lives as long as the block; requests still open at its end are aborted.

    `own_stream`: on a GPU the engine's kernels go before those that other threads launch meanwhile. `ranks` hold the
    engine together, and all of them enter the block.
    """
    lockstep, thread = Lockstep(ranks), device_thread("engine", own_stream=own_stream)
    face = Generator(engine, thread, lockstep)
    driver = asyncio.create_task(face.drive(), name="engine-steps")
    try:
        yield face
    finally:
        driver.cancel()
        await asyncio.gather(driver, return_exceptions=True)
        # A step under way ends first, on a rank that follows the leader's rollouts.
        thread.shutdown()
        lockstep.end()
        engine.abort_all()


def device_thread(name: str, *, own_stream: bool = False) -> ThreadPoolExecutor:
    """One thread on this one's GPU and stream, which torch keeps for each thread apart, or on a prior stream."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(1, thread_name_prefix=name)
    device = torch.cuda.current_device()
    stream = torch.cuda.Stream(priority=-1) if own_stream else torch.cuda.current_stream()

    def begin() -> None:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream)

    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=begin)


class Rollouts:
    """`group_size` rollouts of each problem, under way at once; deterministic draws from `seed`."""

    def __init__(
        self,
        face: Generator,
        environment: Environment,
        chat: Chat,
        problems: Sequence[Any],
        *,
        group_size: int,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self._face, self._environment, self._chat, self._sampling = face, environment, chat, sampling
        self._size, self._writing = group_size, len(problems) * group_size
        self._generated = asyncio.Event()
        self._begun, self.seconds = time.perf_counter(), 0.0
        # Numbers as if one replica had all problems, dealt out in turn: no two share one, whatever their number.
        replica, replicas = (number // face.ranks for number in rank_and_world())
        named = [(problem, f"{seed}/{replica + replicas * number}") for number, problem in enumerate(problems)]
        self._task = asyncio.create_task(self._groups(named))
        self._task.add_done_callback(lambda _: self._generated.set())

    async def generated(self) -> None:
        """Wait until no rollout needs the engine any more, `seconds` after they began; raises what one raised."""
        await self._generated.wait()
        if self._task.done():
            self._task.result()

    async def groups(self) -> list[Group]:
        """Wait for all rewards; a cancelled wait leaves the rollouts running."""
        return await asyncio.shield(self._task)

    async def cancel(self) -> None:
        """Drop the rollouts that are not done."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _groups(self, named: Sequence[tuple[Any, str]]) -> list[Group]:
        async with self._face.shared():
            return await _all(self._group(problem, name) for problem, name in named)

    async def _group(self, problem: Any, name: str) -> Group:
        prompt, sampling = self._chat.prompt_ids(self._environment.prompt(problem)), self._sampling
        if len(prompt) + sampling.max_new_tokens > sampling.max_model_len:
            raise UserError(
                f"the prompt of {problem.id} has {len(prompt)} tokens: with grpo.max_new_tokens ="
                f" {sampling.max_new_tokens} it does not fit engine.max_model_len = {sampling.max_model_len};"
                " raise it or leave the problem out"
            )
        seeds = [random.Random(f"{name}/{member}").getrandbits(31) for member in range(self._size)]
        rollouts = await _all(self._rollout(problem, prompt, seed) for seed in seeds)
        terms = self._environment.rewards(problem, [rollout.executions[-1] for rollout in rollouts])
        for rollout, term in zip(rollouts, terms, strict=True):
            rollout.reward = term
        return Group(problem, rollouts)

    async def _rollout(self, problem: Any, prompt: list[int], seed: int) -> Rollout:
        """One trajectory: write, run, read the feedback, write again. Feedback tokens are not the policy's: mask 0."""
        rollout = Rollout(list(prompt), [0] * len(prompt), [0.0] * len(prompt), [], [])
        last = False
        while not last:
            turn = len(rollout.completions)
            await self._write(rollout, seed + turn)
            last = turn + 1 == self._sampling.rounds
            if last:
                self._written()
            execution = await self._environment.execute(problem, rollout.completions[-1], seed + turn)
            rollout.executions.append(execution)
            if not last and not self._continued(rollout):
                last = True
                self._written()
        return rollout

    async def _write(self, rollout: Rollout, seed: int) -> None:
        """One completion of the policy's, appended."""
        sampling = self._sampling
        completion = await self._face.complete(
            rollout.token_ids,
            deadline_s=sampling.deadline_s,
            max_tokens=min(sampling.max_new_tokens, sampling.max_model_len - len(rollout.token_ids)),
            temperature=sampling.temperature,
            seed=seed,
            stop_token_ids=self._chat.stop_token_ids,
        )
        _extend(rollout, completion.token_ids, 1, completion.logprobs)
        rollout.truncated = completion.finish_reason == "length"
        rollout.completions.append(self._chat.text(completion.token_ids))

    def _continued(self, rollout: Rollout) -> bool:
        """The last execution's feedback appended; False where our own failure or the length ends the rollout."""
        execution = rollout.executions[-1]
        if execution.status == "infrastructure":
            return False
        text = self._environment.feedback_text(execution)
        feedback = self._chat.feedback_ids(text, rollout.token_ids[-1])
        if len(rollout.token_ids) + len(feedback) >= self._sampling.max_model_len:
            return False
        _extend(rollout, feedback, 0, [0.0] * len(feedback))
        return True

    def _written(self) -> None:
        """One rollout more has no further use of the engine."""
        self._writing -= 1
        if self._writing == 0:
            self.seconds = time.perf_counter() - self._begun
            self._generated.set()


async def collect(
    engine: Engine,
    environment: Environment,
    chat: Chat,
    problems: Sequence[Any],
    *,
    group_size: int,
    sampling: Sampling,
    seed: int,
    ranks: int = 1,
) -> list[Group]:
    """One batch of `Rollouts` from an engine that nobody else uses meanwhile, held by `ranks` together."""
    async with generator(engine, ranks=ranks) as face:
        rollouts = Rollouts(face, environment, chat, problems, group_size=group_size, sampling=sampling, seed=seed)
        try:
            return await rollouts.groups()
        finally:
            await rollouts.cancel()


async def _all(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in order; the first failure cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _extend(rollout: Rollout, token_ids: Sequence[int], mask: int, logprobs: Sequence[float]) -> None:
    rollout.token_ids.extend(token_ids)
    rollout.loss_mask.extend([mask] * len(token_ids))
    rollout.logprobs.extend(logprobs)
