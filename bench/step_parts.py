"""What a run's GRPO steps waited for: a step's seconds over its longest part.

    python bench/step_parts.py runs/NAME [runs/OTHER ...] [--from-step 2]

The parts are generation, training, and the chain of worker calls: the 99th percentile over the step's rollouts of the
seconds that their calls took together (calls made at once are counted one after another, so it is an upper bound where
a workflow drafts in parallel). A step in which all else were free would have the ratio 1, less where generation and
calls overlap in it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from fastgrpo.errors import UserError
from fastgrpo.program import run_program
from fastgrpo.record.comparison import markdown
from fastgrpo.record.json_lines import read_lines

COLUMNS = (
    "run",
    "steps",
    "step over its longest part: median",
    "worst",
    "step, s",
    "generation",
    "p99 of chains",
    "train",
)


def parts(folder: Path, first: int) -> list[list[float]]:
    """[step, generation, chain, training] in seconds of each step from `first` on."""
    chains = defaultdict[int, list[float]](list)
    for row in read_lines(folder / "samples.jsonl"):
        if row["stage"] == "grpo":
            chains[row["step"]].append(sum(call["seconds"] for call in row.get("worker_calls", ())))
    steps: list[dict[str, Any]] = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "grpo"]
    return [
        [
            row["seconds/step"],
            row["seconds/generate"],
            float(np.percentile(chains[row["step"]], 99)),
            row["seconds/train"],
        ]
        for row in steps
        if row["step"] >= first and chains[row["step"]]
    ]


def main() -> None:
    """Print the table, a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--from-step", type=int, default=2, help="the first step also warms up (2)")
    options = parser.parse_args()
    lines = [list(COLUMNS)]
    for folder in options.folders:
        found = np.array(parts(folder, options.from_step))
        if not len(found):
            raise UserError(f"{folder} has no GRPO step from step {options.from_step} on: name a run's folder")
        ratios = found[:, 0] / found[:, 1:].max(axis=1)
        means = [f"{value:.1f}" for value in found.mean(axis=0)]
        lines.append([folder.name, str(len(found)), f"{np.median(ratios):.2f}", f"{ratios.max():.2f}", *means])
    print(markdown(lines))


if __name__ == "__main__":
    run_program(main)
