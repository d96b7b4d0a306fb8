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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
from learned_workflows import commonest

from fastgrpo.flow.adaptivity import structure
from fastgrpo.record.comparison import comparison_table, gains, markdown, spread, stages_of
from fastgrpo.record.json_lines import read_lines
from fastgrpo.record.problem_statistics import by_problem
from fastgrpo.report import adaptivity_table

Row = Mapping[str, Any]
# What the oracle's line shows: metric, scale, decimals.
SHOWN = (("solved", 100.0, 1), ("worker_calls", 1.0, 2), ("worker_tokens", 1.0, 0), ("reward", 1.0, 3))


def rows_of(argument: str) -> Iterator[Row]:
    """The rows that a [NAME=]FILE[:STAGE] means, metrics beside the fields, under NAME where there is one."""
    name, _, place = argument.rpartition("=")
    file, _, stage = place.partition(":")
    path = Path(file)
    found = read_lines(path) if path.suffix == ".jsonl" else msgspec.json.decode(path.read_bytes())
    for row in found:
        if not stage or row["stage"] == stage:
            yield row["metrics"] | row | ({"stage": name} if name else {})


def texts(rows: Sequence[Row]) -> str:
    """How many texts each stage wrote for each data set, and the share of the commonest."""
    lines = [["", "data set", "rollouts", "texts", "commonest"]]
    by = defaultdict[tuple[str, str], Counter[str]](Counter)
    for row in rows:
        by[row["stage"], row["dataset"]][row.get("workflow", "")] += 1
    for (stage, dataset), counts in by.items():
        lines.append([stage, dataset, str(counts.total()), str(len(counts)), commonest(counts)])
    return markdown(lines)


def structures(rows: Sequence[Row], most: int = 5) -> str:
    """For each stage and data set: what its problems earned, and the shares of the commonest structures."""
    lines = [["", "data set", "reward", "pass@1, %", "calls", "structures"]]
    problems = defaultdict[tuple[str, str], list[Row]](list)
    for row in rows:
        problems[row["stage"], row["dataset"]].append(row)
    for (stage, dataset), found in problems.items():
        columns = [by_problem(found, stage, key) for key in ("reward", "solved", "worker_calls")]
        shown = zip(columns, (1.0, 100.0, 1.0), (3, 1, 1), strict=True)
        cells = [spread([scale * value for value in column.values()], digits) for column, scale, digits in shown]
        counts = Counter(structure(row["workflow"]) or "none" for row in found)
        shares = ", ".join(f"{count / len(found):.0%} `{name}`" for name, count in counts.most_common(most))
        lines.append([stage, dataset, *cells, shares])
    return markdown(lines)


def oracle(rows: Sequence[Row]) -> str:
    """The best workflow of each problem, of each data set, and of all, all chosen on half of the samples."""
    samples = defaultdict[tuple[str, str], list[Row]](list)
    for row in rows:
        samples[row["stage"], row["problem_id"]].append(row)
    stages = stages_of(rows)
    problems = [
        p for p in dict.fromkeys(row["problem_id"] for row in rows) if all(len(samples[s, p]) > 1 for s in stages)
    ]

    def mean(stage: str, problem: str, half: int, key: str) -> float:
        return fmean(row[key] for row in samples[stage, problem][half::2])

    datasets = {row["problem_id"]: row["dataset"] for row in rows}

    def best(half: int, among: Sequence[str]) -> str:
        return max(stages, key=lambda stage: fmean(mean(stage, problem, half, "reward") for problem in among))

    def like(problem: str) -> list[str]:
        return [other for other in problems if datasets[other] == datasets[problem]]

    chosen = {
        "one for all problems": lambda problem, half: best(half, problems),
        "one for each data set": lambda problem, half: best(half, like(problem)),
        "the best of each problem": lambda problem, half: max(stages, key=lambda s: mean(s, problem, half, "reward")),
    }
    lines = [["chosen on half of the samples", "pass@1, %", "calls", "tokens", "reward"]]
    for name, choose in chosen.items():
        choices = {(problem, half): choose(problem, half) for problem in problems for half in (0, 1)}
        cells = [
            spread(
                [scale * fmean(mean(choices[p, half], p, 1 - half, key) for half in (0, 1)) for p in problems], digits
            )
            for key, scale, digits in SHOWN
        ]
        lines.append([name, *cells])
    return f"{len(problems)} problems, {len(stages)} workflows.\n\n{markdown(lines)}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="[NAME=]FILE[:STAGE]")
    parser.add_argument("--over", action="append", default=[], help="the stage that the others are compared with")
    parser.add_argument("--data-set", help="only this one's problems")
    options = parser.parse_args()
    each = [
        [row for row in rows_of(argument) if options.data_set in (None, row["dataset"])] for argument in options.rows
    ]
    rows = [row for part in each for row in part]
    print(comparison_table("held out", rows))
    for stage in options.over:
        print(gains(rows, stage))
    print(markdown(adaptivity_table(rows)), structures(rows), texts(rows), sep="\n")
    for part in each:
        if len(stages_of(part)) > 1:
            print(oracle(part))


if __name__ == "__main__":
    main()
