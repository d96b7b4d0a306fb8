"""The host's side of the operators: checks what a jail sends, asks the worker, runs public tests, keeps the account."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from fastgrpo.flow import messages
from fastgrpo.flow.clock import Clock
from fastgrpo.flow.names import MOST_RETRIES
from fastgrpo.flow.problems.numbers import is_right, vote
from fastgrpo.flow.problems.splitting import describe_tests
from fastgrpo.flow.types import (
    NO_TESTS,
    NoAnswer,
    Problem,
    Reply,
    Request,
    RequestRejected,
    Worker,
    WorkerCall,
    WorkerError,
    WorkflowLimits,
    names_of,
)
from fastgrpo_sandbox import CallError, EndSession, Outcome, SandboxPool, StdioTests, Tests, extract_code
from fastgrpo_sandbox.extract import without_thought
from fastgrpo_sandbox.source_text import preamble

_SHOWN_TESTS = 3
_SHOWN_CHARS = 400
_NAME_CHARS = 64
NO_PUBLIC_TESTS = "This problem has no public tests."
# Calls beyond the budget are refused; that many are in the account, which would grow without bound. What a worker is
# asked is in it all the same, and bounded by the budget.
_ACCOUNT = 256
# A loop that tries again for ever would keep the host busy for as long as its limits last.
_MOST_REFUSED = 256
_FUTURE = re.compile(r"^from __future__ import (\([^()]*\)|.*)", re.MULTILINE)


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
        self._names = names_of(worker)
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
        account.worker = call.worker or self._names[0]
        account.retries = call.retries if isinstance(call, Test) else 0
        return await self._answer(call, account)

    def _checked(self, method: str, params: dict[str, Any]) -> Any:
        try:
            call = msgspec.convert({**params, "operator": method}, _ANY_CALL)
        except msgspec.ValidationError as error:
            raise CallError(f"{method[:_NAME_CHARS]}(): {error}") from None
        if sum(map(_chars, msgspec.structs.astuple(call))) > self._limits.text_chars:
            raise CallError(f"{method}() was given more than {self._limits.text_chars} characters")
        if call.worker and call.worker not in self._names:
            names = ", ".join(self._names)
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


async def reply_within(worker: Worker, request: Request, call_s: float) -> Reply:
    """The worker's reply, each attempt within `call_s` of its own start. Raises `WorkerError` or `RequestRejected`."""
    try:
        async with asyncio.timeout(call_s) as deadline:
            return await worker.ask(replace(request, waiting=partial(_standing, deadline, call_s)))
    except TimeoutError:
        raise WorkerError(f"the worker did not answer within {call_s:g} s") from None


@contextmanager
def _standing(deadline: asyncio.Timeout, seconds: float) -> Iterator[None]:
    """No deadline inside; afterwards it is `seconds` away again."""
    deadline.reschedule(None)
    yield
    deadline.reschedule(asyncio.get_running_loop().time() + seconds)


def _chars(value: Any) -> int:
    return sum(map(len, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 0


async def run_tests(pool: SandboxPool, problem: Problem, code: str, *, public: bool, limits: WorkflowLimits) -> Outcome:
    """Run a solution against the problem's public or hidden tests, with the imports and helpers its prompt gives.

    Where there are none, none passes; an answer that the host knows is the only hidden test.
    """
    tests = problem.public_tests if public else problem.hidden_tests
    if tests == NO_TESTS:
        return _compared(problem, code) if not public and problem.answer is not None else Outcome("failed")
    return await run_program(pool, problem, code, tests, limits)


def _compared(problem: Problem, text: str) -> Outcome:
    """Whether a solution's text gives the number that is asked for: no jail is needed."""
    right = is_right(text, problem.answer or "")
    return Outcome("ok" if right else "failed", tests=(right,), verdict_by="host")


def solution_of(problem: Problem, reply: str) -> str:
    """The solution in a reply: its program, or all that it says where a number is asked for."""
    if problem.answer is not None:
        return without_thought(reply).strip()
    return extract_code(reply, problem.entry_point)


async def run_all_tests(
    pool: SandboxPool, problem: Problem, code: str, *, limits: WorkflowLimits
) -> tuple[Outcome, Outcome]:
    """(public, hidden) outcomes of one run of all tests; what ends the run, as a loop without end, ends it for both.

    Cases of StdioTests have a jail each, so each part is a run of its own, and in no more jails. Elsewhere a solution
    may know hidden inputs when it fails: where its error is shown, a run of the public tests alone says what it is.
    """
    alone = partial(run_tests, pool, problem, code, limits=limits)
    if isinstance(problem.tests, StdioTests) and not problem.shared_test:
        first, rest = await asyncio.gather(alone(public=True), alone(public=False))
        return first, rest
    if problem.tests is None:
        return await alone(public=True), await alone(public=False)
    outcome = await run_program(pool, problem, code, problem.tests, limits)
    public = [passed for index, passed in enumerate(outcome.tests) if index in problem.public]
    hidden = [passed for index, passed in enumerate(outcome.tests) if index not in problem.public] or public
    shown = _outcome_of(outcome, public)
    if shown.error and shown.error_by != "host" and _shows_tests(problem):
        again = await alone(public=True)
        ours = again.status == "infrastructure"  # whose reason is nothing of the solution's
        shown = replace(shown, error="" if ours else again.error, error_by="" if ours else again.error_by)
    return shown, _outcome_of(outcome, hidden)


def judged_in_one_run(problem: Problem) -> bool:
    """Whether one run judges public and hidden tests, so that what ends it ends both; StdioTests have a jail a case."""
    return problem.tests is not None and not isinstance(problem.tests, StdioTests)


async def run_program(
    pool: SandboxPool, problem: Problem, code: str, tests: Tests | None, limits: WorkflowLimits
) -> Outcome:
    """One run of `code` after what the problem gives, within the problem's deadline if any; without tests a script."""
    given = given_to(problem)
    bounds = limits.tests
    if problem.wall_s is not None:
        bounds = bounds or pool.limits
        bounds = replace(bounds, wall_s=min(bounds.wall_s, problem.wall_s))
    return await pool.run(program_after(given, code), tests=tests, limits=bounds, order=limits.order)


def given_to(problem: Problem) -> str:
    """The imports and helpers that every solution of the problem may lean on."""
    return problem.given or preamble(problem.prompt, problem.entry_point)


def _outcome_of(whole: Outcome, tests: Sequence[bool]) -> Outcome:
    """The outcome of some of the tests of a run; a count in its error is that of all."""
    part = replace(whole, tests=tuple(tests))
    if whole.status not in ("ok", "failed"):
        return part
    if tests and all(tests):
        return replace(part, status="ok", error="", error_by="")
    return replace(part, status="failed")


def program_after(given: str, code: str) -> str:
    """`code` after the imports and helpers that the problem gives; its `from __future__` imports stay the first."""
    future = "\n".join(found[0] for found in _FUTURE.finditer(code))
    return f"{future}\n{given}\n{_FUTURE.sub('', code)}" if given else code


def public_feedback(problem: Problem, outcome: Outcome) -> str:
    """What the public tests say, in a few lines that may be shown to worker and policy.

    A test that is hidden as well, because the problem has no other, is not shown: its text holds the answer.
    """
    if not problem.shown_tests:
        return NO_PUBLIC_TESTS
    described = describe_tests(problem.public_tests)
    passed = outcome.tests or (False,) * len(described)
    if outcome.pass_rate == 1.0:
        return f"All {len(described)} public tests pass."
    failed = [text for text, good in zip(described, passed, strict=False) if not good]
    count = f"{len(failed)} of {len(described)} public tests fail"
    if not _shows_tests(problem):
        return f"{count}."
    lines = [f"{count}:"]
    lines += [text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + " ..." for text in failed[:_SHOWN_TESTS]]
    counts = outcome.status == "failed" and outcome.error_by == "host"  # hidden tests, too
    if outcome.status != "ok" and outcome.error and not counts:
        lines.append(last_line(outcome.error))
    elif outcome.status not in ("ok", "failed"):
        lines.append(f"The run ended with: {outcome.status}.")
    return "\n".join(lines)


def _shows_tests(problem: Problem) -> bool:
    """Whether feedback shows the public tests that fail, and the error: where none of them is hidden as well."""
    hidden = describe_tests(problem.hidden_tests)
    return problem.shown_tests and set(describe_tests(problem.public_tests)).isdisjoint(hidden)


def last_line(error: str) -> str:
    """The last line of a traceback, shortened."""
    lines = error.strip().splitlines()
    return lines[-1][:_SHOWN_CHARS] if lines else ""
