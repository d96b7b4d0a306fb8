"""What a policy learned to write and what that earned, from a GRPO run's samples, by blocks of steps.

    python bench/learned_workflows.py runs/NAME/samples.jsonl [--blocks 1-3,21-25] [--alone 8]

A table: pass@1 and calls of each block, executed calls on the hardest third of its problems over the easiest, its
commonest workflow. Then the last block beside the rollouts of the first `--alone` steps that asked the worker once,
paired by problem: what the policy gained over the worker alone. These are training problems, not held-out ones.
All intervals are 95 % bootstrap intervals over problems; rollouts that failed for infrastructure are left out.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from run_files import grpo_samples

from fastgrpo.errors import UserError
from fastgrpo.flow.adaptivity import Observed, cost_hard_over_easy
from fastgrpo.program import run_program
from fastgrpo.record.problem_statistics import interval

Row = Mapping[str, Any]
COLUMNS = (
    "steps",
    "rollouts",
    "problems",
    "pass@1",
    "calls",
    "tokens",
    "calls, hardest third over easiest",
    "commonest",
)


def solved(row: Row) -> float:
    """1.0 where all hidden tests passed."""
    return float(row["tests"]["hidden"] == 1.0)


def spent(row: Row, *what: str) -> int:
    """The sum of these fields over the rollout's worker calls."""
    return sum(call[field] for call in row["worker_calls"] for field in what)


def by_problem(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each problem."""
    found = defaultdict[str, list[Row]](list)
    for row in rows:
        found[row["problem_id"]].append(row)
    return found


def described(name: str, rows: Sequence[Row]) -> str:
    """One line of the table."""
    problems = by_problem(rows)
    means = [float(np.mean([solved(row) for row in group])) for group in problems.values()]
    calls = [spent(row, "requests") for row in rows]
    tokens = np.mean([spent(row, "prompt_tokens", "completion_tokens") for row in rows])
    observed = [Observed(row["problem_id"], row["difficulty"], cost, "") for row, cost in zip(rows, calls, strict=True)]
    ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*cost_hard_over_easy(observed))
    shown = commonest(Counter(row.get("workflow", "") for row in rows))
    cells = (name, len(rows), len(problems), shares(means), f"{np.mean(calls):.2f}", f"{tokens:.0f}", ratio, shown)
    return f"| {' | '.join(map(str, cells))} |"


def commonest(workflows: Counter[str]) -> str:
    """The share of the commonest of `workflows`, and its body in a line."""
    [(workflow, times)] = workflows.most_common(1)
    return f"{times / workflows.total():.0%}: `{' / '.join(line.strip() for line in workflow.splitlines()[1:])}`"


def shares(values: Sequence[float]) -> str:
    """Their mean and its interval."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval(values))


def gained(first: Sequence[Row], last: Sequence[Row]) -> str:
    """pass@1 of the last block over that of single calls, on the problems that have both."""
    alone, learned = by_problem(row for row in first if row.get("structure") == "generate"), by_problem(last)
    both = [
        [np.mean([solved(row) for row in each[name]]) for each in (alone, learned)] for name in alone if name in learned
    ]
    if not both:
        return "\nNo problem of the last block was answered by one `generate` before."
    before, after = np.mean(both, axis=0)
    return (
        f"\nOn {len(both)} problems that both have: one `generate` {before:.3f}, the last block {after:.3f}, "
        f"gained {shares([float(b - a) for a, b in both])}."
    )


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--blocks", default="1-3,21-25", help="steps, first to last (1-3,21-25)")
    parser.add_argument("--alone", type=int, default=8, help="in how many first steps single calls are sought (8)")
    options = parser.parse_args()
    rows = grpo_samples(options.samples)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    block: list[Row] = []
    for name in options.blocks.split(","):
        low, high = map(int, name.split("-"))
        block = [row for row in rows if low <= row["step"] <= high]
        if not block:
            raise UserError(f"{options.samples} has no rollouts of steps {name}: set --blocks to steps that it has")
        print(described(name, block))
    print(gained([row for row in rows if row["step"] <= options.alone], block))


if __name__ == "__main__":
    run_program(main)
