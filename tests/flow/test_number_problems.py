"""Problems that ask for a number: the same workflow without tests, its answer compared by the host."""

from __future__ import annotations

import asyncio
from collections import Counter
from statistics import fmean
from typing import Any

import pytest
from msgspec.structs import replace

from fastgrpo.flow import messages
from fastgrpo.flow.baselines import WORKFLOWS, completion
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.operators import OperatorHost
from fastgrpo.flow.problems.numbers import NumberProblem, is_right
from fastgrpo.flow.programs import ProgramEnvironment
from fastgrpo.flow.prompt import query_prompt
from fastgrpo.flow.solutions import NO_PUBLIC_TESTS
from fastgrpo.flow.types import Problem, Request, WorkflowLimits
from fastgrpo.flow.workers.simulated import SKILLS, SimulatedWorker
from fastgrpo.types import Rollout
from fastgrpo_sandbox import CallError, SandboxPool
from tests.flow.conftest import ScriptedWorker

NUMBER: Problem = NumberProblem("Tom has 3 apples and eats one. How many are left?", "3 - 1 = 2\n#### 2").problem("n/1")
NO_POOL: Any = None


def call(worker: ScriptedWorker, method: str, **params: Any) -> tuple[Any, OperatorHost]:
    host = OperatorHost(NUMBER, worker, NO_POOL, WorkflowLimits(), 0)
    return asyncio.run(host(method, params)), host


def test_a_draft_is_all_that_the_worker_says_without_its_thought() -> None:
    worker = ScriptedWorker("<think>3?</think>\n3 - 1 = 2\nAnswer: 2\n")
    assert call(worker, "generate", instruction="")[0] == "3 - 1 = 2\nAnswer: 2"
    [request] = worker.requests
    assert "Answer: NUMBER" in request.messages[0]["content"]
    assert "entry point" not in request.messages[1]["content"]


def test_the_test_operator_says_that_there_are_no_tests_and_asks_nobody() -> None:
    worker = ScriptedWorker("Answer: 2")
    assert call(worker, "test", code="Answer: 3", retries=2)[0] == (False, "Answer: 3", NO_PUBLIC_TESTS)
    assert worker.requests == []


def test_an_ensemble_is_the_majority_and_costs_no_request() -> None:
    worker = ScriptedWorker("A")
    chosen, host = call(worker, "ensemble", codes=["Answer: 3", "it is 2", "\\boxed{2}"])
    assert chosen == "it is 2"
    assert (worker.requests, host.calls[0].requests) == ([], 0)


def test_votes_are_bounded_as_calls_are() -> None:
    """Each is read by the host: a workflow that votes without end would hold up all others."""
    host = OperatorHost(NUMBER, ScriptedWorker("A"), NO_POOL, WorkflowLimits(calls=2), 0)

    async def vote() -> None:
        for _ in range(3):
            await host("ensemble", {"codes": ["Answer: 3"]})

    with pytest.raises(CallError, match="used up its 2"):
        asyncio.run(vote())


def test_reviews_and_revisions_read_a_solution_that_is_no_program() -> None:
    for chat in (messages.review(NUMBER, "Answer: 3"), messages.revise(NUMBER, "Answer: 3", "Too many.")):
        assert "Solution:\nAnswer: 3" in chat[1]["content"]
        assert "ython" not in str(chat)


def test_the_policy_is_told() -> None:
    assert "asks for a number" in query_prompt(NUMBER, "full")
    assert "asks for a number" not in query_prompt(replace(NUMBER, answer=None), "full")
    assert ProgramEnvironment.prompt(NUMBER).endswith("`Answer: NUMBER`.\n")


def test_a_plain_answer_is_compared_without_a_jail() -> None:
    environment = ProgramEnvironment(NO_POOL)
    right, wrong = (asyncio.run(environment.execute(NUMBER, text, 0)).pass_rate for text in ("So 2.", "So 3."))
    assert (right, wrong) == (1.0, 0.0)


def drafts(difficulty: float, count: int, operator: Any = "generate", **fields: Any) -> list[str]:
    """Answers of the simulated worker, which needs no jail for numbers."""

    async def main() -> list[str]:
        worker = SimulatedWorker(NO_POOL, seed=3)
        problem = replace(NUMBER, difficulty=difficulty)
        requests = (
            Request(operator=operator, problem=problem, messages=messages.generate(problem, ""), seed=seed, **fields)
            for seed in range(count)
        )
        return [(await worker.ask(request)).text for request in requests]

    return asyncio.run(main())


def test_the_simulated_worker_errs_by_difficulty_and_in_several_ways() -> None:
    assert fmean(is_right(text, "2") for text in drafts(0.0, 200)) > 0.95
    hard = drafts(1.0, 200)
    assert fmean(is_right(text, "2") for text in hard) == pytest.approx(SKILLS["large"].generates(1.0), abs=0.1)
    assert len(Counter(hard)) == 6
    assert all(text.startswith("3 - 1 = 2\nAnswer: ") for text in hard)


def test_the_simulated_worker_reviews_and_revises_numbers() -> None:
    verdicts = drafts(0.5, 100, "review", codes=("I say Answer: 2",))
    assert 0 < verdicts.count("Verdict: correct") - 80 <= 20
    assert 0 < fmean(is_right(text, "2") for text in drafts(0.5, 100, "revise", codes=("Answer: 3",))) < 0.3


@pytest.mark.jail
def test_workflows_are_scored_by_the_answer_that_they_return() -> None:
    async def main() -> Any:
        async with SandboxPool(cells=1) as pool:
            worker = ScriptedWorker("Answer: 3", "Answer: 2", "It is 2.")
            environment = WorkflowEnvironment(pool, worker)
            texts = [completion(WORKFLOWS[name]) for name in ("3 generate, ensemble", "until passed")]
            rollouts = [Rollout([], [], [], [text], [await environment.execute(NUMBER, text, 1)]) for text in texts]
            return environment.results(NUMBER, rollouts), rollouts

    (voted, tested), rollouts = asyncio.run(main())
    assert [each.metrics["solved"] for each in (voted, tested)] == [1.0, 1.0]
    assert "public_pass_rate" not in voted.metrics
    assert tested.metrics["worker_calls"] == 4
    assert rollouts[1].executions[0].feedback == NO_PUBLIC_TESTS
