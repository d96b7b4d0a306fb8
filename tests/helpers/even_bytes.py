"""A task without jails, for runs of several ranks: the reward is the share of even bytes in a completion."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fastgrpo.config import Config
from fastgrpo.types import Result, Reward, Rollout


class EvenBytes:
    """The environment; its feedback asks for another completion."""

    def prompt(self, problem: Any) -> str:
        return problem.prompt

    async def execute(self, problem: Any, completion: str, seed: int) -> float:
        numbers = completion.encode()
        return sum(number % 2 == 0 for number in numbers) / max(len(numbers), 1)

    def feedback_text(self, execution: float) -> str:
        return "again"

    def results(self, problem: Any, rollouts: list[Rollout]) -> list[Result]:
        return [Result(reward=Reward(total=rollout.executions[-1])) for rollout in rollouts]


def load_problems(config: Config) -> tuple[list[Any], list[Any]]:
    """Four to train on and one held out."""
    made = [SimpleNamespace(id=f"p{i}", prompt=f"count {i}", difficulty=0.5) for i in range(5)]
    return made[:4], made[4:]
