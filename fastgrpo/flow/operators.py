"""The host's side of the operators: checks what a jail sends, asks the worker, runs public tests, keeps the account."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fastgrpo.flow import messages
from fastgrpo.flow.clock import Clock, reply_within
from fastgrpo.flow.names import MOST_RETRIES
from fastgrpo.flow.problems.numbers import vote
from fastgrpo.flow.solutions import NO_PUBLIC_TESTS, public_feedback, run_tests, solution_of
from fastgrpo.flow.types import (
    NoAnswer,
    Problem,
    Reply,
    Request,
    RequestRejected,
    Worker,
    WorkerCall,
    WorkflowLimits,
)
from fastgrpo_sandbox import CallError, EndSession, Outcome, SandboxPool

_NAME_CHARS = 64
# Calls beyond the budget are refused; that many are in the account, which would grow without bound. What a worker is
# asked is in it all the same, and bounded by the budget.
_ACCOUNT = 256
# A loop that tries again for ever would keep the host busy for as long as its limits last.
_MOST_REFUSED = 256


class Call(msgspec.Struct, tag_field="operator", tag=str.lower, forbid_unknown_fields=True, kw_only=True):
    """A jail's message, not to be trusted. `worker` empty: the first one; `temperature` None: the worker's default."""

    worker: Annotated[str, Meta(max_length=_NAME_CHARS)] = ""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None


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
    retries: Annotated[int, Meta(ge=0, le=MOST_RETRIES)]


_ANY_CALL = Generate | Custom | Review | Revise | Ensemble | Test


class JailFailure(Exception):
    """A jail of ours failed while it served an operator."""


class OperatorHost:
    """Answers the calls of one workflow.

    `calls` is the workflow's account so far, `tested` its public tests by code, `clock` its time; `answered_at` is when
    the last request to a worker ended (`time.perf_counter()`, None before the first). A call is in the account from its
    arrival on, whether it is refused, answered, or still open when the workflow ends.
    Each request's seed depends on the execution's seed, what is asked of whom and how often the same was asked before,
    so parallel calls draw the same whatever their order of arrival.
    """

    def __init__(self, problem: Problem, worker: Worker, pool: SandboxPool, limits: WorkflowLimits, seed: int) -> None:
        self.calls: list[WorkerCall] = []
        self.tested: dict[str, Outcome] = {}
        self.answered_at: float | None = None
        self._problem, self._worker, self._pool, self._limits, self._seed = problem, worker, pool, limits, seed
        self._asked: Counter[str] = Counter()
        self._left = limits.calls
        self._refused = 0
        self.clock = Clock(limits.session.wall_s)

    async def __call__(self, method: str, params: dict[str, Any]) -> Any:
        """Answer one call. Raises `CallError` (the workflow's fault), `EndSession` after very many of these, and
        `WorkerError` or `JailFailure` (ours)."""
        try:
            return await self._served(method, params)
        except CallError:
            self._refused += 1
            if self._refused > _MOST_REFUSED:
                raise EndSession(f"the workflow went on after {_MOST_REFUSED} calls that were refused") from None
            raise

    async def _served(self, method: str, params: dict[str, Any]) -> Any:
        account = WorkerCall(operator=method[:_NAME_CHARS])
        if len(self.calls) < _ACCOUNT:
            self.calls.append(account)
        call = self._checked(method, params)
        account.worker = call.worker or self._worker.names[0]
        account.retries = call.retries if isinstance(call, Test) else 0
        return await self._answer(call, account)

    def _checked(self, method: str, params: dict[str, Any]) -> Any:
        try:
            call = msgspec.convert({**params, "operator": method}, _ANY_CALL)
        except msgspec.ValidationError as error:
            raise CallError(f"{method[:_NAME_CHARS]}(): {error}") from None
        if sum(map(_chars, msgspec.structs.astuple(call))) > self._limits.text_chars:
            raise CallError(f"{method}() was given more than {self._limits.text_chars} characters")
        if call.worker and call.worker not in self._worker.names:
            names = ", ".join(self._worker.names)
            raise CallError(f"{method}(): there is no worker {call.worker!r}; choose one of: {names}")
        return call

    async def _answer(self, call: Any, account: WorkerCall) -> Any:
        problem = self._problem
        ask = partial(self._ask, call, account)
        match call:
            case Generate(instruction):
                return solution_of(problem, (await ask(messages.generate(problem, instruction))).text)
            case Custom(text, instruction):
                return (await ask(messages.custom(text, instruction))).text
            case Review(code):
                return messages.extract_verdict((await ask(messages.review(problem, code), (code,))).text)
            case Revise(code, feedback):
                reply = await ask(messages.revise(problem, code, feedback), (code,), feedback)
                return solution_of(problem, reply.text)
            case Ensemble(codes) if problem.answer is not None:
                self._spend()  # no worker is asked, but the host reads
                return codes[vote(codes)]
            case Ensemble(codes):
                reply = await ask(messages.ensemble(problem, codes), tuple(codes))
                return codes[messages.extract_choice(reply.text, len(codes))]
            case Test(code) if not problem.shown_tests:
                self._spend()
                return False, code, NO_PUBLIC_TESTS
            case Test(code, retries):
                return await self._test(code, retries, ask)

    async def _test(self, code: str, retries: int, ask: Callable[..., Awaitable[Reply]]) -> tuple[bool, str, str]:
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
            reply = await ask(messages.reflect(self._problem, code, feedback), (code,), feedback)
            code = solution_of(self._problem, reply.text)
        raise AssertionError("unreachable")

    async def _ask(
        self, call: Call, account: WorkerCall, chat: messages.Messages, codes: tuple[str, ...] = (), feedback: str = ""
    ) -> Reply:
        self._spend()
        operator: Any = account.operator
        request = Request(
            operator=operator,
            problem=self._problem,
            messages=chat,
            codes=codes,
            feedback=feedback,
            worker=account.worker,
            temperature=call.temperature,
            seed=self._request_seed(f"{operator}/{account.worker}/{call.temperature}/{chat}"),
            order=self._limits.order,
        )
        if all(each is not account for each in self.calls):  # a flood of refused calls must not hide it
            self.calls.append(account)
        account.requests += 1
        is_own = isinstance(call, Generate) and not call.instruction.strip() and call.temperature is None
        with self.clock.stopped():
            reply = await self._reply(request, is_own)
            self.clock.charge(reply.seconds)
        account.answered += 1
        account.prompt_tokens += reply.prompt_tokens
        account.completion_tokens += reply.completion_tokens
        account.cost_usd += reply.cost_usd
        account.seconds += reply.seconds
        return reply

    async def _reply(self, request: Request, is_own: bool) -> Reply:
        """A question that holds words or a temperature of the workflow's, unlike the host's own, may be one that nobody
        answers."""
        try:
            return await reply_within(self._worker, request, self._limits.call_s)
        except RequestRejected as error:
            raise CallError(f"{request.operator}(): {error}") from None
        except NoAnswer:
            if is_own:
                raise
            raise CallError(f"{request.operator}(): the worker gave no answer to this") from None
        finally:
            self.answered_at = time.perf_counter()

    def _spend(self) -> None:
        if self._left <= 0:
            raise CallError(f"the workflow has used up its {self._limits.calls} worker calls, test runs and votes")
        self._left -= 1

    def _request_seed(self, question: str) -> int:
        key = f"{self._seed}/{question}"
        self._asked[key] += 1
        digest = hashlib.blake2b(f"{key}/{self._asked[key]}".encode(errors="replace"), digest_size=4)
        return int.from_bytes(digest.digest()) >> 1


def _chars(value: Any) -> int:
    return sum(map(len, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 0
