"""The nouns of the FlowReasoner task: the problem, the worker's account, what became of a workflow."""

from __future__ import annotations

from typing import Literal

import msgspec

from fastgrpo_sandbox import AssertTests, Tests

NO_TESTS = AssertTests(asserts=())


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One coding query.

    `prompt` is all that the policy and the workers see. `solution` (a complete canonical program, if there is one) and
    `hidden_tests` are secrets of the host: they never enter a jail that runs policy code, nor a worker's messages.
    `given` are imports that a solution may lean on, where they are not what the prompt begins with.
    `tests` are both parts in one, which one run judges, and `public` the indices of the public ones in it.
    `difficulty` in [0, 1] is the problem's rank in its dataset (see `problems.measure_difficulty`), 1 the hardest.
    `answer` is the number that is asked for, where there are no tests and the host reads it in a solution's text.
    `wall_s` is the deadline of a run of its tests in seconds; None = the jails' own. `dataset` names where it is from.
    """

    id: str
    prompt: str
    entry_point: str
    solution: str | None = None
    given: str = ""
    public_tests: Tests
    hidden_tests: Tests
    tests: Tests | None = None
    public: tuple[int, ...] = ()
    answer: str | None = None
    difficulty: float = 0.5
    wall_s: float | None = None
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

    `worker` is who was asked, `retries` what a `test` asked for. `requests` were sent to the worker and `answered` of
    them came back: fewer where the workflow ended first or the worker refused; none is sent for a call that was
    refused, nor for a `test` whose code passes. Tokens, US dollars and seconds are those of the answers.
    """

    operator: str
    worker: str = ""
    retries: int = 0
    requests: int = 0
    answered: int = 0
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
    """What became of one completion: parsed, run in a jail, its solution scored on the hidden tests.

    `status` "invalid" is a completion without a well-formed workflow; "infrastructure" a failure of ours (jail,
    worker), which is left out of the group's baseline and never scored 0. `pass_rate` in [0, 1] is the share of the
    hidden tests passed; `feedback` holds public-test results only and may be shown to the policy. `calls` is the
    account of the workflow, in the order of arrival, `wasted` that of a first attempt which our own failure ended;
    `structure` is the canonical form of its code (`structure_of`). `seconds` passed in all; `latency_s` leaves out the
    wait for its turn and its scoring. `answered_at`: when the last worker that it asked, or the judge, had answered.
    """

    status: ExecutionStatus
    workflow: str = ""
    solution: str = ""
    pass_rate: float = 0.0
    public_pass_rate: float = 0.0
    complexity: float = 0.0
    structure: str = ""
    feedback: str = ""
    error: str = ""
    calls: tuple[WorkerCall, ...] = ()
    wasted: tuple[WorkerCall, ...] = ()
    seconds: float = 0.0
    latency_s: float = 0.0
    answered_at: float | None = None
    judgement: Judgement | None = None

    @property
    def performance(self) -> float:
        """What is rewarded, in [0, 1]: the judge's score where there is a judge, else the share of hidden tests."""
        return self.pass_rate if self.judgement is None else self.judgement.score

    @property
    def requests(self) -> int:
        """Requests that were sent to the workers."""
        return sum(call.requests for call in self.calls)
