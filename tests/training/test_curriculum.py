"""Problems that are sometimes solved come often, others seldom; what is drawn follows seed, step and rates alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.rollouts.experience import Tally, add_passes, pass_rate, tally_of
from fastgrpo.training.curriculum import Curriculum, draw_problems
from fastgrpo.types import Group, Result, Reward, Rollout

PROBLEMS: list[Any] = [SimpleNamespace(id=f"p{number}") for number in range(40)]


def configuration(share: float, **grpo: Any) -> Config:
    return resolve({"grpo.curriculum": share, "grpo.prompts_per_step": 8} | {f"grpo.{k}": v for k, v in grpo.items()})


def learned() -> Curriculum:
    """p0 to p9 are solved half of the time, p10 to p24 always, p25 to p39 never."""
    curriculum = Curriculum()
    for number in range(40):
        curriculum.add({f"p{number}": (8 if number < 10 else 16 if number < 25 else 0, 16)})
    return curriculum


def drawn(share: float, steps: int, curriculum: Curriculum) -> Counter[bool]:
    config = configuration(share)
    chosen = [p for step in range(steps) for p in draw_problems(PROBLEMS, config, step, 0, curriculum)]
    return Counter(int(problem.id[1:]) < 10 for problem in chosen)


def test_what_is_sometimes_solved_comes_more_often() -> None:
    assert drawn(0.0, 50, learned())[True] == 100, "evenly: a quarter of 400"
    assert 150 < drawn(0.5, 50, learned())[True] < drawn(1.0, 50, learned())[True]
    assert drawn(1.0, 50, learned())[False] > 10, "never not at all"


def test_without_rates_the_draw_is_even_and_none_comes_twice_in_a_step() -> None:
    config, seen = configuration(1.0), Counter[str]()
    for step in range(200):
        chosen = [problem.id for problem in draw_problems(PROBLEMS, config, step, 0, Curriculum())]
        assert len(set(chosen)) == 8
        seen.update(chosen)
    assert 15 < min(seen.values()) <= max(seen.values()) < 75
    few = draw_problems(PROBLEMS[:3], config, 0, 0, Curriculum())
    assert Counter(problem.id for problem in few).keys() == {"p0", "p1", "p2"}
    assert len(few) == 8


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_replicas_share_one_draw_and_further_batches_have_their_own(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, curriculum = configuration(share, refill=2), learned()
    whole = draw_problems(PROBLEMS, config, 3, 0, curriculum)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("fastgrpo.training.curriculum.replica_share", lambda _, rank=rank: slice(rank, None, 2))
        parts.append(draw_problems(PROBLEMS, config, 3, 0, curriculum))
    assert parts == [whole[::2], whole[1::2]]
    monkeypatch.undo()
    assert draw_problems(PROBLEMS, config, 3, 1, curriculum) != whole


def test_rates_survive_a_resume_and_follow_the_policy(tmp_path: Path) -> None:
    curriculum, again = learned(), Curriculum()
    (tmp_path / "rates.json").write_bytes(curriculum.encoded())
    again.load(tmp_path / "rates.json")
    config = configuration(0.5)
    for step in range(5):
        assert draw_problems(PROBLEMS, config, step, 0, again) == draw_problems(PROBLEMS, config, step, 0, curriculum)
    before = again.weight("p0")
    for _ in range(4):
        again.add({"p0": (8.0, 8.0)})
    assert again.weight("p0") < before / 3


def test_a_steps_pass_rates_add_up_over_groups_and_ranks() -> None:
    def rollout(total: float | None, **metrics: float) -> Rollout:
        reward = None if total is None else Reward(total=total)
        return Rollout([1], [1], [0.0], ["x"], result=Result(reward=reward, metrics=metrics))

    group = Group(PROBLEMS[0], "", [rollout(5.0, pass_rate=0.5), rollout(-2.0), rollout(None), rollout(0.25)])
    tally = tally_of([group, group], 1.0)
    assert tally.passes == {}
    add_passes(tally, [group, group])
    assert tally.passes == {"p0": (1.5, 6)}
    assert Tally.merged([tally, tally]).passes == {"p0": (3.0, 12)}
    assert pass_rate(rollout(7.0).result) == 1.0
