"""Measures of adaptivity on policies whose adaptivity is known."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest

from fastgrpo.flow.adaptivity import (
    Estimate,
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
    # All that the bins can tell, without the bias that it would have with less certain cells.
    assert measures["cost_information"] == measures["cost_information_high"] == pytest.approx(math.log(3))
    assert math.log(3) - 0.1 < measures["cost_information_low"] < math.log(3)


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


def test_information_is_that_of_the_cells_that_can_occur() -> None:
    """Easy problems cost 1, others 2 or 3 by chance: the mean over all such tables, by their exact probabilities."""

    def tables() -> Iterator[tuple[float, Estimate]]:
        for twos in range(11):  # of the 10 of middle difficulty; of all 20 that are not easy, 10 cost 2
            costs = [1.0] * 10 + [2.0] * twos + [3.0] * 10 + [2.0] * (10 - twos)
            found = cost_information([Observed(f"p{p:02}", p, cost, "s") for p, cost in enumerate(costs)])
            yield math.comb(10, twos) * math.comb(10, 10 - twos) / math.comb(20, 10), found

    true = math.log(3) - 2 / 3 * math.log(2)
    found = list(tables())
    assert sum(probability * estimate.value for probability, estimate in found) == pytest.approx(true, abs=0.004)
    covered = sum(probability for probability, estimate in found if estimate.low <= true <= estimate.high)
    assert covered > 0.9
    assert all(estimate.low < estimate.value <= estimate.high for _, estimate in found)


@pytest.mark.parametrize(("noise", "true"), [(0.1, 0.616), (0.2, 0.376)])
def test_the_interval_holds_what_300_000_problems_tell(noise: float, true: float) -> None:
    def drawn(problems: int, seed: int) -> Estimate:
        draw = random.Random(seed)
        where = [draw.random() for _ in range(problems)]
        return cost_information([Observed(f"p{p}", x, x + draw.gauss(0, noise), "s") for p, x in enumerate(where)])

    found = [drawn(60, seed) for seed in range(1, 21)]
    assert sum(estimate.low <= true <= estimate.high for estimate in found) >= 16
    assert all(estimate.low < estimate.value <= estimate.high for estimate in found)
    assert sum(estimate.value for estimate in found) / len(found) == pytest.approx(true, abs=0.035)


def test_costs_that_many_problems_share_keep_bins_of_their_own() -> None:
    costs = [1.0] * 18 + [2.0] * 22 + [3.0] * 20
    found = cost_information([Observed(f"p{p:02}", cost, cost, "s") for p, cost in enumerate(costs)])
    assert found.value == pytest.approx(entropy(costs))


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
