"""Rollouts: generation, execution and scoring overlap, because each rollout is one coroutine of its own.

The engine decodes in a thread of its own; a finished completion resumes its rollout at once, which the environment then
executes while the engine goes on decoding the others. A batch tells when its last completion has left the engine
(`Rollouts.generated`), so that the weights may change while the last executions still run.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastgrpo.errors import UserError
from fastgrpo.policy.chat import Chat
from fastgrpo.ranks.collectives import rank_and_world
from fastgrpo.rollouts.asking import all_of, ask
from fastgrpo.rollouts.endpoint import Endpoint
from fastgrpo.rollouts.environment import (
    Agent,
    Environment,
    EnvironmentFailure,
    checked_results,
    failed,
    name_of,
    prompt_of,
)
from fastgrpo.rollouts.generator import Generator, open_generator
from fastgrpo.rollouts.prompts import room_for_prompts
from fastgrpo.rollouts.session import FirstPrompts, Session
from fastgrpo.types import UNENDED, Group, Rollout, Sampling

if TYPE_CHECKING:
    from fastgrpo.engine.completion import Completion
    from fastgrpo.engine.opening import AnyEngine


class Rollouts:
    """`group_size` rollouts of each problem, under way at once; deterministic draws from `seed`.

    The policy draws each completion from a seed of its own. With `paired` the environment executes all of a group with
    one seed: what it draws by seed is then alike for all of them (common random numbers), and their rewards differ by
    what the policy wrote. The mean gradient stays what it was, because the seed does not depend on the completions.
    """

    def __init__(
        self,
        generator: Generator,
        environment: Environment | Agent,
        chat: Chat,
        problems: Sequence[Any],
        *,
        group_size: int,
        sampling: Sampling,
        seed: int | str,
        paired: bool = False,
    ) -> None:
        self._generator = generator
        # With an agent there is `_endpoint`, and rollouts are `_acted`.
        self._environment: Any = environment
        self._chat, self._sampling = chat, sampling
        self._size, self._writing = group_size, len(problems) * group_size
        self._paired = paired
        self._generated = asyncio.Event()
        self._begun = time.perf_counter()
        # From the beginning until the last completion had left the engine.
        self.seconds = 0.0
        # The seconds from then until the last rollout had its result, and that rollout's problem.
        self.waited = (0.0, "")
        # The part of those after the last answer of a service that a rollout asked (`Result.answered_at`), None where
        # none was asked. Groups that lost a straggler do not count: nobody knows whether it still waited for an answer.
        self.after_answers: float | None = None
        self._answered_at: float | None = None
        self._executing: set[asyncio.Timeout] = set()
        # How many executions were dropped.
        self.stragglers, self._dropping = 0, False
        self._endpoint: Endpoint | None = None
        self._first_prompts = FirstPrompts(chat)
        # Numbers as if one replica had all problems, dealt out in turn: no two share one, whatever their number.
        replica, replicas = (number // generator.ranks for number in rank_and_world())
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
        async with self._generator.shared():
            if named and isinstance(self._environment, Agent):
                self._endpoint = await self._generator.endpoint()
            return await all_of(self._group(problem, name) for problem, name in named)

    async def _group(self, problem: Any, name: str) -> Group:
        """The rollouts of one problem with their results; a failure of the environment is theirs, never the run's."""
        try:
            prompt, ids = self._opening(problem)
        except EnvironmentFailure as error:
            for _ in range(self._size):
                self._written()
            result = failed(f"problem {name_of(problem)}: {error}")
            return Group(problem, "", [Rollout([], [], [], [], result=result) for _ in range(self._size)])
        seeds = [random.Random(f"{name}/{member}").getrandbits(31) for member in range(self._size)]
        rollouts = await all_of(
            self._rollout(problem, ids, seed, seeds[0] if self._paired else seed)
            if self._endpoint is None
            else self._acted(problem, self._endpoint, seed)
            for seed in seeds
        )
        await self._score(problem, [rollout for rollout in rollouts if rollout.result is UNENDED])
        self._note_end(problem, rollouts)
        return Group(problem, prompt, rollouts)

    def _opening(self, problem: Any) -> tuple[str | list[dict[str, str]], list[int]]:
        """The problem's prompt and its ids. Raises EnvironmentFailure where none that leaves room for a completion.

        `prompts_fit` has asked for all prompts, but not for those of an environment that changes with the step. An
        agent has no ids yet: its endpoint answers a request that does not fit.
        """
        try:
            prompt = prompt_of(self._environment.prompt, problem)
            if self._endpoint is not None:
                return prompt, []
            ids = self._chat.prompt_ids(prompt)
        except UserError as error:
            raise EnvironmentFailure(str(error)) from error
        if not 0 < len(ids) <= self._sampling.prompt_tokens:
            raise EnvironmentFailure(f"its prompt has {len(ids)} tokens, and {room_for_prompts(self._sampling)}")
        return prompt, ids

    def _note_end(self, problem: Any, rollouts: list[Rollout]) -> None:
        """The group of `problem` has its results: how long the batch waited, should it be the last."""
        answered = [r.result.answered_at for r in rollouts if r.result.answered_at is not None]
        self._answered_at = max([*answered, self._answered_at or 0.0]) or None
        if not self._generated.is_set():
            return
        now, written = time.perf_counter(), self._begun + self.seconds
        self.waited = now - written, name_of(problem)
        if self._answered_at is not None and not self._dropping:
            self.after_answers = now - max(written, self._answered_at)

    async def _score(self, problem: Any, rollouts: list[Rollout]) -> None:
        """Give each of the `rollouts`, which have ended, its result."""
        if not rollouts:
            return
        try:
            answer = await self._ask(self._environment.results, problem, rollouts)
            results = checked_results(answer, len(rollouts))
        except EnvironmentFailure as error:
            results = [failed(f"problem {name_of(problem)}: {error}")] * len(rollouts)
        for rollout, result in zip(rollouts, results, strict=True):
            rollout.result = result

    async def _rollout(self, problem: Any, prompt: list[int], seed: int, execution_seed: int) -> Rollout:
        """One trajectory: write, run, read the feedback, write again. Feedback tokens are not the policy's: mask 0."""
        rollout = Rollout([], [], [], [])
        rollout.extend(prompt, 0)
        writing = True
        try:
            while writing:
                turn = len(rollout.executions)
                await self._write(rollout, seed + turn)
                writing = turn + 1 < self._sampling.rounds
                if not writing:
                    self._written()
                rollout.executions.append(
                    await self._ask(self._environment.execute, problem, rollout.completions[-1], execution_seed + turn)
                )
                if writing and not await self._continued(rollout):
                    writing = False
                    self._written()
        except EnvironmentFailure as error:
            rollout.result = failed(f"problem {name_of(problem)}: {error}")
            if writing:
                self._written()
        return rollout

    async def _acted(self, problem: Any, endpoint: Endpoint, seed: int) -> Rollout:
        """One trajectory that an agent drives, with all that the policy wrote in it; raises what the engine raised.

        The engine is free of it when the agent has ended.
        """
        reason, execution = "", None
        try:
            session = Session(self._complete, self._chat, self._sampling, seed, self._first_prompts)
            async with endpoint.serving(session) as access:
                try:
                    execution = await ask(self._environment.act, problem, access, seed, clock=session.clock)
                except TimeoutError:
                    limit = f"grpo.execute_s = {self._sampling.execute_s:g} s"
                    reason = f"act took longer than {limit} without a request to the policy"
                except EnvironmentFailure as error:
                    reason = str(error)
                if session.failure is not None:
                    raise session.failure
                rollout = session.rollout()
            # What it left under way.
            await self._generator.freed()
        finally:
            self._written()
        if not reason and not rollout.completions:
            reason = "act returned without a request to the policy"
        if reason:
            rollout.result = failed(f"problem {name_of(problem)}: {reason}")
        else:
            rollout.executions.append(execution)
        return rollout

    async def _ask(self, function: Callable[..., Any], *arguments: Any, inline: bool = False) -> Any:
        """The environment's answer within `execute_s`; an execution ends sooner where it is a straggler."""
        clock = asyncio.timeout(self._sampling.execute_s)
        execution = function == getattr(self._environment, "execute", None)
        if execution:
            self._executing.add(clock)
        try:
            return await ask(function, *arguments, clock=clock, inline=inline)
        except TimeoutError:
            if execution and self._dropping:
                self.stragglers += 1
                late = f"grpo.straggler_s = {self._sampling.straggler_s:g} s after the step's last completion"
                raise EnvironmentFailure(f"execute still ran {late}") from None
            limit = f"grpo.execute_s = {self._sampling.execute_s:g} s"
            raise EnvironmentFailure(f"{function.__name__} took longer than {limit}") from None
        finally:
            self._executing.discard(clock)

    def _drop_stragglers(self) -> None:
        self._dropping = True
        for clock in self._executing:
            # One whose time is up already cannot be set any more, while its execution tidies up.
            if not clock.expired():
                clock.reschedule(asyncio.get_running_loop().time())

    async def _write(self, rollout: Rollout, seed: int) -> None:
        """One completion of the policy's, appended."""
        sampling, begun = self._sampling, time.perf_counter()
        most = min(sampling.max_new_tokens, sampling.max_model_len - len(rollout.token_ids))
        completion = await self._complete(rollout.token_ids, most, seed)
        rollout.extend(completion.token_ids, 1, completion.logprobs, completion.versions)
        rollout.add_routes(completion.routes)
        rollout.writing_s += time.perf_counter() - begun
        rollout.truncated = completion.finish_reason == "length"
        rollout.completions.append(self._chat.text(completion.token_ids))

    async def _complete(self, ids: list[int], most: int, seed: int, stop: tuple[str, ...] = ()) -> Completion:
        sampling = self._sampling
        completion = await self._generator.complete(
            ids,
            deadline_s=sampling.deadline_s,
            max_tokens=most,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=seed,
            stop_token_ids=self._chat.stop_token_ids,
            stop=sampling.stop + stop,
        )
        return completion if sampling.routes else replace(completion, routes=None)

    async def _continued(self, rollout: Rollout) -> bool:
        """The last execution's feedback appended; False where the environment has none or no room is left for it."""
        text = await self._ask(self._environment.feedback_text, rollout.executions[-1], inline=True)
        if text is None:
            return False
        if not isinstance(text, str):
            raise EnvironmentFailure(f"feedback_text must return a text or None, got {type(text).__name__}")
        feedback = self._chat.feedback_ids(text, rollout.token_ids[-1])
        if len(rollout.token_ids) + len(feedback) >= self._sampling.max_model_len:
            return False
        rollout.extend(feedback, 0)
        return True

    def _written(self) -> None:
        """One rollout more has no further use of the engine."""
        self._writing -= 1
        if self._writing == 0:
            self.seconds = time.perf_counter() - self._begun
            self._generated.set()
            if self._sampling.straggler_s:
                asyncio.get_running_loop().call_later(self._sampling.straggler_s, self._drop_stragglers)


async def collect(
    engine: AnyEngine | Generator,
    environment: Environment | Agent,
    chat: Chat,
    problems: Sequence[Any],
    *,
    group_size: int,
    sampling: Sampling,
    seed: int,
    ranks: int = 1,
) -> list[Group]:
    """One batch of `Rollouts` from an engine that nobody else uses meanwhile, held by `ranks` together; or by a
    generator, beside what is under way there."""
    opened = nullcontext(engine) if isinstance(engine, Generator) else open_generator(engine, ranks=ranks)
    async with opened as generator:
        rollouts = Rollouts(generator, environment, chat, problems, group_size=group_size, sampling=sampling, seed=seed)
        try:
            return await rollouts.groups()
        finally:
            await rollouts.cancel()
