"""Held-out rows of several runs side by side, and what a choice by problem could win at most.

    python bench/compare_evaluations.py fixed05/baselines.jsonl "seed 0=rl0/evaluation.json:evaluate" ...
        [--over "worker alone"] [--data-set NAME]

Each argument is [NAME=]FILE[:STAGE]: a `baselines.jsonl` or an `evaluation.json`, of one stage or all. Prints the
tables of `fastgrpo.evaluate --baselines` for all of them together: means, what is gained over each `--over`, paired by
problem, how the cost follows the query; the structures written for each data set, and the commonest texts. Then, of a
file of several stages, their oracle: all problems, those of each data set, or each alone get the workflow with the
highest mean reward on every other sample, and are measured on the samples between, so that luck in the choice does not
count. All intervals are 95 % bootstrap intervals over problems.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from run_files import evaluated_rows

from fastgrpo.flow.adaptivity import adaptivity_table, structure
from fastgrpo.program import run_program
from fastgrpo.record.comparison import comparison_table, gains, markdown, spread
from fastgrpo.record.problem_statistics import by_problem, stages_of

Row = Mapping[str, Any]
Halves = Mapping[tuple[str, str], tuple[list[Row], list[Row]]]  # of the samples of each stage and problem
# What the oracle's line shows: metric, scale, decimals.
SHOWN = (("solved", 100.0, 1), ("worker_calls", 1.0, 2), ("worker_tokens", 1.0, 0), ("reward", 1.0, 3))


def texts(rows: Sequence[Row]) -> str:
    """How many texts each stage wrote for each data set, and the share of the commonest."""
    lines = [["", "data set", "rollouts", "texts", "commonest"]]
    by = defaultdict[tuple[str, str], Counter[str]](Counter)
    for row in rows:
        by[row["stage"], row["dataset"]][row.get("workflow", "")] += 1
    for (stage, dataset), counts in by.items():
        lines.append([stage, dataset, str(counts.total()), str(len(counts)), commonest(counts)])
    return markdown(lines)


def commonest(workflows: Counter[str]) -> str:
    """The share of the commonest of `workflows`, and its body in a line."""
    [(workflow, times)] = workflows.most_common(1)
    return f"{times / workflows.total():.0%}: `{' / '.join(line.strip() for line in workflow.splitlines()[1:])}`"


def structures(rows: Sequence[Row]) -> str:
    """For each stage and data set: what its problems earned, and the shares of the five commonest structures."""
    lines = [["", "data set", "reward", "pass@1, %", "calls", "structures"]]
    problems = defaultdict[tuple[str, str], list[Row]](list)
    for row in rows:
        problems[row["stage"], row["dataset"]].append(row)
    for (stage, dataset), found in problems.items():
        columns = [by_problem(found, stage, key) for key in ("reward", "solved", "worker_calls")]
        shown = zip(columns, (1.0, 100.0, 1.0), (3, 1, 1), strict=True)
        cells = [spread([scale * value for value in column.values()], digits) for column, scale, digits in shown]
        counts = Counter(structure(row["workflow"]) or "none" for row in found)
        shares = ", ".join(f"{count / len(found):.0%} `{name}`" for name, count in counts.most_common(5))
        lines.append([stage, dataset, *cells, shares])
    return markdown(lines)


def halves(rows: Sequence[Row]) -> Halves:
    """Every other sample of each stage and problem, and those between, of the problems that have both of each stage."""
    samples = defaultdict[tuple[str, str], list[Row]](list)
    for row in rows:
        samples[row["stage"], row["problem_id"]].append(row)
    short = {problem for (_, problem), found in samples.items() if len(found) < 2}
    return {key: (found[::2], found[1::2]) for key, found in samples.items() if key[1] not in short}


def best_stages(parts: Halves, problems: Sequence[str]) -> tuple[str, str]:
    """The stage with the highest mean reward on these problems, by the one half of the samples and by the other."""
    stages = dict.fromkeys(stage for stage, _ in parts)

    def best(half: int) -> str:
        return max(stages, key=lambda s: fmean(fmean(row["reward"] for row in parts[s, p][half]) for p in problems))

    return best(0), best(1)


def on_the_other(parts: Halves, chosen: Sequence[tuple[Sequence[str], tuple[str, str]]], key: str) -> list[float]:
    """The mean of `key` by problem, group after group: each group of `chosen` has its `best_stages`, of which each is
    measured on the half that did not choose it."""
    return [
        fmean(fmean(row[key] for row in parts[stages[half], problem][1 - half]) for half in (0, 1))
        for group, stages in chosen
        for problem in group
    ]


def by_data_set(rows: Sequence[Row], problems: Sequence[str]) -> list[list[str]]:
    """The `problems` in groups."""
    datasets, groups = {row["problem_id"]: row["dataset"] for row in rows}, defaultdict[str, list[str]](list)
    for problem in problems:
        groups[datasets[problem]].append(problem)
    return list(groups.values())


def oracle(rows: Sequence[Row]) -> str:
    """The best workflow of each problem, of each data set, and of all, all chosen on half of the samples."""
    parts = halves(rows)
    problems = list(dict.fromkeys(problem for _, problem in parts))
    rules = {
        "one for all problems": [problems],
        "one for each data set": by_data_set(rows, problems),
        "the best of each problem": [[problem] for problem in problems],
    }
    lines = [["chosen on half of the samples", "pass@1, %", "calls", "tokens", "reward"]]
    for name, groups in rules.items():
        chosen = [(group, best_stages(parts, group)) for group in groups]
        cells = [
            spread([scale * value for value in on_the_other(parts, chosen, key)], digits)
            for key, scale, digits in SHOWN
        ]
        lines.append([name, *cells])
    return f"{len(problems)} problems, {len(stages_of(rows))} workflows.\n\n{markdown(lines)}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="[NAME=]FILE[:STAGE]")
    parser.add_argument("--over", action="append", default=[], help="the stage that the others are compared with")
    parser.add_argument("--data-set", help="only this one's problems")
    options = parser.parse_args()
    each = [list(evaluated_rows(argument)) for argument in options.rows]
    if options.data_set is not None:
        each = [[row for row in part if row["dataset"] == options.data_set] for part in each]
    rows = [row for part in each for row in part]
    print(comparison_table("held out", rows))
    for stage in options.over:
        print(gains(rows, stage))
    print(markdown(adaptivity_table(rows)), structures(rows), texts(rows), sep="\n")
    for part in each:
        if len(stages_of(part)) > 1:
            print(oracle(part))


if __name__ == "__main__":
    run_program(main)
