"""What the engine learns of a group of workflows: rewards, curves, records."""

from __future__ import annotations

import math
from typing import Any

import pytest
from msgspec.structs import replace

from fastgrpo.config import RewardWeights
from fastgrpo.flow.baselines import WORKFLOWS
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.types import Execution, WorkerCall
from fastgrpo.types import Rollout
from tests.flow.conftest import ADD, RIGHT, ScriptedWorker, TrustingPool

CALL = WorkerCall(operator="generate", requests=1, answered=1, prompt_tokens=60, completion_tokens=40, cost_usd=0.5)
ONE = Execution(status="ok", workflow=WORKFLOWS["generate"], structure="generate", pass_rate=1.0, calls=(CALL,))
TWO = Execution(status="ok", workflow=WORKFLOWS["until passed"], structure="until(generate test)", calls=(CALL, CALL))
OURS = Execution(status="infrastructure", error="the worker is down", workflow=WORKFLOWS["generate"])


def results(*groups: list[Execution]) -> list[Any]:
    pool: Any = TrustingPool()
    rollouts = [Rollout([], [], [], [], executions) for executions in groups]
    return WorkflowEnvironment(pool, ScriptedWorker(RIGHT)).results(ADD, rollouts)


def test_a_groups_cost_and_structures_are_measured() -> None:
    one, two, invalid = (each.metrics for each in results([ONE], [TWO], [Execution(status="invalid")]))
    assert (one["spent"], two["spent"], invalid["spent"]) == (1.0, 2.0, 0.0)
    assert (two["worker_calls"], two["worker_tokens"], two["worker_cost_usd"]) == (2.0, 200.0, 1.0)
    assert one["structure_entropy"] == pytest.approx(math.log(2))
    assert results([ONE], [ONE])[0].metrics["structure_entropy"] == 0.0


def test_rounds_are_paid_and_the_last_one_is_rewarded() -> None:
    [both] = results([TWO, ONE])
    assert (both.metrics["worker_calls"], both.metrics["spent"], both.metrics["solved"]) == (3.0, 1.0, 1.0)
    assert both.record["structure"] == "generate"


def test_a_failure_of_ours_has_no_reward_and_its_calls_are_dollars_but_no_fault() -> None:
    repeated = Execution(status="ok", workflow=ONE.workflow, structure="generate", calls=(CALL,), wasted=(CALL, CALL))
    ours, again = results([OURS], [repeated])
    assert ours.reward is None
    assert (again.metrics["spent"], again.metrics["worker_cost_usd"]) == (1.0, 1.5)


def test_costs_follow_the_step_and_whatever_a_caller_has_changed_stays() -> None:
    pool: Any = TrustingPool()
    weights = RewardWeights(complexity=0.2, warmup_steps=2)
    growing = WorkflowEnvironment(pool, ScriptedWorker(RIGHT), weights=weights)
    growing.score = growing.execute
    group = [Rollout([], [], [], [], [replace(ONE, complexity=0.5)])]
    costs = [growing.at_step(step).results(ADD, group)[0].reward.terms["complexity"] for step in range(3)]
    assert costs == pytest.approx([0.0, 0.05, 0.1])
    assert growing.at_step(0).score == growing.execute
    assert growing.results(ADD, group)[0].reward.terms["complexity"] == pytest.approx(0.1)
