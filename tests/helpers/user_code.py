"""What users write, for mypy alone: each form of a task in the docs is one that `fastgrpo.train` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastgrpo
from fastgrpo import train
from fastgrpo.rollouts.session import Access
from fastgrpo.types import Result, Rollout


def reward(completions: Sequence[str], wanted: Sequence[int], **_: Any) -> list[float | None]:
    return [float(len(text) == n) for text, n in zip(completions, wanted, strict=True)]


async def slow_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(prompts)


class Plain:
    def prompt(self, problem: object) -> str:
        return ""

    def execute(self, problem: object, completion: str, seed: int) -> float:
        return 0.0

    def feedback_text(self, execution: float) -> str:
        return ""

    def results(self, problem: object, rollouts: list[Rollout]) -> list[Result]:
        return []


class Waiting:
    def prompt(self, problem: object) -> list[dict[str, str]]:
        return []

    async def execute(self, problem: object, completion: str, seed: int) -> float:
        return 0.0

    async def feedback_text(self, execution: float) -> str | None:
        return None

    async def results(self, problem: object, rollouts: list[Rollout]) -> list[Result]:
        return []


class Acting:
    def prompt(self, problem: object) -> str:
        return ""

    async def act(self, problem: object, access: Access, seed: int) -> str:
        return access.client().api_key

    def results(self, problem: object, rollouts: list[Rollout]) -> list[Result]:
        return []


def trained() -> list[Path]:
    """Never called."""
    return [
        fastgrpo.train({"grpo.steps": 1}, model=Path("PATH"), reward=[reward, slow_reward], dataset=[{"prompt": ""}]),
        train(environment=Plain(), model="PATH", dataset=[object()]),
        train(environment=Waiting(), model="PATH", dataset=[object()]),
        train(environment=Acting(), model="PATH", dataset=[object()], resume=True),
    ]
