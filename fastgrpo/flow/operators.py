"""The host's side of the operators: checks what a jail sends, asks the worker, runs public tests, keeps the account."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fastgrpo.flow import messages
from fastgrpo.flow.clock import Clock
from fastgrpo.flow.extract import extract_code
from fastgrpo.flow.limits import WorkflowLimits
from fastgrpo.flow.problems import describe_tests, preamble
from fastgrpo.flow.workers.protocol import Operator, Reply, Request, RequestRejected, Worker, WorkerError
from fastgrpo.types import Problem, WorkerCall
from fastgrpo_sandbox import CallError, Outcome, SandboxPool

_SHOWN_TESTS = 3
_SHOWN_CHARS = 400


class Call(msgspec.Struct, tag_field="operator", tag=str.lower, forbid_unknown_fields=True):
    """A message from a jail, not to be trusted."""


class Generate(Call):
    instruction: str


class Custom(Call):
    input: str
    instruction: str


class Review(Call):
    code: str


class Revise(Call):
    code: str
    feedback: str


class Ensemble(Call):
    codes: Annotated[list[str], Meta(min_length=1, max_length=16)]


class Test(Call):
    code: str
    retries: Annotated[int, Meta(ge=0, le=8)]


_ANY_CALL = Generate | Custom | Review | Revise | Ensemble | Test


class JailFailure(Exception):
    """A jail of ours failed while it served an operator."""


class OperatorHost:
    """Answers the calls of one workflow; `calls` is its account so far, `tested` its public tests by code, `clock` its
    time.

    Each request's seed depends on the execution's seed, the operator, its inputs and how often the same was asked
    before, so parallel calls draw the same whatever their order of arrival.
    """

    def __init__(self, problem: Problem, worker: Worker, pool: SandboxPool, limits: WorkflowLimits, seed: int) -> None:
        self.calls: list[WorkerCall] = []
        self.tested: dict[str, Outcome] = {}
        self._problem, self._worker, self._pool, self._limits, self._seed = problem, worker, pool, limits, seed
        self._asked: Counter[str] = Counter()
        self._left = limits.calls
        self.clock = Clock(limits.session.wall_s)

    async def __call__(self, method: str, params: dict[str, Any]) -> Any:
        """Answer one call. Raises `CallError` (the workflow's fault), `WorkerError` or `JailFailure` (ours)."""
        try:
            call = msgspec.convert({**params, "operator": method}, _ANY_CALL)
        except msgspec.ValidationError as error:
            raise CallError(f"{method[:40]}(): {error}") from None
        if sum(map(_chars, msgspec.structs.astuple(call))) > self._limits.text_chars:
            raise CallError(f"{method}() was given more than {self._limits.text_chars} characters")
        return await self._answer(call)

    async def _answer(self, call: Any) -> Any:
        problem = self._problem
        match call:
            case Generate(instruction):
                reply = await self._ask("generate", messages.generate(problem, instruction))
                return extract_code(reply.text, problem.entry_point)
            case Custom(text, instruction):
                return (await self._ask("custom", messages.custom(text, instruction))).text
            case Review(code):
                reply = await self._ask("review", messages.review(problem, code), (code,))
                return messages.extract_verdict(reply.text)
            case Revise(code, feedback):
                reply = await self._ask("revise", messages.revise(problem, code, feedback), (code,), feedback)
                return extract_code(reply.text, problem.entry_point)
            case Ensemble(codes):
                reply = await self._ask("ensemble", messages.ensemble(problem, codes), tuple(codes))
                return codes[messages.extract_choice(reply.text, len(codes))]
            case Test(code, retries):
                return await self._test(code, retries)

    async def _test(self, code: str, retries: int) -> tuple[bool, str, str]:
        """Public tests, reflect, retry. Returns (passed, code, feedback) of the last run."""
        for attempt in range(retries + 1):
            self._spend()
            with self.clock.stopped():
                outcome = await run_tests(self._pool, self._problem, code, public=True, limits=self._limits)
                self.clock.charge(outcome.wall_s)
            if outcome.status == "infrastructure":
                raise JailFailure(outcome.error)
            self.tested[code] = outcome
            feedback = public_feedback(self._problem, outcome)
            if outcome.pass_rate == 1.0 or attempt == retries:
                return outcome.pass_rate == 1.0, code, feedback
            reply = await self._ask("test", messages.reflect(self._problem, code, feedback), (code,), feedback)
            code = extract_code(reply.text, self._problem.entry_point)
        raise AssertionError("unreachable")

    async def _ask(
        self, operator: Operator, chat: messages.Messages, codes: tuple[str, ...] = (), feedback: str = ""
    ) -> Reply:
        self._spend()
        request = Request(
            operator=operator,
            problem=self._problem,
            messages=chat,
            codes=codes,
            feedback=feedback,
            seed=self._request_seed(operator, chat),
        )
        with self.clock.stopped():
            reply = await self._reply(request)
            self.clock.charge(reply.seconds)
        self.calls.append(
            WorkerCall(
                operator=operator,
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
                cost_usd=reply.cost_usd,
                seconds=reply.seconds,
            )
        )
        return reply

    async def _reply(self, request: Request) -> Reply:
        """The worker's reply, each attempt within `call_s` of its own start."""
        try:
            async with asyncio.timeout(self._limits.call_s) as deadline:
                waiting = partial(_standing, deadline, self._limits.call_s)
                return await self._worker.ask(msgspec.structs.replace(request, waiting=waiting))
        except TimeoutError:
            raise WorkerError(f"the worker did not answer within {self._limits.call_s:g} s") from None
        except RequestRejected as error:
            raise CallError(f"{request.operator}(): {error}") from None

    def _spend(self) -> None:
        if self._left <= 0:
            raise CallError(f"the workflow has used up its {self._limits.calls} worker calls and test runs")
        self._left -= 1

    def _request_seed(self, operator: str, chat: messages.Messages) -> int:
        key = f"{self._seed}/{operator}/{chat}"
        self._asked[key] += 1
        digest = hashlib.blake2b(f"{key}/{self._asked[key]}".encode(errors="replace"), digest_size=4)
        return int.from_bytes(digest.digest()) >> 1


@contextmanager
def _standing(deadline: asyncio.Timeout, seconds: float) -> Iterator[None]:
    """No deadline inside; afterwards it is `seconds` away again."""
    deadline.reschedule(None)
    yield
    deadline.reschedule(asyncio.get_running_loop().time() + seconds)


def _chars(value: Any) -> int:
    return sum(map(len, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 0


async def run_tests(pool: SandboxPool, problem: Problem, code: str, *, public: bool, limits: WorkflowLimits) -> Outcome:
    """Run a solution against the problem's public or hidden tests, with the imports and helpers its prompt gives."""
    given = preamble(problem.prompt, problem.entry_point)
    tests = problem.public_tests if public else problem.hidden_tests
    return await pool.run(f"{given}\n{code}" if given else code, tests=tests, limits=limits.tests)


def public_feedback(problem: Problem, outcome: Outcome) -> str:
    """What the public tests say, in a few lines that may be shown to worker and policy."""
    described = describe_tests(problem.public_tests)
    passed = outcome.tests or (False,) * len(described)
    if outcome.pass_rate == 1.0:
        return f"All {len(described)} public tests pass."
    failed = [text for text, good in zip(described, passed, strict=False) if not good]
    lines = [f"{len(failed)} of {len(described)} public tests fail:"]
    lines += [text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + " ..." for text in failed[:_SHOWN_TESTS]]
    if outcome.status != "ok" and outcome.error:
        lines.append(last_line(outcome.error))
    elif outcome.status not in ("ok", "failed"):
        lines.append(f"The run ended with: {outcome.status}.")
    return "\n".join(lines)


def last_line(error: str) -> str:
    """The last line of a traceback, shortened."""
    lines = error.strip().splitlines()
    return lines[-1][:_SHOWN_CHARS] if lines else ""
