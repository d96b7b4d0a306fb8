"""What each workflow structure earns in GRPO's eyes, from a run's samples: with and without the group's deviation.

    python bench/structure_advantages.py runs/NAME/samples.jsonl [--steps 3]

Prints, for the first steps, each structure's mean advantage with GRPO's division by the group's deviation (arXiv
2402.03300, eq. 3) and without it (Dr. GRPO, arXiv 2503.20783), by groups in which all, none or some rollouts solve.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from run_files import grpo_samples

from fastgrpo.program import run_program
from fastgrpo.record.comparison import markdown

KINDS = ("all solve", "none solves", "some solve")


class Earned(NamedTuple):
    """One rollout's advantages in a group of this kind."""

    structure: str
    kind: str
    over_deviation: float
    difference: float


def earned(rows: Iterable[Mapping[str, Any]]) -> Iterator[Earned]:
    """The advantages of all rollouts in groups whose rewards vary."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["step"], row["problem_id"]].append(row)
    for group in groups.values():
        totals = np.array([row["reward"]["total"] for row in group])
        if totals.std() == 0:
            continue
        solved = np.array([row["tests"]["hidden"] == 1.0 for row in group])
        kind = KINDS[0] if solved.all() else KINDS[2] if solved.any() else KINDS[1]
        difference = totals - totals.mean()
        for row, each in zip(group, difference, strict=True):
            yield Earned(row.get("structure") or "invalid", kind, each / totals.std(ddof=1), each)


def table(found: list[Earned]) -> str:
    """Markdown: the ten commonest structures, their mean advantages, and both by kind of group as `over / without`."""
    by_structure = defaultdict(list)
    for each in found:
        by_structure[each.structure].append(each)
    lines = [["structure", "rollouts", "over deviation", "without", *KINDS]]
    for structure, rows in sorted(by_structure.items(), key=lambda item: -len(item[1]))[:10]:
        cells = [_means([row for row in rows if row.kind == kind]) for kind in KINDS]
        over, without = np.mean([row[2:] for row in rows], axis=0)
        lines.append([structure, str(len(rows)), f"{over:+.3f}", f"{without:+.3f}", *cells])
    return markdown(lines)


def _means(rows: list[Earned]) -> str:
    if not rows:
        return ""
    over, without = np.mean([row[2:] for row in rows], axis=0)
    return f"{over:+.2f} / {without:+.3f}"


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--steps", type=int, default=3, help="the first steps of GRPO (3)")
    options = parser.parse_args()
    rows = [row for row in grpo_samples(options.samples) if row["step"] <= options.steps]
    print(table(list(earned(rows))))


if __name__ == "__main__":
    run_program(main)
