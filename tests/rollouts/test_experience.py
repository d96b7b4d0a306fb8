"""Numbers and records of a step's rollouts."""

import json
from types import SimpleNamespace

import msgspec
import pytest

from fastgrpo.rollouts.experience import rollout_metrics, rollouts_over_ranks, sample_records
from fastgrpo.types import Execution, Group, RewardTerms, Rollout, WorkerCall

CALL = WorkerCall(operator="generate", prompt_tokens=10, completion_tokens=5, cost_usd=0.25, seconds=1.0)
PROBLEM = SimpleNamespace(id="p", prompt="def f():", difficulty=0.5, solution="SECRET", hidden_tests="SECRET")


def rollout(total: float | None, *, status: str = "ok", tokens: int = 4) -> Rollout:
    execution = Execution(status=status, pass_rate=total or 0.0, complexity=0.2, calls=(CALL,))  # type: ignore[arg-type]
    terms = None
    if total is not None:
        terms = RewardTerms(total=total, performance=total, complexity=0.0, diversity=0.0, format=0.0)
    return Rollout([1] * (tokens + 2), [0, 0] + [1] * tokens, [0.0] * (tokens + 2), ["text"], [execution], reward=terms)


def test_our_own_failures_count_apart_and_move_no_mean() -> None:
    group = Group(PROBLEM, [rollout(1.0), rollout(0.0, status="invalid"), rollout(None, status="infrastructure")])
    metrics = rollout_metrics([group], seconds=2.0)
    assert metrics["infrastructure"] == 1
    assert metrics["reward/total"] == metrics["pass_rate"] == 0.5
    assert metrics["invalid"] == 0.5
    assert metrics["tokens_per_s"] == 6.0
    assert metrics["worker_cost_usd"] == pytest.approx(0.5)
    assert metrics["groups_without_variance"] == 0.0


def test_a_step_of_nothing_but_failures_still_has_numbers() -> None:
    metrics = rollout_metrics([Group(PROBLEM, [rollout(None, status="infrastructure")])], seconds=1.0)
    assert metrics["infrastructure"] == 1
    assert metrics["groups_without_variance"] == 1.0


def test_the_workers_cost_is_that_of_every_round() -> None:
    patient = rollout(1.0)
    patient.executions *= 3
    assert rollout_metrics([Group(PROBLEM, [rollout(1.0), patient])], seconds=1.0)["worker_cost_usd"] == 1.0


def test_ranks_with_unequal_shares_have_the_metrics_of_all_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [
        [Group(PROBLEM, [rollout(1.0), rollout(None, status="infrastructure"), rollout(0.2, tokens=9)])],
        [Group(PROBLEM, [rollout(0.5), rollout(0.5), rollout(0.0, status="invalid")])] * 2,
        [Group(PROBLEM, [rollout(None, status="infrastructure")] * 3)],
    ]
    whole = rollout_metrics([group for share in shares for group in share], seconds=2.0)
    ranks = [rollout_metrics(share, seconds=2.0) for share in shares]
    for everyone in (ranks, [whole, dict.fromkeys(whole, 0.0)]):
        monkeypatch.setattr("fastgrpo.rollouts.experience.gather_all", lambda value, what, everyone=everyone: everyone)
        assert rollouts_over_ranks(ranks[0]) == pytest.approx(whole)


def test_records_are_plain_and_hold_no_secret() -> None:
    (record,) = sample_records([Group(PROBLEM, [rollout(0.5)])])
    assert record["worker_calls"][0]["cost_usd"] == 0.25
    assert record["tests"] == {"public": 0.0, "hidden": 0.5}
    assert "SECRET" not in msgspec.json.encode(record).decode()
    assert json.loads(msgspec.json.encode(record)).keys() == record.keys()
