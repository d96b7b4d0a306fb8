"""The nouns of the FlowReasoner task: the problem, what became of a workflow and what it may use, who answers it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import msgspec

from fastgrpo_sandbox import AssertTests, Limits, Outcome, Tests

NO_TESTS = AssertTests(asserts=())


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One coding query. Its solution and hidden tests are secrets of the host: they never enter a jail that runs policy
    code, nor a worker's messages."""

    id: str
    prompt: str  # all that the policy and the workers see
    entry_point: str
    solution: str | None = None  # a complete canonical program, if there is one
    given: str = ""  # imports that a solution may lean on, where they are not what the prompt begins with
    public_tests: Tests
    hidden_tests: Tests
    tests: Tests | None = None  # both parts in one, which one run judges
    public: tuple[int, ...] = ()  # indices of the public ones in it
    answer: str | None = None  # the number that is asked for, where there are no tests: the host reads it in a text
    difficulty: float = 0.5  # in [0, 1], the rank in its data set (`problems.measure_difficulty`), 1 the hardest
    wall_s: float | None = None  # deadline of a run of its tests, seconds; None = the jails' own
    dataset: str = ""

    @property
    def shared_test(self) -> bool:
        """True where the only test is public and hidden at once: its text would give the hidden answer away."""
        return self.public_tests == self.hidden_tests != NO_TESTS

    @property
    def shown_tests(self) -> bool:
        """True where there are public tests."""
        return self.public_tests != NO_TESTS

    @property
    def checked(self) -> bool:
        """True where the host itself knows what is right, by hidden tests or the answer; else a judge model scores."""
        return self.hidden_tests != NO_TESTS or self.answer is not None


class WorkerCall(msgspec.Struct, kw_only=True):
    """One operator call of a workflow: entered in the account when it arrives, completed as workers answer.

    No request is sent for a call that was refused, nor for a `test` whose code passes. Tokens, US dollars and seconds
    are those of the answers.
    """

    operator: str
    worker: str = ""  # who was asked; "": the call was refused
    retries: int = 0  # what a `test` asked for
    requests: int = 0  # that were sent to the worker
    answered: int = 0  # that came back: fewer where the workflow ended first or the worker refused
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A judge model's `score` in [0, 1] of a solution, and what asking it cost, which is no workflow's."""

    score: float
    tokens: int = 0
    cost_usd: float = 0.0


ExecutionStatus = Literal["ok", "invalid", "failed", "timeout", "memory", "output_limit", "killed", "infrastructure"]


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one completion: parsed, run in a jail, its solution scored on the hidden tests."""

    # "invalid": a completion without a well-formed workflow; "infrastructure": a failure of ours (jail, worker), which
    # is left out of the group's baseline and never scored 0.
    status: ExecutionStatus
    workflow: str = ""
    solution: str = ""
    pass_rate: float = 0.0  # share of the hidden tests passed
    public_pass_rate: float = 0.0
    complexity: float = 0.0
    structure: str = ""  # canonical form of the workflow's code (`structure_of`)
    feedback: str = ""  # results of public tests only: the policy may read it
    error: str = ""
    calls: tuple[WorkerCall, ...] = ()  # the workflow's account, in the order of arrival
    wasted: tuple[WorkerCall, ...] = ()  # that of a first attempt which our own failure ended
    seconds: float = 0.0  # in all
    latency_s: float = 0.0  # without the wait for its turn, and its scoring
    answered_at: float | None = None  # when the last worker that it asked, or the judge, had answered
    judgement: Judgement | None = None
    unscored: bool = False  # the judge answered, and gave no score

    @property
    def performance(self) -> float:
        """What is rewarded, in [0, 1]: the judge's score where there is a judge, else the share of hidden tests."""
        return self.pass_rate if self.judgement is None else self.judgement.score

    @property
    def requests(self) -> int:
        """Requests that were sent to the workers."""
        return sum(call.requests for call in self.calls)


def status_of(outcome: Outcome) -> ExecutionStatus:
    """An outcome's status as an execution's: code that is refused unread has failed."""
    return "failed" if outcome.status == "rejected" else outcome.status


# "judge" is the host's own question, which no workflow can ask.
Operator = Literal["generate", "custom", "review", "revise", "ensemble", "test", "judge"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One question. A real worker reads `messages` and what follows `feedback` only.

    A worker enters `waiting()` while the request waits for its turn or for its next attempt: no deadline runs
    meanwhile, and its own begins anew after it.
    """

    operator: Operator
    problem: Problem  # with the host's secrets: no worker may send it anywhere
    messages: list[dict[str, str]]  # chat turns, no secret in them
    codes: tuple[str, ...] = ()  # what the messages hold, for a simulated worker; so is `feedback`
    feedback: str = ""
    worker: str = ""  # one of the worker's `names`; empty = the first
    temperature: float | None = None  # None = the worker's own
    seed: int = 0
    order: int = 0  # of requests that wait for their turn those of a lower one go first
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One answer and its account: tokens, US dollars, seconds from the sending of what was answered to the answer."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    seconds: float = 0.0


class WorkerError(Exception):
    """The worker failed: endpoint unreachable, deadline, retries exhausted. Infrastructure, not the policy's fault."""


class NoAnswer(WorkerError):
    """The worker gave no answer: cut off while it reasoned, filtered, refused, or a tool call instead.

    It is the fault of a workflow that put words or a temperature of its own into the question: it could end a run that
    goes badly so.
    A turn that the model itself ends without a word is an answer, the empty text.
    """


class RequestRejected(Exception):
    """The worker will not answer this one request, e.g. because it exceeds its context: the workflow's fault."""


class Worker(Protocol):
    """Worker models: a workflow may choose from their `names`, the default first."""

    names: tuple[str, ...]

    async def ask(self, request: Request) -> Reply:
        """The answer to one request. Raises `WorkerError` or `RequestRejected`."""

    async def aclose(self) -> None:
        """Release connections."""


class WorkflowLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one workflow. Beyond `call_s` and `wait_s` the failure is ours."""

    calls: int = 24  # worker requests, votes, public-test runs
    call_s: float = 90.0  # one attempt at a worker request, from its own start
    wait_s: float = 600.0  # all waiting of one workflow
    at_once: int = 64  # workflows that run at once
    text_chars: int = 100_000  # each text that a workflow sends or returns
    # The jail's limits (60 s, arXiv 2504.15257). `wall_s` counts what the workflow does itself, the seconds of the
    # answers it gets and of the tests it runs; neither the wait for a turn at a worker or jail, nor a failed attempt.
    session: Limits = Limits(wall_s=60.0, cpu_s=5.0, memory_mb=256)
    tests: Limits | None = None  # of one run of the solution against its tests; None = the pool's own
    # The training step: workflows, requests and tests of the one that is due go first where there are too few turns.
    order: int = 0

    @property
    def jail(self) -> Limits:
        """The limits that the jail itself holds: the host's clock stands still where the jail's does not."""
        return msgspec.structs.replace(self.session, wall_s=self.session.wall_s + self.wait_s)
