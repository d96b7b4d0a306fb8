"""A reward function in TRL's form, on rows of your own: `python examples/reward_function.py --model PATH`.

From the shell: `python -m fastgrpo.train --model PATH --dataset rows.jsonl --reward reward_function:right_count`.
"""

from __future__ import annotations

import sys
from typing import Any

import fastgrpo
from fastgrpo.cli import parse
from fastgrpo.program import run_program

ROWS = [{"prompt": f"Name {n} colours.", "wanted": n} for n in range(1, 41)]


def right_count(completions: list[str], wanted: list[int], **_: Any) -> list[float]:
    """1 where a completion has the wanted number of words, less for each word too many or too few."""
    return [1 / (1 + abs(len(text.split()) - count)) for text, count in zip(completions, wanted, strict=True)]


def brevity(completions: list[str], **_: Any) -> list[float]:
    """Minus one for a hundred characters."""
    return [-len(text) / 100 for text in completions]


def main() -> None:
    """Train `--model` on both rewards."""
    command = parse(sys.argv[1:], program="examples.reward_function")
    fastgrpo.train(
        command.config,
        reward=[right_count, brevity],
        reward_weights=[1.0, 0.1],
        dataset=ROWS[8:],
        eval_dataset=ROWS[:8],
        resume=command.resume,
        dry_run=command.dry_run,
    )


if __name__ == "__main__":
    run_program(main)
