"""What the demo learns: `python -m fastgrpo.train` for several seeds, evaluated on held-out problems before and after.

    python bench/bench_demo.py [--seeds 0 1 2] [--runs runs/demo-bench]

Each seed draws its own held-out problems; one whose report is in `--runs` already is not run again. Prints a table and
writes it to bench/results/demo.md.
"""

from __future__ import annotations

import argparse
import statistics
from datetime import date
from pathlib import Path

from bench_lag import metrics, train
from machine import cores

from fastgrpo.cli import DEMO
from fastgrpo.doctor import versions
from fastgrpo.evaluation import read_rows, summary
from fastgrpo.record.comparison import markdown

RESULTS = Path(__file__).parent / "results" / "demo.md"
COLUMNS = ("pass_rate", "solved", "reward", "invalid", "complexity", "spent", "cost_hard_over_easy")


def run(seed: int, runs: Path) -> dict[str, float]:
    """Train one seed and return its evaluation, `NAME before` and `NAME after`, and its seconds."""
    folder = train(runs, f"seed{seed}", DEMO, ["--seed", str(seed)])
    seconds = (folder / "report.html").stat().st_mtime - (folder / "config.toml").stat().st_mtime
    rows = read_rows(folder / "evaluation.json")
    found = {"seed": seed, "seconds": seconds}
    for stage, when in (("sft", "before"), ("grpo", "after")):
        means = summary([row for row in rows if row.stage == stage])
        found |= {f"{column} {when}": means[column] for column in COLUMNS}
    return found | {"seconds/step": statistics.median(row["seconds/step"] for row in metrics(folder))}


def table(found: list[dict[str, float]]) -> str:
    """Markdown: a row a seed, then mean and range."""
    names = [f"{column} {when}" for column in COLUMNS for when in ("before", "after")] + ["seconds/step", "seconds"]
    columns = {name: [row[name] for row in found] for name in names}
    rows = [[str(row["seed"]), *(f"{row[name]:.3f}" for name in names)] for row in found]
    means = [f"{statistics.fmean(column):.3f}" for column in columns.values()]
    ranges = [f"{min(column):.3f} to {max(column):.3f}" for column in columns.values()]
    return markdown([["seed", *names], *rows, ["mean", *means], ["range", *ranges]])


def main() -> None:
    """Run every seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-bench"))
    options = parser.parse_args()
    text = table([run(seed, options.runs) for seed in options.seeds])
    where = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(text)
    title = f"# The demo on held-out HumanEval problems\n\n`python bench/bench_demo.py`, {date.today()}; {cores()}"
    RESULTS.write_text(f"{title}; {where}\n\n{text}")


if __name__ == "__main__":
    main()
