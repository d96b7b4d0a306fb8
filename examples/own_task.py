"""A task of your own on the same engine: four methods, your problems, any reward. Here: write many vowels.

python examples/own_task.py --model PATH --grpo.steps 20
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import fastgrpo
from fastgrpo.cli import parse
from fastgrpo.program import run_program
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


def main() -> None:
    """Train `--model` on the task; its problems are any objects with an `id`."""
    command = parse(sys.argv[1:], program="examples.own_task")
    problems = [SimpleNamespace(id=f"count/{n}", prompt=f"Sing {n} syllables.\n") for n in range(40)]
    fastgrpo.train(
        command.config,
        environment=Vowels(),
        dataset=problems[8:],
        eval_dataset=problems[:8],
        resume=command.resume,
        dry_run=command.dry_run,
    )


if __name__ == "__main__":
    run_program(main)
