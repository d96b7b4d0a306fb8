"""Statistics over problems, which are drawn at random where their samples are not independent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]


def stages_of(rows: Iterable[Row]) -> list[str]:
    """The stages, in the order of the rows."""
    return list(dict.fromkeys(row["stage"] for row in rows))


def by_problem(rows: Sequence[Row], stage: str, key: str) -> dict[str, float]:
    """Mean of `key` over each problem's rows of `stage` that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["stage"] == stage and row.get(key) is not None:
            values.setdefault(row["problem_id"], []).append(row[key])
    return {problem: float(np.mean(found)) for problem, found in values.items()}


def thirds(rows: Sequence[Row]) -> list[list[str]]:
    """The problems in three parts of equal size by measured difficulty, the easiest first; empty where none has one."""
    difficulty = {row["problem_id"]: row["difficulty"] for row in rows if row.get("difficulty") is not None}
    ranked = sorted(difficulty, key=lambda problem: (difficulty[problem], problem))
    return [list(part) for part in np.array_split(np.array(ranked, dtype=object), 3)]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval over problems."""
    array = np.asarray(values, dtype=float)
    means = np.random.default_rng(0).choice(array, (2000, len(array))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)
