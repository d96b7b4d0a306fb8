"""What each weighting of the reward asks for: the best workflow for all queries, and for those of each data set.

    python bench/reward_sweep.py fixed/baselines.jsonl [--complexity 0 0.2 0.4] [--efficiency 0 0.1 0.2 0.3 0.6]

Takes rows of `python -m fastgrpo.evaluate --baselines`, which real workers have answered, and pays them anew with each
pair of weights: pass rate - complexity - efficiency. No policy is trained. Workflows are chosen on half of the samples
and measured on the other, so that luck in the choice does not count. "Worth" is the reward that a policy gains by
telling the data sets apart, over the one workflow that is best for all: where it is 0 no policy can learn to. All
intervals are 95 % bootstrap intervals over problems.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from compare_evaluations import Row, best_stages, by_data_set, halves, on_the_other
from run_files import evaluated_rows

from fastgrpo.errors import UserError
from fastgrpo.flow.reward import inefficiency
from fastgrpo.program import run_program
from fastgrpo.record.comparison import markdown, spread


def paid(row: Row, complexity: float, efficiency: float) -> dict[str, Any]:
    """The row with the reward that these weights give."""
    cost = complexity * row["complexity"] + efficiency * inefficiency(row["spent"])
    return {**row, "reward": row["pass_rate"] - cost}


def line(rows: Sequence[Row], complexity: float, efficiency: float) -> list[str]:
    """The table's line of one pair of weights."""
    rows = [paid(row, complexity, efficiency) for row in rows]
    parts = halves(rows)
    groups = by_data_set(rows, list(dict.fromkeys(problem for _, problem in parts)))
    everything = [problem for group in groups for problem in group]
    one, *each = [(group, best_stages(parts, group)) for group in (everything, *groups)]
    apart = on_the_other(parts, each, "reward")
    together = on_the_other(parts, [one], "reward")
    return [
        f"{complexity:g}",
        f"{efficiency:g}",
        *("; ".join(dict.fromkeys(stages)) for _, stages in (one, *each)),
        spread([100 * value for value in on_the_other(parts, each, "solved")], 1),
        spread(on_the_other(parts, each, "worker_tokens"), 0),
        spread([mine - theirs for mine, theirs in zip(apart, together, strict=True)], 3),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="[NAME=]FILE[:STAGE]")
    parser.add_argument("--complexity", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--efficiency", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.6])
    options = parser.parse_args()
    rows = [row for argument in options.rows for row in evaluated_rows(argument)]
    if any("complexity" not in row for row in rows):
        raise UserError("some rows have no workflow, so that no weight can pay them: name a baselines.jsonl")
    sets = list(dict.fromkeys(row["dataset"] for row in rows))
    head = ["complexity", "efficiency", "best for all", *sets, "pass@1 so, %", "tokens", "worth"]
    print(markdown([head, *(line(rows, c, e) for c in options.complexity for e in options.efficiency)]))


if __name__ == "__main__":
    run_program(main)
