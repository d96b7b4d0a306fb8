"""Does the policy write what each query deserves? Structures over problems, and executed cost against difficulty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastgrpo.flow.parse import InvalidWorkflow, parse_code
from fastgrpo.flow.structure import structure_of

_DRAWS = 2000
_BINS = 3


class Observed(NamedTuple):
    """One workflow that was run: its problem, the problem's difficulty, the workflow's cost and canonical structure."""

    problem_id: str
    difficulty: float
    cost: float
    structure: str


class Estimate(NamedTuple):
    """A value and its 95 % bootstrap interval over problems."""

    value: float
    low: float
    high: float


def observed_of(rows: Iterable[Mapping[str, Any]]) -> list[Observed]:
    """What an evaluation's rows {problem_id, difficulty, workflow, metrics} tell; the cost is the metric `spent`.

    That is in single calls of the same problem: tokens alone would say that a longer problem, which is the harder one,
    costs more whatever the workflow.
    Rows without a difficulty are left out; a text that is no workflow has no structure.
    """
    return [
        Observed(row["problem_id"], row["difficulty"], row["metrics"]["spent"], structure(row["workflow"]))
        for row in rows
        if row["difficulty"] is not None and "spent" in row["metrics"]
    ]


def structure(source: str) -> str:
    """The canonical structure of a workflow's code; empty for a text that is no workflow."""
    try:
        return structure_of(parse_code(source))
    except InvalidWorkflow:
        return ""


def adaptivity(observed: Sequence[Observed]) -> dict[str, float]:
    """The measures of this file by name, of at least three problems; empty for fewer.

    `structures`: distinct ones; `structures_by_problem`: distinct ones among each problem's commonest, so that chance
    does not count as choice; `structure_entropy` in nats; `cost_information` in nats and `cost_hard_over_easy`, each
    with `_low` and `_high`.
    """
    if len({each.problem_id for each in observed}) < _BINS:
        return {}
    measures = {
        "structures": float(len({each.structure for each in observed})),
        "structures_by_problem": float(len(set(_commonest(observed)))),
        "structure_entropy": entropy(each.structure for each in observed),
    }
    for name, estimate in (
        ("cost_information", cost_information(observed)),
        ("cost_hard_over_easy", cost_hard_over_easy(observed)),
    ):
        measures |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return measures


def entropy(values: Iterable[Hashable]) -> float:
    """Shannon's entropy of how often each value occurs, in nats."""
    counts = Counter(values)
    return sum(-n / counts.total() * math.log(n / counts.total()) for n in counts.values())


def cost_hard_over_easy(observed: Sequence[Observed]) -> Estimate:
    """Mean executed cost on the hardest third of the problems over that on the easiest; nan where the latter is 0."""
    difficulty, cost = _by_problem(observed)
    ranked = cost[np.argsort(difficulty, kind="stable")]
    easiest, _, hardest = np.array_split(ranked, 3)
    if not easiest.any():
        return Estimate(math.nan, math.nan, math.nan)

    def ratio(draw: np.random.Generator | None) -> float:
        easy, hard = ((part if draw is None else draw.choice(part, len(part))).mean() for part in (easiest, hardest))
        return float(hard / easy) if easy else math.nan

    return _estimate(ratio)


def cost_information(observed: Sequence[Observed]) -> Estimate:
    """Mutual information between a problem's difficulty and its mean executed cost, in nats, each in three bins.

    Bins have equal numbers of problems as far as ties allow. The plug-in estimate is too large by about
    (3 - 1)(3 - 1) / 2n for n problems (Miller, 1955), and that of a resample once more: both are corrected.
    """
    difficulty, cost = map(_binned, _by_problem(observed))
    bias = (len(np.unique(difficulty)) - 1) * (len(np.unique(cost)) - 1) / (2 * len(cost))

    def information(draw: np.random.Generator | None) -> float:
        chosen = np.arange(len(cost)) if draw is None else draw.integers(len(cost), size=len(cost))
        table = np.zeros((_BINS, _BINS))
        np.add.at(table, (difficulty[chosen], cost[chosen]), 1 / len(cost))
        independent = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
        seen = table > 0
        return float((table[seen] * np.log(table[seen] / independent[seen])).sum()) - bias * (1 if draw is None else 2)

    return _estimate(information)


def _commonest(observed: Sequence[Observed]) -> list[str]:
    """Each problem's most frequent structure."""
    counts: dict[str, Counter[str]] = {}
    for each in observed:
        counts.setdefault(each.problem_id, Counter())[each.structure] += 1
    return [found.most_common(1)[0][0] for found in counts.values()]


def _by_problem(observed: Sequence[Observed]) -> tuple[np.ndarray, np.ndarray]:
    """Difficulty and mean cost of each problem, P each, ordered by the problems' ids."""
    costs: dict[tuple[str, float], list[float]] = {}
    for each in observed:
        costs.setdefault((each.problem_id, each.difficulty), []).append(each.cost)
    problems = sorted(costs)
    return np.array([difficulty for _, difficulty in problems]), np.array([np.mean(costs[key]) for key in problems])


def _binned(values: np.ndarray) -> np.ndarray:
    """Which of three bins each value is in, 0 the lowest."""
    edges = np.quantile(values, np.arange(1, _BINS) / _BINS)
    return np.searchsorted(edges, values, side="left")


def _estimate(measure: Callable[[np.random.Generator | None], float]) -> Estimate:
    """`measure` of all problems (given None), and the interval of its values over resamples."""
    draw = np.random.default_rng(0)
    low, high = np.nanpercentile([measure(draw) for _ in range(_DRAWS)], [2.5, 97.5])
    return Estimate(measure(None), float(low), float(high))
