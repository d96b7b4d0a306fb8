"""The plain code task: the policy writes the program itself, and hidden tests score it. No workflow, no workers.

It is the commonest reinforcement learning for code, and the baseline of every experiment with workflows.
"""

from __future__ import annotations

from msgspec.structs import replace

from fastgrpo.flow.solutions import public_feedback, run_all_tests, solution_of
from fastgrpo.flow.types import Execution, Problem, WorkflowLimits, status_of
from fastgrpo.types import INFRASTRUCTURE, Result, Reward, Rollout
from fastgrpo_sandbox import SandboxPool


class ProgramEnvironment:
    """Runs the policy's programs in `pool`'s jails; the reward is the share of hidden tests passed."""

    def __init__(self, pool: SandboxPool, limits: WorkflowLimits = WorkflowLimits()) -> None:  # noqa: B008 - frozen
        self._pool, self._limits = pool, limits

    def at_step(self, step: int) -> ProgramEnvironment:
        """This environment for the training step, whose tests go before those of later steps."""
        return ProgramEnvironment(self._pool, replace(self._limits, order=step))

    @staticmethod
    def prompt(problem: Problem) -> str:
        """What the policy reads: the problem's own prompt, and the form of the answer."""
        if problem.answer is not None:
            return f"{problem.prompt}\n\nWork it out step by step. The last line is `Answer: NUMBER`.\n"
        return f"{problem.prompt}\n\nAnswer with the complete program in one Python block.\n"

    async def execute(self, problem: Problem, completion: str, seed: int) -> Execution:
        """The program in a chat answer, whatever surrounds it, judged on public and hidden tests in one run."""
        code = solution_of(problem, completion)
        public, hidden = await run_all_tests(self._pool, problem, code, limits=self._limits)
        if INFRASTRUCTURE in (public.status, hidden.status):
            return Execution(status=INFRASTRUCTURE, solution=code, error=hidden.error or public.error)
        return Execution(
            status=status_of(hidden),
            solution=code,
            pass_rate=hidden.pass_rate,
            public_pass_rate=public.pass_rate,
            feedback=public_feedback(problem, public),
        )

    def feedback_text(self, execution: Execution) -> str | None:
        """What the policy reads between two rounds: public tests only; None after a failure of the jails."""
        return None if execution.status == INFRASTRUCTURE else execution.feedback

    def results(self, problem: Problem, rollouts: list[Rollout]) -> list[Result]:
        """One result for each rollout of a group, from its last program."""
        return [_result(problem, rollout.executions[-1]) for rollout in rollouts]


def _result(problem: Problem, last: Execution) -> Result:
    if last.status == INFRASTRUCTURE:
        return Result(status=INFRASTRUCTURE, error=last.error)
    metrics = {"pass_rate": last.pass_rate, "solved": float(last.pass_rate == 1.0)}
    tests = {"public": last.public_pass_rate, "hidden": last.pass_rate}
    record = {"difficulty": problem.difficulty, "solution": last.solution, "tests": tests}
    return Result(status=last.status, reward=Reward(total=last.pass_rate), metrics=metrics, record=record)
