"""Numbers and records of a step's rollouts."""

import json
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from fastgrpo.config import Grpo
from fastgrpo.rollouts.environment import checked_results, failed
from fastgrpo.rollouts.experience import (
    Experience,
    Tally,
    add_lag,
    first_failure,
    from_bytes,
    sample_records,
    tally_of,
    tally_over_ranks,
    to_bytes,
)
from fastgrpo.training.advantage import to_samples
from fastgrpo.types import Group, Result, Reward, Rollout

PROBLEM = SimpleNamespace(id="p", solution="SECRET")


def rollout(total: float | None, *, tokens: int = 4, **metrics: float) -> Rollout:
    result = Result(reward=Reward(total=total or 0.0, terms={"right": total or 0.0}), metrics=metrics)
    if total is None:
        result = Result(status="infrastructure", error="the endpoint is down")
    size = tokens + 2
    return Rollout([1] * size, [0, 0] + [1] * tokens, [0.0] * size, ["text"], result=result, versions=[0] * size)


def group(*rollouts: Rollout) -> Group:
    return Group(PROBLEM, "def f():", list(rollouts))


def test_failures_of_the_environment_count_apart_and_move_no_mean() -> None:
    groups = [group(rollout(1.0), rollout(0.0), rollout(None))]
    numbers = tally_of(groups, seconds=2.0).values()
    assert numbers["infrastructure"] == 1
    assert numbers["reward/total"] == numbers["reward/right"] == 0.5
    assert numbers["tokens_per_s"] == 6.0
    assert numbers["groups_without_variance"] == 0.0
    assert first_failure(groups) == "the endpoint is down"


def test_the_first_failure_of_all_ranks_is_kept() -> None:
    tallies = [Tally(), tally_of([group(rollout(1.0))], 1.0), tally_of([group(rollout(None))], 1.0), Tally(failure="b")]
    assert Tally.merged(tallies).failure == "the endpoint is down"
    assert Tally.merged(tallies[:2]).failure == ""


@pytest.mark.parametrize(
    ("terms", "varied"),
    [
        ([{"right": 1.0, "short": 0.0}, {"right": 0.0, "short": 1.0}], 1),
        ([{"right": 1.0, "short": 0.0}, {"right": 1.0, "short": 0.0}], 0),
        ([{"right": 1.0}, {"short": 1.0}], 0),
        ([{"right": 1.0, "free": 0.0}, {"right": 1.0, "free": 1.0}], 0),
    ],
)
def test_a_group_varies_by_terms_where_one_of_a_weight_does(terms: list[dict[str, float]], varied: int) -> None:
    """As its advantages do with grpo.reward_scale terms, whatever the totals."""
    weights = {"right": 1.0, "short": 0.5, "free": 0.0}
    rollouts = [rollout(1.0) for _ in terms]
    for each, own in zip(rollouts, terms, strict=True):
        each.result = Result(reward=Reward(total=1.0, terms=own, weights=weights))
    (tally, plain) = (tally_of([group(*rollouts)], 1.0, by_terms=each).values() for each in (True, False))
    assert (tally["groups_without_variance"], plain["groups_without_variance"]) == (1 - varied, 1)
    samples = to_samples([group(*rollouts)], Grpo(reward_scale="terms"))
    assert len(samples) == 2 * varied


def test_a_group_varies_where_its_advantages_do() -> None:
    """A reward whose terms were added in another order is off by 6e-17, which fp32 advantages do not see."""
    alike = group(rollout(0.1 + 0.2), rollout(0.3))
    assert alike.rollouts[0].reward != alike.rollouts[1].reward
    assert [sample.advantage for sample in to_samples([alike], Grpo(normaliser="sequence"))] == [0.0, 0.0]
    assert tally_of([alike], seconds=1.0).values()["groups_without_variance"] == 1.0
    assert tally_of([group(rollout(0.3), rollout(0.3 + 1e-6))], 1.0).values()["groups_without_variance"] == 0.0


def test_a_metric_is_the_mean_of_the_rollouts_that_have_it() -> None:
    numbers = tally_of([group(rollout(1.0, depth=3.0), rollout(0.0), rollout(0.5, depth=1.0))], seconds=1.0).values()
    assert numbers["depth"] == 2.0


def test_a_step_of_nothing_but_failures_still_has_numbers() -> None:
    numbers = tally_of([group(rollout(None))], seconds=1.0).values()
    assert numbers["infrastructure"] == 1
    assert numbers["groups_without_variance"] == 1.0
    assert "reward/total" not in numbers


def test_a_metric_by_the_name_of_the_loop_s_own_is_logged_beside_it() -> None:
    where = {"stage": 3.0, "step": 7.5, "time": 1.0}
    values = tally_of([group(rollout(1.0, entropy=3.0, rollouts=5.0, depth=2.0, **where))], 1.0).values()
    assert {name: values[f"environment/{name}"] for name in where} == where
    assert not where.keys() & values.keys()
    assert (values["environment/entropy"], values["environment/rollouts"], values["depth"]) == (3.0, 5.0, 2.0)
    assert (values["rollouts"], "entropy" in values) == (1.0, False)
    result = Result(reward=Reward(total=1.0, terms={"total": 3.0}), metrics={"reward/total": 5.0, "gpu/joules": 2.0})
    values = tally_of([group(Rollout([1], [1], [0.0], ["text"], result=result))], 1.0).values()
    assert (values["reward/total"], values["environment/gpu/joules"]) == (1.0, 2.0)
    assert values["environment/reward/total"] == 4.0


def test_a_record_by_the_name_of_a_line_s_own_field_is_kept_beside_it() -> None:
    result = Result(reward=Reward(total=1.0), record={"reward": "much", "step": 3, "stage": 4, "note": "x"})
    (line,) = sample_records([group(Rollout([1], [1], [0.0], ["text"], result=result, versions=[0]))])
    assert (line["reward"]["total"], line["environment/reward"], line["environment/step"]) == (1.0, "much", 3)
    assert (line["note"], line["environment/stage"]) == ("x", 4)
    assert not {"step", "stage"} & line.keys()


def test_ranks_with_unequal_shares_have_the_metrics_of_all_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [
        [group(rollout(1.0, depth=1.0), rollout(None), rollout(0.2, tokens=9))],
        [group(rollout(0.5), rollout(0.5, depth=4.0), rollout(0.0))] * 2,
        [group(*[rollout(None)] * 3)],
        [],
    ]
    whole = tally_of([group for share in shares for group in share], seconds=2.0)
    ranks = [tally_of(share, seconds=2.0) if share else Tally() for share in shares]
    monkeypatch.setattr("fastgrpo.rollouts.experience.gather_all", lambda value, what: ranks)
    assert tally_over_ranks(ranks[0]).values() == pytest.approx(whole.values())


def test_records_of_any_kind_survive_a_checkpoint() -> None:
    """What a task adds to a record, and an error's text, are its own."""
    plain = Result(reward=Reward(total=1.0), record={"seen": {1: {"a"}, "of": PROBLEM}}, error="no file \udc80")
    one, other = rollout(1.0), rollout(None)
    (one.result,) = checked_results([plain], 1)
    other.result = failed("no file \udc80")
    problem = SimpleNamespace(id=7)
    rows = list(sample_records([Group(problem, "def f():", [one, other])]))
    (again,) = from_bytes(to_bytes([Experience([], Tally(), rows)]))
    assert [row["problem_id"] for row in again.records] == ["7", "7"]
    assert [row["error"] for row in again.records] == ["no file ?"] * 2
    assert again.records[0]["seen"] == {"1": ["a"], "of": repr(PROBLEM)}


def test_experience_survives_a_checkpoint() -> None:
    experience = Experience([], tally_of([group(rollout(1.0))], seconds=1.0), [{"step": 1}])
    assert from_bytes(to_bytes([experience] * 2)) == [experience] * 2
    # The tokens of a second turn keep what they had as the first one's.
    one = rollout(1.0)
    one.add_routes(np.full((3, 2, 1), 4, np.int16))
    one.add_routes(np.full((5, 2, 1), 300, np.int16))
    samples = to_samples([group(one, rollout(0.0))], Grpo())
    (again,) = from_bytes(to_bytes([Experience(samples, Tally(), [])]))
    routes = again.samples[0].routes
    assert routes is not None
    assert routes.dtype == np.int16
    assert routes[:, 1, 0].tolist() == [4, 4, 4, 300, 300, -1]
    assert again.samples[1].routes is None
    # As checkpoints of one step's had it.
    assert from_bytes(msgspec.msgpack.encode(experience)) == [experience]


def test_records_are_plain_and_hold_no_secret() -> None:
    one = rollout(0.5)
    one.result = msgspec.structs.replace(one.result, record={"solution": "def f(): pass"})
    (record,) = sample_records([group(one)])
    assert record["solution"] == "def f(): pass"
    assert record["reward"] == {"total": 0.5, "terms": {"right": 0.5}}
    assert "SECRET" not in msgspec.json.encode(record).decode()
    assert json.loads(msgspec.json.encode(record)).keys() == record.keys()


def test_the_lag_of_tokens_is_counted_in_updates() -> None:
    one, other = rollout(1.0, tokens=3), rollout(0.0, tokens=1)
    one.versions[2:], other.versions[2:] = [4, 4, 6], [7]
    tally = Tally()
    add_lag(tally, [group(one, other)], step=7)
    add_lag(later := Tally(), [group(other)], step=8)
    assert tally.values()["lag"] == (3 + 3 + 1 + 0) / 4
    assert Tally.merged([tally, later]).values()["lag_max"] == 3.0
    assert [record["versions"] for record in sample_records([group(one, other)])] == [[(4, 2), (6, 1)], [(7, 1)]]
