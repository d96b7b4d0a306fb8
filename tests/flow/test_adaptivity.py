"""Measures of adaptivity on policies whose adaptivity is known."""

from __future__ import annotations

import math
import random

import pytest

from fastgrpo.flow.adaptivity import (
    Observed,
    adaptivity,
    cost_hard_over_easy,
    cost_information,
    entropy,
    observed_of,
)
from fastgrpo.flow.baselines import WORKFLOWS


def observed(cost: dict[int, float], problems: int = 60, samples: int = 4, noise: float = 0.0) -> list[Observed]:
    """`cost` by third of difficulty, each cost with a structure of its own."""
    draw = random.Random(0)
    return [
        Observed(f"p{p:02}", p / problems, value + draw.uniform(0, noise), f"structure {value}")
        for p in range(problems)
        for value in [cost[p * 3 // problems]]
        for _ in range(samples)
    ]


def test_a_policy_that_spends_by_difficulty() -> None:
    measures = adaptivity(observed({0: 1.0, 1: 2.0, 2: 3.0}))
    assert measures["cost_hard_over_easy"] == measures["cost_hard_over_easy_low"] == pytest.approx(3.0)
    assert measures["structures"] == measures["structures_by_problem"] == 3
    assert measures["structure_entropy"] == pytest.approx(math.log(3))
    # The estimate is corrected for the bias that it would have with fewer certain bins.
    assert measures["cost_information"] == pytest.approx(math.log(3) - 4 / 120)


def test_a_collapsed_policy() -> None:
    measures = adaptivity(observed({0: 1.0, 1: 1.0, 2: 1.0}))
    assert measures["cost_hard_over_easy"] == measures["cost_hard_over_easy_high"] == 1.0
    assert (measures["structures"], measures["structure_entropy"], measures["cost_information"]) == (1.0, 0.0, 0.0)


def test_cost_by_chance_carries_no_information() -> None:
    found = [cost_information(by_chance(seed)) for seed in range(10)]
    assert abs(sum(estimate.value for estimate in found)) / len(found) < 0.03
    assert sum(estimate.low <= 0.0 <= estimate.high for estimate in found) >= 8
    ratios = [cost_hard_over_easy(by_chance(seed)) for seed in range(10)]
    assert sum(estimate.low <= 1.0 <= estimate.high for estimate in ratios) >= 8


def by_chance(seed: int) -> list[Observed]:
    draw = random.Random(seed)
    return [Observed(f"p{p:02}", p / 60, draw.choice((1.0, 2.0, 3.0, 4.0)), "s") for p in range(60)]


def test_chance_within_a_problem_is_no_choice_between_problems() -> None:
    rows = [Observed(f"p{p}", p / 9, 1.0, "often" if n else f"rare {p}") for p in range(9) for n in range(4)]
    measures = adaptivity(rows)
    assert (measures["structures"], measures["structures_by_problem"]) == (10.0, 1.0)


def test_the_interval_holds_the_value_and_repeats() -> None:
    rows = observed({0: 1.0, 1: 1.5, 2: 2.0}, noise=2.0)
    for estimate in (cost_hard_over_easy, cost_information):
        value, low, high = estimate(rows)
        assert low < value < high
        assert estimate(rows) == estimate(rows)


def test_too_few_problems_and_free_ones_are_no_error() -> None:
    assert adaptivity([]) == {}
    assert adaptivity([Observed("a", 0.0, 1.0, ""), Observed("b", 1.0, 1.0, "")]) == {}
    assert math.isnan(cost_hard_over_easy([Observed(f"p{p}", p, 0.0, "") for p in range(6)]).value)


def test_rows_of_an_evaluation_are_read() -> None:
    row = {
        "problem_id": "p",
        "difficulty": 0.5,
        "workflow": WORKFLOWS["until passed"],
        "metrics": {"spent": 9.0},
    }
    broken = row | {"workflow": "no code", "metrics": {"spent": 0.0}}
    unknown = row | {"difficulty": None}
    assert observed_of([row, broken, unknown]) == [
        Observed("p", 0.5, 9.0, "until(generate test)"),
        Observed("p", 0.5, 0.0, ""),
    ]
    assert observed_of([row | {"metrics": {"worker_seconds": 9.0}}]) == []


def test_entropy() -> None:
    assert entropy("aabb") == pytest.approx(math.log(2))
    assert entropy("") == 0.0
