"""What lag costs in learning: the same training at lag 0, 1, 4 and with weights that change in flight, at equal steps.

    python bench/bench_lag.py [--config FILE --model PATH] [--modes 0 1 4 in-flight] [--seeds 0] [--runs runs/lag]
        [--grpo.steps N] [--section.key VALUE ...]

Without `--config` it is the demo, whose warm start is made once a seed and shared by all modes. `in-flight` is at the
largest lag of the other modes, 1 where there is none. A run whose report is in `--runs` already is not made again.
Prints a table and writes it, with the curves, to `--save`, by default bench/results/lag.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from fastgrpo.cli import DEMO
from fastgrpo.doctor import versions
from fastgrpo.evaluation import read_rows, summary
from fastgrpo.record.comparison import markdown
from fastgrpo.record.json_lines import read_lines

IN_FLIGHT = "in-flight"
RESULTS = Path(__file__).parent / "results" / "lag.md"


def train(runs: Path, name: str, config: Path, keys: Sequence[str]) -> Path:
    """The folder of a run of `fastgrpo.train`, made where it is not there."""
    folder = runs / name
    if not (folder / "report.html").exists():
        command = [sys.executable, "-m", "fastgrpo.train", "--config", str(config), "--runs", str(runs), "--name", name]
        subprocess.run([*command, *keys], check=True)
    return folder


def lag_keys(mode: str, modes: Sequence[str]) -> list[str]:
    """The settings of a mode."""
    if mode != IN_FLIGHT:
        return ["--grpo.max_lag", mode]
    largest = max([int(other) for other in modes if other != IN_FLIGHT], default=0)
    return ["--grpo.max_lag", str(largest or 1), "--grpo.in_flight", "true"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The numbers of the run's GRPO steps."""
    return [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "grpo"]


def thirds(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Mean reward of the first, the middle and the last third of the steps."""
    rewards = [row["reward/total"] for row in rows if "reward/total" in row]
    size = max(1, len(rewards) // 3)
    return [statistics.fmean(part) for part in (rewards[:size], rewards[size:-size] or rewards, rewards[-size:])]


def row_of(folder: Path) -> dict[str, float]:
    """One run's line of the table."""
    rows = metrics(folder)
    early, middle, late = thirds(rows)
    found = {"steps": float(len(rows)), "reward, first third": early, "middle": middle, "last": late}
    evaluation = read_rows(folder / "evaluation.json")
    for stage, when in (("sft", "before"), ("grpo", "after")):
        found[f"held out {when}"] = summary([row for row in evaluation if row.stage == stage])["reward"]
    found["lag"] = statistics.fmean(row.get("lag", 0.0) for row in rows)
    found["lag, most"] = max(row.get("lag_max", 0.0) for row in rows)
    found["clipped"] = statistics.fmean(row.get("clip_fraction", 0.0) for row in rows)
    # The first step compiles, and with lag it draws several steps' rollouts.
    found["seconds/step"] = statistics.median([row["seconds/step"] for row in rows[1:] or rows])
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a line a run."""
    names = list(next(iter(found.values())))
    return markdown([["lag", *names], *([name, *(f"{row[key]:.3f}" for key in names)] for name, row in found.items())])


def curves(folders: dict[str, Path]) -> str:
    """Markdown: each run's reward, step by step."""
    rewards = {
        name: [f"{row.get('reward/total', 0.0):.3f}" for row in metrics(folder)] for name, folder in folders.items()
    }
    return "\n".join(f"- {name}: {', '.join(values)}" for name, values in rewards.items())


def runs_of(options: argparse.Namespace, keys: Sequence[str]) -> dict[str, Path]:
    """The folder of each mode and seed."""
    folders = {}
    for seed in options.seeds:
        seeded = [*keys, "--seed", str(seed)]
        model = options.model
        if not model:
            # Its warm start is all that is wanted.
            model = train(options.runs, f"start-{seed}", options.config, [*seeded, "--grpo.steps", "0"]) / "sft"
        for mode in options.modes:
            own = [*seeded, "--model", str(model), *lag_keys(mode, options.modes)]
            folders[f"{mode}, seed {seed}"] = train(options.runs, f"lag-{mode}-{seed}", options.config, own)
    return folders


def main() -> None:
    """Make every run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEMO)
    parser.add_argument("--model", default="")
    parser.add_argument("--modes", nargs="+", default=["0", "1", "4", IN_FLIGHT])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/lag"))
    parser.add_argument("--save", type=Path, default=RESULTS)
    options, keys = parser.parse_known_args()
    if wrong := [mode for mode in options.modes if mode != IN_FLIGHT and not mode.isdecimal()]:
        parser.error(f"--modes takes numbers and {IN_FLIGHT}, not {wrong[0]!r}")
    folders = runs_of(options, keys)
    text = table({name: row_of(folder) for name, folder in folders.items()})
    print(text)
    where = ", ".join(f"{name} {version}" for name, version in versions().items())
    title = f"# Learning at several lags\n\n`python bench/bench_lag.py {' '.join(sys.argv[1:])}`, {date.today()}"
    rewards = f"Mean reward of each step's rollouts:\n\n{curves(folders)}"
    options.save.write_text(f"{title}; {os.cpu_count()} cores; {where}\n\n{text}\n{rewards}\n")


if __name__ == "__main__":
    main()
