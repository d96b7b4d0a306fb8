"""The nouns of the FlowReasoner task: the problem, the worker's account, what became of a workflow."""

from __future__ import annotations

from typing import Literal

import msgspec

from fastgrpo_sandbox import Tests


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One coding query.

    `prompt` is all that the policy and the workers see. `solution` (a complete canonical program, if there is one) and
    `hidden_tests` are secrets of the host: they never enter a jail that runs policy code, nor a worker's messages.
    `tests` are both parts in one, which one run judges, and `public` the indices of the public ones in it.
    `difficulty` in [0, 1] is the problem's rank in its dataset (see `problems.measure_difficulty`), 1 the hardest.
    `wall_s` is the deadline of a run of its tests in seconds; None = the jails' own. `dataset` names where it is from.
    """

    id: str
    prompt: str
    entry_point: str
    solution: str | None = None
    public_tests: Tests
    hidden_tests: Tests
    tests: Tests | None = None
    public: tuple[int, ...] = ()
    difficulty: float = 0.5
    wall_s: float | None = None
    dataset: str = ""

    @property
    def shared_test(self) -> bool:
        """True where the only test is public and hidden at once: its text would give the hidden answer away."""
        return self.public_tests == self.hidden_tests


class WorkerCall(msgspec.Struct, frozen=True, kw_only=True):
    """One operator's question to a worker, as accounted: tokens, US dollars and seconds."""

    operator: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    seconds: float


ExecutionStatus = Literal["ok", "invalid", "failed", "timeout", "memory", "output_limit", "killed", "infrastructure"]


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one completion: parsed, run in a jail, its solution scored on the hidden tests.

    `status` "invalid" is a completion without a well-formed workflow; "infrastructure" a failure of ours (jail,
    worker), which is left out of the group's baseline and never scored 0. `pass_rate` in [0, 1] is the share of the
    hidden tests passed; `feedback` holds public-test results only and may be shown to the policy.
    """

    status: ExecutionStatus
    workflow: str = ""
    solution: str = ""
    pass_rate: float = 0.0
    public_pass_rate: float = 0.0
    complexity: float = 0.0
    feedback: str = ""
    error: str = ""
    calls: tuple[WorkerCall, ...] = ()
    seconds: float = 0.0
