"""Two ranks of the real training loop, one of which fails in its second step: `failing_ranks.py HOW MODEL RUNS`.

test_failure.py runs it under torchrun or its agent. Only `hangs` starts a real vLLM; the others draw at random.
"""

import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Never
from unittest import mock

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.program import run_async, run_program
from fastgrpo.ranks.collectives import joined_ranks
from fastgrpo.tasks import Task
from fastgrpo.train import run
from fastgrpo.training import learner
from fastgrpo.types import Result, Reward, Rollout
from tests.helpers.random_engine import random_engine


class Failing:
    """Rewards the length of the completion, and fails on rank 1 once the first step has left its checkpoint."""

    def __init__(self, how: str, runs: Path) -> None:
        self.how, self.runs = how, runs

    def prompt(self, problem: Any) -> str:
        return problem.prompt

    async def execute(self, problem: Any, completion: str, seed: int) -> float:
        if os.environ["RANK"] == "1" and (self.runs / "failing/checkpoints/step-000001").exists():
            self.fail()
        return (seed % 7) / 7

    def fail(self) -> None:
        (self.runs / "failed").touch()
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "raises":
            mock.patch.object(learner.Learner, "update", divide_by_zero).start()
        elif self.how == "hangs":
            from vllm.v1.engine.llm_engine import LLMEngine

            mock.patch.object(LLMEngine, "step", hang).start()

    def feedback_text(self, execution: float) -> str:
        return "again"

    def results(self, problem: Any, rollouts: list[Rollout]) -> list[Result]:
        return [Result(reward=Reward(total=rollout.executions[-1])) for rollout in rollouts]


def hang(_: object) -> None:
    time.sleep(1000)


def divide_by_zero(*_: object, **__: object) -> Never:
    raise ZeroDivisionError("an update divides by zero")


def load_problems(config: Config) -> tuple[list[Any], list[Any]]:
    return [SimpleNamespace(id=f"p{i}", prompt=f"count {i}", difficulty=0.5) for i in range(4)], []


def main(how: str, model: str, runs: str) -> None:
    values: dict[str, Any] = {"engine.max_model_len": 64, "engine.max_num_seqs": 8, "engine.kv_cache_gib": 0.05}
    values |= {
        "engine.process": "shared",
        "engine.step_timeout_s": 3.0,
        "grpo.prompts_per_step": 2,
        "grpo.group_size": 4,
        "checkpoint.every": 1,
    }
    values |= {"grpo.max_new_tokens": 16, "model.path": model, "runs": runs, "name": "failing"}
    if how != "hangs":
        mock.patch.object(learner, "open_engine", random_engine).start()
    Path(runs, f"rank{os.environ['RANK']}.pid").write_text(str(os.getpid()))

    @asynccontextmanager
    async def open_environment(config: Config, log: object) -> AsyncIterator[Failing]:
        yield Failing(how, Path(runs))

    with joined_ranks():
        run_async(lambda: run(resolve(values), task=Task(load_problems, open_environment)))


def program(*arguments: str) -> None:
    run_program(lambda: main(*arguments))


if __name__ == "__main__":
    program(*sys.argv[1:])
