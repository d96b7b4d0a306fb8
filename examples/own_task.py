"""A task of your own on the same engine: four methods, your problems, any reward. Here: write many vowels.

python examples/own_task.py --model PATH --grpo.steps 20
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from fastgrpo.cli import parse, run_async
from fastgrpo.config import Config
from fastgrpo.errors import run_program
from fastgrpo.ranks.collectives import joined_ranks
from fastgrpo.record.log import RunLog
from fastgrpo.train import train
from fastgrpo.types import Result, Reward, Rollout


class Vowels:
    """An environment: what the policy reads, what becomes of what it writes, and what that is worth."""

    def prompt(self, problem: Any) -> str:
        """The text that the policy reads first."""
        return problem.prompt

    async def execute(self, problem: Any, completion: str, seed: int) -> float:
        """One completion's outcome, in any form; `await` whatever it takes, others are decoding meanwhile."""
        return sum(letter in "aeiou" for letter in completion) / max(len(completion), 1)

    def feedback_text(self, share: float) -> str:
        """What the policy reads between two rounds (`grpo.rounds`)."""
        return f"{share:.0%} vowels. More.\n"

    def results(self, problem: Any, rollouts: list[Rollout]) -> list[Result]:
        """One result for each rollout of a group; `executions` holds what `execute` returned in each round."""
        shares = [rollout.executions[-1] for rollout in rollouts]
        return [Result(reward=Reward(total=share), metrics={"vowels": share}) for share in shares]


@asynccontextmanager
async def open_environment(config: Config, log: RunLog) -> AsyncIterator[Vowels]:
    """Open what the task needs for the length of the run: nothing here."""
    yield Vowels()


def load_problems(config: Config) -> tuple[list[Any], list[Any]]:
    """(training, held-out) problems: any objects with an `id`."""
    problems = [SimpleNamespace(id=f"count/{n}", prompt=f"Sing {n} syllables.\n") for n in range(40)]
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
