"""The warm start: a paid distillation survives what interrupts it, and says why it is not enough."""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fastgrpo import sft
from fastgrpo.config import Config, Data, Model, Sft
from fastgrpo.errors import CannotWrite, UserError
from fastgrpo.flow.distill import read_traces
from fastgrpo.flow.types import Execution, Problem
from fastgrpo.policy.loading import load_policy
from fastgrpo.record.log import RunLog
from fastgrpo.types import Result, Reward, Rollout
from tests.flow.conftest import ADD, ScriptedWorker


class Environment:
    """Every workflow ends with `execution`, in turn with those of `first`."""

    def __init__(self, execution: Execution, *first: Execution) -> None:
        self.execution, self.first, self.worker, self.runs = execution, list(first), ScriptedWorker(""), 0

    def prompt(self, problem: Problem) -> str:
        return problem.prompt

    async def execute(self, problem: Problem, completion: str, seed: int) -> Execution:
        self.runs += 1
        return self.first.pop(0) if self.first else self.execution

    def results(self, problem: Problem, rollouts: list[Rollout]) -> list[Result]:
        return [Result(reward=Reward(total=rollout.executions[-1].pass_rate)) for rollout in rollouts]


PASSES = Execution(status="ok", pass_rate=1.0, public_pass_rate=1.0)
FAILS = Execution(status="ok", pass_rate=0.0, public_pass_rate=0.0)
DOWN = Execution(status="infrastructure", error="the endpoint is down")


def config(tmp_path: Path, **settings: Any) -> Config:
    (tmp_path / "run").mkdir(exist_ok=True)
    return Config(runs=str(tmp_path), name="run", sft=Sft(teacher_samples=8, rounds=1, **settings))


def distil(config: Config, environment: Environment, log: RunLog | None = None) -> None:
    asyncio.run(sft._distill(config, environment, [ADD], log or RunLog(None), None))  # type: ignore[arg-type]


def test_a_dead_endpoint_is_a_users_error_and_what_was_made_is_kept(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with pytest.raises(UserError, match=r"^5 traces failed, 5 of them because: the endpoint is down; .*the 3 that are"):
        distil(settings, Environment(DOWN, PASSES, PASSES, PASSES))
    resumed = Environment(PASSES)
    distil(settings, resumed)
    assert resumed.runs == 5
    assert sorted(trace.sample for trace in read_traces(settings.folder / "traces.jsonl")) == list(range(8))
    again = Environment(DOWN)
    distil(settings, again)
    assert again.runs == 0


@pytest.mark.parametrize(
    "other", [{"task": "code"}, {"data": Data(reward="m:f")}, {"data": Data(environment="verifiers:x")}]
)
def test_a_task_without_workflows_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="sft teaches workflows: leave out task"):
        asyncio.run(sft.teach(Config(**other), resume=False))


def test_adapters_without_peft_are_refused_before_a_teacher_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(sft, "load_problems", lambda _: pytest.fail("began"))
    settings = Config(runs=str(tmp_path), name="run", model=Model(lora_rank=4))
    with pytest.raises(UserError, match=r"model\.lora_rank needs peft, .*: pip install 'fastgrpo\[lora\]'"):
        asyncio.run(sft.teach(settings, resume=False))
    assert list(tmp_path.iterdir()) == []


def test_a_few_failures_are_said_and_passed_over(tmp_path: Path) -> None:
    said: list[str] = []
    log = RunLog(None)
    log.say = said.append  # type: ignore[method-assign]
    distil(config(tmp_path), Environment(PASSES, DOWN, DOWN), log)
    assert said == [
        "distilled 6 of 8 traces of 1 problems; 1 to learn from",
        "2 traces failed, 2 of them because: the endpoint is down",
    ]


def test_nothing_to_learn_from_names_the_bar(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 8 traces passes 50% .* lower sft\.min_pass_rate"):
        distil(config(tmp_path), Environment(FAILS))
    distil(config(tmp_path, min_pass_rate=0.0), Environment(DOWN))


@pytest.mark.parametrize("resume", [False, True])
def test_a_resumed_run_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool) -> None:
    @asynccontextmanager
    async def environment(*_: object) -> AsyncIterator[Environment]:
        yield Environment(PASSES)

    async def stage(config: Config, *_: object) -> Path:
        (config.folder / "sft").mkdir(exist_ok=True)
        return config.folder / "sft"

    monkeypatch.setattr(sft, "load_problems", lambda _: ([ADD], []))
    monkeypatch.setattr(sft, "open_environment", environment)
    monkeypatch.setattr(sft, "warm_start", stage)
    settings = Config(runs=str(tmp_path), name="run")
    asyncio.run(sft.teach(settings, resume=False))
    (settings.folder / "traces.jsonl").write_text("paid")
    asyncio.run(sft.teach(settings, resume=resume))
    assert (settings.folder / "traces.jsonl").exists() == resume
    assert (tmp_path / "run.1" / "traces.jsonl").exists() != resume


def test_a_full_disk_under_the_policy_is_one_sentence_and_leaves_nothing_half_written(
    tiny_folder: Path, tmp_path: Path
) -> None:
    policy, finished = load_policy(tiny_folder), tmp_path / "sft"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CannotWrite, match=r"cannot write the warm-started policy .*sft: .*; free space") as caught:
            sft.save_finished(policy, finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    sft.save_finished(policy, finished)
    load_policy(finished)
