"""Does the policy write what each query deserves? Structures over problems, and executed cost against difficulty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastgrpo.flow.parse import InvalidWorkflow, parse_code
from fastgrpo.flow.structure import structure_of
from fastgrpo.record.problem_statistics import stages_of

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


def adaptivity_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The measures of an evaluation's rows: a head, then a line for each stage that has enough problems."""
    head = ["", "cost, hardest third over easiest", "information of difficulty about cost, nats"]
    table = [[*head, "structures", "of the problems' commonest", "entropy of structures, nats"]]
    for stage in stages_of(rows):
        found = adaptivity(observed_of(row for row in rows if row["stage"] == stage))
        if found:
            spreads = [
                f"{found[name]:.2f} [{found[f'{name}_low']:.2f}, {found[f'{name}_high']:.2f}]"
                for name in ("cost_hard_over_easy", "cost_information")
            ]
            counts = [f"{found[name]:.0f}" for name in ("structures", "structures_by_problem")]
            table.append([stage, *spreads, *counts, f"{found['structure_entropy']:.2f}"])
    return table


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

    def ratio(easy: np.ndarray, hard: np.ndarray) -> float:
        return float(hard.mean() / easy.mean()) if easy.any() else math.nan

    draw = np.random.default_rng(0)
    resampled = [ratio(*(draw.choice(part, len(part)) for part in (easiest, hardest))) for _ in range(_DRAWS)]
    return _estimate(ratio(easiest, hardest), resampled)


def cost_information(observed: Sequence[Observed]) -> Estimate:
    """Mutual information between a problem's difficulty and its mean executed cost, in nats, each in three bins.

    Bins have equal numbers of problems as far as ties allow. The plug-in estimate is too large by about f / 2n for n
    problems (Miller, 1955), where f of the cells that occur are free once all bins have their numbers: 4 where all nine
    occur, 0 where difficulty determines cost. In a resample the numbers vary, too: its estimate differs from the
    sample's by (cells - rows - columns + 1) / 2n (Panzeri and Treves, 1996), which is less than nothing where cost is
    determined. Both are corrected, and no bound is above the information that the bins can have.
    """
    difficulty, cost = map(_binned, _by_problem(observed))
    count, cells = len(cost), _BINS * difficulty + cost
    whole = _table(cells)
    bias = _free_cells(whole) / (2 * count)
    rows, columns = ((whole.sum(axis) > 0).sum() for axis in (1, 0))
    further = (np.count_nonzero(whole) - rows - columns + 1) / (2 * count)
    most = min(entropy(difficulty.tolist()), entropy(cost.tolist()))
    draw = np.random.default_rng(0)
    tables = np.array([_table(cells[draw.integers(count, size=count)]) for _ in range(_DRAWS)])
    resampled = np.minimum(most, _information(tables) - bias - further)
    return _estimate(float(_information(whole)) - bias, resampled)


def _table(cells: np.ndarray) -> np.ndarray:
    """The share of the problems in each cell [bin of difficulty, bin of cost]; a cell's number counts in that order."""
    return np.bincount(cells, minlength=_BINS**2).reshape(_BINS, _BINS) / len(cells)


def _information(table: np.ndarray) -> np.ndarray:
    """Mutual information of the two bins, in nats, of each table [..., bin, bin]."""
    independent = table.sum(-1, keepdims=True) * table.sum(-2, keepdims=True)
    ratio = np.divide(table, independent, out=np.ones_like(table), where=table > 0)
    return (table * np.log(ratio)).sum((-2, -1))


def _free_cells(table: np.ndarray) -> int:
    """How many of the cells that occur can be chosen freely where the sums of rows and columns are given."""
    row, column = np.nonzero(table)
    sums = np.hstack([np.eye(_BINS)[row], np.eye(_BINS)[column]])
    return len(row) - int(np.linalg.matrix_rank(sums))


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
    """Which of three bins each value is in, 0 the lowest; equal ones are where the middle of them belongs."""
    ranked = np.sort(values)
    below, upto = np.searchsorted(ranked, values, side="left"), np.searchsorted(ranked, values, side="right")
    # The middle between ranks is never the last: it is below the number of values.
    return _BINS * (below + upto) // (2 * len(values))


def _estimate(value: float, resampled: np.ndarray | Sequence[float]) -> Estimate:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))
