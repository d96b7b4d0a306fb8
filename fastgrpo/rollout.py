"""Rollouts: generation, workflow execution and scoring overlap, because each rollout is one coroutine of its own.

The engine decodes in a thread of its own; a finished completion resumes its rollout at once, whose workflow then runs
in a jail while the engine goes on decoding the others.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastgrpo.chat import feedback_ids, prompt_ids
from fastgrpo.errors import UserError
from fastgrpo.types import Group, RewardTerms, Rollout

if TYPE_CHECKING:
    from fastgrpo.engine import Completion, Engine

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
    """An asyncio face for the engine's step loop: `await complete(...)` while others are decoding."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
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

    async def drive(self) -> None:
        """Step the engine while requests are open; ends by cancellation, or by failing every open request."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
            while True:
                await self._wake.wait()
                self._wake.clear()
                try:
                    while self._submitted or self._engine.busy:
                        requests, self._submitted = self._submitted, []
                        self._deliver(await loop.run_in_executor(thread, self._advance, requests))
                except Exception as error:
                    self._fail(error)
                    raise

    def _advance(self, requests: list[tuple[int, list[int], dict[str, Any]]]) -> list[Completion]:
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
async def generator(engine: Engine) -> AsyncIterator[Generator]:
    """A `Generator` whose step loop lives as long as the block; requests still open at its end are aborted."""
    face = Generator(engine)
    driver = asyncio.create_task(face.drive(), name="engine-steps")
    try:
        yield face
    finally:
        driver.cancel()
        await asyncio.gather(driver, return_exceptions=True)
        engine.abort_all()


async def collect(
    engine: Engine,
    environment: Environment,
    tokenizer: Any,
    problems: Sequence[Any],
    *,
    group_size: int,
    sampling: Sampling,
    seed: int,
) -> list[Group]:
    """`group_size` rollouts of each problem, rewarded; deterministic draws from `seed`."""
    async with generator(engine) as face:
        return await _all(
            _group(face, environment, tokenizer, problem, group_size, sampling, f"{seed}/{number}")
            for number, problem in enumerate(problems)
        )


async def _all(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in order; the first failure cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _group(
    face: Generator,
    environment: Environment,
    tokenizer: Any,
    problem: Any,
    size: int,
    sampling: Sampling,
    name: str,
) -> Group:
    prompt = prompt_ids(tokenizer, environment.prompt(problem))
    if len(prompt) + sampling.max_new_tokens > sampling.max_model_len:
        raise UserError(
            f"the prompt of {problem.id} has {len(prompt)} tokens: with grpo.max_new_tokens = {sampling.max_new_tokens}"
            f" it does not fit engine.max_model_len = {sampling.max_model_len}; raise it or leave the problem out"
        )
    seeds = [random.Random(f"{name}/{member}").getrandbits(31) for member in range(size)]
    rollouts = await _all(_rollout(face, environment, tokenizer, problem, prompt, sampling, seed) for seed in seeds)
    terms = environment.rewards(problem, [rollout.executions[-1] for rollout in rollouts])
    for rollout, term in zip(rollouts, terms, strict=True):
        rollout.reward = term
    return Group(problem, rollouts)


async def _rollout(
    face: Generator,
    environment: Environment,
    tokenizer: Any,
    problem: Any,
    prompt: list[int],
    sampling: Sampling,
    seed: int,
) -> Rollout:
    """One trajectory: write, run, read the feedback, write again. Feedback tokens are not the policy's: mask 0."""
    rollout = Rollout(list(prompt), [0] * len(prompt), [0.0] * len(prompt), [], [])
    for turn in range(sampling.rounds):
        room = min(sampling.max_new_tokens, sampling.max_model_len - len(rollout.token_ids))
        completion = await face.complete(
            rollout.token_ids,
            deadline_s=sampling.deadline_s,
            max_tokens=room,
            temperature=sampling.temperature,
            seed=seed + turn,
            stop_token_ids=[tokenizer.eos_token_id],
        )
        _extend(rollout, completion.token_ids, 1, completion.logprobs)
        rollout.truncated = completion.finish_reason == "length"
        rollout.completions.append(tokenizer.decode(completion.token_ids, skip_special_tokens=True))
        rollout.executions.append(await environment.execute(problem, rollout.completions[-1], seed + turn))
        if turn + 1 == sampling.rounds or rollout.executions[-1].status == "infrastructure":
            break
        feedback = feedback_ids(tokenizer, environment.feedback_text(rollout.executions[-1]), rollout.token_ids[-1])
        if len(rollout.token_ids) + len(feedback) >= sampling.max_model_len:
            break
        _extend(rollout, feedback, 0, [0.0] * len(feedback))
    return rollout


def _extend(rollout: Rollout, token_ids: Sequence[int], mask: int, logprobs: Sequence[float]) -> None:
    rollout.token_ids.extend(token_ids)
    rollout.loss_mask.extend([mask] * len(token_ids))
    rollout.logprobs.extend(logprobs)
