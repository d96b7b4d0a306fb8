"""Problems, workers and a pool that judges without a jail, for tests of the host's side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fastgrpo.flow.types import Problem, Reply, Request
from fastgrpo_sandbox import AssertTests, Outcome

ADD = Problem(
    id="add",
    prompt="Write add(a, b), the sum of two numbers.",
    entry_point="add",
    solution="def add(a, b):\n    return a + b\n",
    public_tests=AssertTests(asserts=("assert add(1, 2) == 3",)),
    hidden_tests=AssertTests(asserts=("assert add(2, 2) == 4", "assert add(5, -1) == 4")),
    difficulty=0.3,
)
RIGHT = "```python\ndef add(a, b):\n    return a + b\n```"
WRONG = "```python\ndef add(a, b):\n    return a - b\n```"


class ScriptedWorker:
    """Answers in turn from a script of texts, exceptions or functions of the request; records the requests."""

    def __init__(self, *answers: str | Exception | Callable[[Request], str], seconds: float = 0.0) -> None:
        self.names = ("large", "small")
        self.answers = list(answers)
        self.seconds = seconds
        self.requests: list[Request] = []

    async def ask(self, request: Request) -> Reply:
        self.requests.append(request)
        await asyncio.sleep(self.seconds)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        text = answer if isinstance(answer, str) else answer(request)
        return Reply(text=text, prompt_tokens=10, completion_tokens=5, cost_usd=0.01, seconds=0.5)

    async def aclose(self) -> None:
        pass


class TrustingPool:
    """Judges assertions in this process: for code that a test wrote itself, where no jail is the subject."""

    def __init__(self, status: Any = None) -> None:
        self.status = status
        self.runs: list[str] = []

    async def run(self, code: str, *, tests: AssertTests, limits: object = None, order: int = 0) -> Outcome:
        self.runs.append(code)
        if self.status:
            return Outcome(status=self.status, error="the jail is gone")
        names: dict[str, Any] = {}
        try:
            exec(code, names)
            verdicts = tuple(_holds(text, names) for text in tests.asserts)
        except Exception as error:
            return Outcome(status="failed", error=f"Traceback\n{error!r}", tests=(False,) * len(tests.asserts))
        return Outcome(status="ok" if all(verdicts) else "failed", tests=verdicts)


def _holds(text: str, names: dict[str, Any]) -> bool:
    try:
        exec(text, names)
    except AssertionError:
        return False
    return True


@pytest.fixture
def problem() -> Problem:
    return ADD
