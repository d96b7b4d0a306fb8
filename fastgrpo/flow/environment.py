"""The workflow task as an environment: completion in, jailed workflow, tested solution, reward out."""

from __future__ import annotations

import time
from copy import copy
from functools import cache
from pathlib import Path

import msgspec
from msgspec.structs import replace

from fastgrpo.config import RewardWeights
from fastgrpo.flow.adaptivity import entropy
from fastgrpo.flow.clock import Clock
from fastgrpo.flow.complexity import complexity
from fastgrpo.flow.judge import NoScore, judged
from fastgrpo.flow.operators import OperatorHost
from fastgrpo.flow.parse import InvalidWorkflow, Workflow, parse_completion
from fastgrpo.flow.prompt import Instruction, query_prompt, round_feedback
from fastgrpo.flow.reward import group_rewards, spent_calls, warmed_up
from fastgrpo.flow.solutions import judged_in_one_run, last_line, public_feedback, run_all_tests, run_tests
from fastgrpo.flow.structure import structure_of
from fastgrpo.flow.types import (
    Execution,
    Judgement,
    Problem,
    RequestRejected,
    Worker,
    WorkerError,
    WorkflowLimits,
    status_of,
)
from fastgrpo.types import INFRASTRUCTURE, Result, Reward, Rollout
from fastgrpo_sandbox import Outcome, SandboxPool, Session
from fastgrpo_sandbox.turns import Turns


class WorkflowEnvironment:
    """Runs the policy's workflows in `pool`'s jails with `worker` behind the operators; owns neither."""

    def __init__(
        self,
        pool: SandboxPool,
        worker: Worker,
        *,
        weights: RewardWeights = RewardWeights(),  # noqa: B008 - frozen
        limits: WorkflowLimits = WorkflowLimits(),  # noqa: B008 - frozen
        instruction: Instruction = "short",
    ) -> None:
        self.pool, self.worker = pool, worker
        self._weights, self._limits, self._instruction = weights, limits, instruction
        self._slots = Turns(limits.at_once)

    def at_step(self, step: int) -> WorkflowEnvironment:
        """This environment for the training step, from 0: with the costs that `reward.warmup_steps` gives it, and
        workflows, requests and tests that go before those of later steps."""
        other = copy(self)
        other._weights = warmed_up(self._weights, step)
        other._limits = replace(self._limits, order=step)
        return other

    def prompt(self, problem: Problem) -> str:
        """What the policy reads first: of the problem its prompt, and whether there are public tests."""
        return query_prompt(problem, self._instruction, self.worker.names)

    def feedback_text(self, execution: Execution) -> str | None:
        """What the policy reads between two rounds: public tests only; None after a failure of ours."""
        return None if execution.status == INFRASTRUCTURE else round_feedback(execution)

    def results(self, problem: Problem, rollouts: list[Rollout]) -> list[Result]:
        """One result for each rollout of a group, from its last execution; the account is that of all rounds.

        Among the metrics are `spent`, the last execution's cost in single calls, and the entropy of the structures that
        the group's workflows have, in nats: 0 where the policy writes one structure for this query.
        """
        last = silent_ones_failed([rollout.executions[-1] for rollout in rollouts])
        spent = spent_calls(last, self._weights.efficiency_by)
        shared = {"structure_entropy": entropy(each.structure for each in last if each.workflow)}
        return [
            result_of(problem, [*rollout.executions[:-1], own], reward, {"spent": calls, **shared})
            for rollout, own, reward, calls in zip(
                rollouts, last, group_rewards(last, self._weights), spent, strict=True
            )
        ]

    async def execute(self, problem: Problem, completion: str, seed: int) -> Execution:
        """Parse and run one completion and score its solution; an infrastructure failure is tried once more."""
        try:
            workflow = parse_completion(completion)
        except InvalidWorkflow as error:
            return Execution(status="invalid", error=str(error), feedback=str(error))
        async with self._slots.taken(self._limits.order):
            first = await self._attempt(problem, workflow, seed)
            if first.status != "infrastructure":
                return first
            second = await self._attempt(problem, workflow, seed)
        return replace(second, wasted=first.calls, seconds=first.seconds + second.seconds)

    async def _attempt(self, problem: Problem, workflow: Workflow, seed: int) -> Execution:
        start = time.perf_counter()
        host = OperatorHost(problem, self.worker, self.pool, self._limits, seed)
        # The problem's id stays outside: a workflow is to depend on the query's text, not on its name.
        inputs = {
            "code": workflow.source,
            "problem": {"prompt": problem.prompt, "entry_point": problem.entry_point},
        }
        async with self.pool.session(guest_source(), on_call=host, inputs=inputs, limits=self._limits.jail) as session:
            outcome = await self._outcome(session, host.clock)
        result = await self._result(problem, outcome, host.tested)
        return replace(
            result,
            workflow=workflow.source,
            complexity=complexity(workflow.tree, host.calls),
            structure=structure_of(workflow.tree),
            calls=tuple(host.calls),
            seconds=time.perf_counter() - start,
            latency_s=host.clock.counted_s,
            # The judge is asked last of all.
            answered_at=time.perf_counter() if result.judgement else host.answered_at,
        )

    async def _outcome(self, session: Session, clock: Clock) -> Outcome:
        """How a session ended: by itself, by the workflow's clock, or because it waited too long for its turn."""
        try:
            outcome = await clock.within(session.outcome())
        except TimeoutError:
            return Outcome("timeout", error="wall clock limit reached", error_by="host")
        if outcome.status == "timeout" and outcome.wall_s >= self._limits.jail.wall_s:
            error = f"its calls waited more than {self._limits.wait_s:g} s for their turn; raise workers.concurrency"
            return Outcome("infrastructure", error=error, error_by="host")
        return outcome

    async def _result(self, problem: Problem, outcome: Outcome, tested: dict[str, Outcome]) -> Execution:
        """Status, solution and scores of a session that ended with `outcome`."""
        if outcome.status != "ok":
            error = last_line(outcome.error) or f"the workflow ended with: {outcome.status}"
            return Execution(status=status_of(outcome), error=error, feedback=error)
        # The session's value crossed from the jail, where the guest's own check may have been replaced.
        if not isinstance(outcome.value, str) or len(outcome.value) > self._limits.text_chars:
            error = f"workflow() must return the solution's code, at most {self._limits.text_chars} characters"
            return Execution(status="failed", error=error, feedback=error)
        return await self._scored(problem, outcome.value, tested.get(outcome.value))

    async def _scored(self, problem: Problem, solution: str, public: Outcome | None) -> Execution:
        """Hidden tests, and public ones unless the workflow's own test of this solution tells their outcome."""
        if public is None:
            public, hidden = await run_all_tests(self.pool, problem, solution, limits=self._limits)
        elif public.status == "timeout" and judged_in_one_run(problem):
            hidden = replace(public, tests=())
        else:
            hidden = await run_tests(self.pool, problem, solution, public=False, limits=self._limits)
        if "infrastructure" in (hidden.status, public.status):
            return Execution(status="infrastructure", solution=solution, error=hidden.error or public.error)
        try:
            judgement = await self._judgement(problem, solution)
        except RequestRejected as error:
            return Execution(status="failed", solution=solution, error=f"the judge: {error}")
        except WorkerError as error:
            silent = isinstance(error, NoScore)
            return Execution(status="infrastructure", solution=solution, error=str(error), unscored=silent)
        return Execution(
            status="ok",
            solution=solution,
            judgement=judgement,
            pass_rate=hidden.pass_rate,
            public_pass_rate=public.pass_rate,
            feedback=public_feedback(problem, public),
        )

    async def _judgement(self, problem: Problem, solution: str) -> Judgement | None:
        """The judge model's score where one is configured. Raises `WorkerError` or `RequestRejected`."""
        if not self._weights.judge:
            return None
        return await judged(self.worker, self._weights.judge, problem, solution, self._limits)


def silent_ones_failed(executions: list[Execution]) -> list[Execution]:
    """A group's executions; those without the judge's score have failed where it scored others of the group.

    A judge that gives this problem scores is talked out of one by the solution, which would otherwise leave the batch.
    """
    if not any(execution.judgement for execution in executions):
        return executions
    return [replace(each, status="failed") if each.unscored else each for each in executions]


def result_of(
    problem: Problem, executions: list[Execution], reward: Reward | None, metrics: dict[str, float]
) -> Result:
    """What the engine, the curves and samples.jsonl learn of a rollout; `metrics` are added to its own.

    No hidden test is in it.
    """
    last, calls = executions[-1], [call for execution in executions for call in execution.calls]
    wasted = [call for execution in executions for call in execution.wasted]
    metrics = {
        **metrics,
        "invalid": float(last.status == "invalid"),
        "worker_calls": float(sum(call.requests for call in calls)),
        "worker_tokens": float(sum(call.tokens for call in calls)),
        "worker_seconds": sum(call.seconds for call in calls),
        "latency_seconds": sum(execution.latency_s for execution in executions),
        "worker_cost_usd": sum(call.cost_usd for call in [*calls, *wasted]),
    }
    if problem.checked:
        metrics |= {"pass_rate": last.pass_rate, "solved": float(last.pass_rate == 1.0)}
    if last.judgement is not None:
        metrics |= {"judge_score": last.judgement.score, "judge_tokens": float(last.judgement.tokens)}
        metrics["judge_cost_usd"] = last.judgement.cost_usd
    if problem.shown_tests:
        metrics["public_pass_rate"] = last.public_pass_rate
    if last.status != "invalid":
        metrics["complexity"] = last.complexity
    record = {
        "difficulty": problem.difficulty,
        "workflow": last.workflow,
        "structure": last.structure,
        "worker_calls": msgspec.to_builtins(calls),
        "solution": last.solution,
        "tests": {"public": last.public_pass_rate, "hidden": last.pass_rate},
    }
    return Result(
        status=last.status,
        reward=reward,
        metrics=metrics,
        record=record,
        error=last.error,
        answered_at=last.answered_at,
    )


@cache
def guest_source() -> str:
    """The text of `guest.py`, which runs in the jail around every workflow."""
    return Path(__file__).with_name("guest.py").read_text(encoding="utf-8")
