"""The soft overlong punishment, at the lengths where it begins and ends."""

from __future__ import annotations

import pytest

from fastgrpo.config import Grpo
from fastgrpo.config_keys import resolve
from fastgrpo.training.advantage import overlong_penalty, shape_rewards
from fastgrpo.types import INFRASTRUCTURE, UNENDED, Group, Result, Reward, Rollout


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (20481, -1.0)]
)
def test_the_penalty_is_that_of_the_paper(length: int, penalty: float) -> None:
    assert overlong_penalty(length, limit=20480, soft=4096) == penalty


def rollout(*masks: int, truncated: bool = False, reward: bool = True) -> Rollout:
    mask = [bit for number, length in enumerate(masks) for bit in [(number + 1) % 2] * length]
    result = Result(reward=Reward(total=1.0, terms={"tests": 1.0})) if reward else UNENDED
    return Rollout([1] * len(mask), mask, [0.0] * len(mask), [], truncated=truncated, result=result)


def test_the_longest_completion_decides_and_a_truncated_one_costs_everything() -> None:
    # Lengths alternate between what the policy wrote and feedback.
    group = Group(None, "", [rollout(6), rollout(7, 30, 8), rollout(2, truncated=True), rollout(9, reward=False)])
    shape_rewards([group], resolve({"grpo.max_new_tokens": 10, "grpo.overlong_penalty_tokens": 4}).grpo)
    assert [r.reward and r.reward.total for r in group.rollouts] == [1.0, 0.5, 0.0, None]
    assert group.rollouts[1].result.reward == Reward(total=0.5, terms={"tests": 1.0, "overlong": -0.5})
    assert group.rollouts[3].result.status == INFRASTRUCTURE


def test_rewards_are_the_environments_alone_unless_it_is_set() -> None:
    group = Group(None, "", [rollout(2000, truncated=True)])
    shape_rewards([group], Grpo())
    assert group.rollouts[0].result.reward == Reward(total=1.0, terms={"tests": 1.0})
