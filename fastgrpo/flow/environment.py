"""The workflow task as an environment: completion in, jailed workflow, tested solution, reward out."""

from __future__ import annotations

import asyncio
import time
from functools import cache
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from fastgrpo.config import Reward
from fastgrpo.flow.complexity import complexity
from fastgrpo.flow.limits import WorkflowLimits
from fastgrpo.flow.operators import OperatorHost, last_line, public_feedback, run_tests
from fastgrpo.flow.parse import InvalidWorkflow, Workflow, parse_completion
from fastgrpo.flow.prompt import Instruction, query_prompt, round_feedback
from fastgrpo.flow.reward import group_rewards
from fastgrpo.flow.structure import structure_of
from fastgrpo.flow.types import Execution, ExecutionStatus, Problem
from fastgrpo.flow.workers.protocol import Worker, names_of
from fastgrpo.types import RewardTerms
from fastgrpo_sandbox import Outcome, SandboxPool


class WorkflowEnvironment:
    """Runs the policy's workflows in `pool`'s jails with `worker` behind the operators; owns neither."""

    def __init__(
        self,
        pool: SandboxPool,
        worker: Worker,
        *,
        weights: Reward = Reward(),  # noqa: B008 - frozen
        limits: WorkflowLimits = WorkflowLimits(),  # noqa: B008 - frozen
        instruction: Instruction = "short",
    ) -> None:
        self._pool, self.worker = pool, worker
        self._weights, self._limits, self._instruction = weights, limits, instruction
        self._slots = asyncio.Semaphore(limits.at_once)

    def prompt(self, problem: Problem) -> str:
        """What the policy reads first; the problem's prompt is all of the problem that is in it."""
        return query_prompt(problem, self._instruction, names_of(self.worker))

    def feedback_text(self, execution: Execution) -> str:
        """What the policy reads between two rounds: public tests only."""
        return round_feedback(execution)

    def rewards(self, problem: Problem, executions: list[Execution]) -> list[RewardTerms | None]:
        """One reward for each execution of a group on `problem`; None where the failure was ours."""
        return group_rewards(executions, self._weights)

    async def execute(self, problem: Problem, completion: str, seed: int) -> Execution:
        """Parse and run one completion and score its solution; an infrastructure failure is tried once more."""
        try:
            workflow = parse_completion(completion)
        except InvalidWorkflow as error:
            return Execution(status="invalid", error=str(error), feedback=str(error))
        async with self._slots:
            first = await self._attempt(problem, workflow, seed)
            if first.status != "infrastructure":
                return first
            second = await self._attempt(problem, workflow, seed)
        return replace(second, wasted=first.calls, seconds=first.seconds + second.seconds)

    async def score(self, problem: Problem, solution: str, *, public: bool = False) -> Outcome:
        """The solution's outcome on the hidden (or public) tests; `pass_rate` is the share passed."""
        return await run_tests(self._pool, problem, solution, public=public, limits=self._limits)

    async def _attempt(self, problem: Problem, workflow: Workflow, seed: int) -> Execution:
        start = time.perf_counter()
        host = OperatorHost(problem, self.worker, self._pool, self._limits, seed)
        # The problem's id stays outside: a workflow is to depend on the query's text, not on its name.
        inputs = {
            "code": workflow.source,
            "problem": {"prompt": problem.prompt, "entry_point": problem.entry_point},
        }
        async with self._pool.session(
            guest_source(), on_call=host, inputs=inputs, limits=self._limits.session
        ) as session:
            outcome = await session.outcome()
        result = await self._result(problem, outcome, host.tested)
        return replace(
            result,
            workflow=workflow.source,
            complexity=complexity(workflow.tree, host.calls),
            structure=structure_of(workflow.tree),
            calls=tuple(host.calls),
            seconds=time.perf_counter() - start,
        )

    async def _result(self, problem: Problem, outcome: Outcome, tested: dict[str, Outcome]) -> Execution:
        """Status, solution and scores of a session that ended with `outcome`."""
        if outcome.status != "ok":
            error = last_line(outcome.error) or f"the workflow ended with: {outcome.status}"
            return Execution(status=_status(outcome), error=error, feedback=error)
        # The session's value crossed from the jail, where the guest's own check may have been replaced.
        if not isinstance(outcome.value, str) or len(outcome.value) > self._limits.text_chars:
            error = f"workflow() must return the solution's code, at most {self._limits.text_chars} characters"
            return Execution(status="failed", error=error, feedback=error)
        return await self._scored(problem, outcome.value, tested.get(outcome.value))

    async def _scored(self, problem: Problem, solution: str, public: Outcome | None) -> Execution:
        """Hidden tests, and public ones unless the workflow's own test of this solution tells their outcome."""
        hidden = await self.score(problem, solution)
        public = public or await self.score(problem, solution, public=True)
        if "infrastructure" in (hidden.status, public.status):
            return Execution(status="infrastructure", solution=solution, error=hidden.error or public.error)
        return Execution(
            status="ok",
            solution=solution,
            pass_rate=hidden.pass_rate,
            public_pass_rate=public.pass_rate,
            feedback=public_feedback(problem, public),
        )


@cache
def guest_source() -> str:
    """The text of `guest.py`, which runs in the jail around every workflow."""
    return Path(__file__).with_name("guest.py").read_text(encoding="utf-8")


def _status(outcome: Outcome) -> ExecutionStatus:
    status: Any = outcome.status
    return "failed" if status == "rejected" else status
