"""A task of your own on the same engine: four methods, your problems, any reward. Here: write many vowels.

python examples/own_task.py --model PATH --grpo.steps 20
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from fastgrpo.cli import parse
from fastgrpo.config import Config
from fastgrpo.errors import run_program
from fastgrpo.ranks.collectives import joined_ranks
from fastgrpo.record.log import RunLog
from fastgrpo.runtime import run_async
from fastgrpo.train import train
from fastgrpo.types import Execution, RewardTerms


class Vowels:
    """An environment: what the policy reads, what becomes of what it writes, and what that is worth."""

    def prompt(self, problem: Any) -> str:
        """The text that the policy reads first."""
        return problem.prompt

    async def execute(self, problem: Any, completion: str, seed: int) -> Execution:
        """One completion's result; `await` whatever it takes, others are decoding meanwhile."""
        share = sum(letter in "aeiou" for letter in completion) / max(len(completion), 1)
        return Execution(status="ok", pass_rate=share, workflow=completion)

    def feedback_text(self, execution: Execution) -> str:
        """What the policy reads between two rounds (`grpo.rounds`)."""
        return f"{execution.pass_rate:.0%} vowels. More.\n"

    def rewards(self, problem: Any, executions: list[Execution]) -> list[RewardTerms | None]:
        """One reward for each rollout of a group."""
        return [
            RewardTerms(total=e.pass_rate, performance=e.pass_rate, complexity=0.0, diversity=0.0, format=0.0)
            for e in executions
        ]


@asynccontextmanager
async def open_environment(config: Config, log: RunLog) -> AsyncIterator[Vowels]:
    """Open what the task needs for the length of the run: nothing here."""
    yield Vowels()


def load_problems(config: Config) -> tuple[list[Any], list[Any]]:
    """(training, held-out) problems: any objects with `id`, `prompt` and `difficulty`."""
    problems = [SimpleNamespace(id=f"count/{n}", prompt=f"Sing {n} syllables.\n", difficulty=n / 40) for n in range(40)]
    return problems[8:], problems[:8]


def main() -> None:
    """Train `--model` on the task."""
    command = parse(sys.argv[1:], program="examples.own_task")
    with joined_ranks():
        run_async(
            lambda: train(
                command.config, resume=command.resume, load_problems=load_problems, open_environment=open_environment
            )
        )


if __name__ == "__main__":
    run_program(main)
