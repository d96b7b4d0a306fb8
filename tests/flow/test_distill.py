"""Distillation: rounds with feedback become one trace; the scripted teacher escalates; what is paid is kept."""

import asyncio
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.flow.distill import TeacherTrace, TraceFile, distill, read_traces
from fastgrpo.flow.parse import parse_completion
from fastgrpo.flow.teachers import ScriptedTeacher
from fastgrpo.flow.types import Execution, Problem, RequestRejected, WorkerError
from fastgrpo.types import Result, Reward, Rollout
from fastgrpo_sandbox import AssertTests

TESTS = AssertTests(asserts=("assert f() == 1",))
PROBLEM = Problem(id="p", prompt="def f():", entry_point="f", solution="", public_tests=TESTS, hidden_tests=TESTS)


class ScriptedEnvironment:
    """Executions whose public pass rate and status come from a list, one a round."""

    def __init__(self, *outcomes: tuple[str, float]) -> None:
        self.outcomes = list(outcomes)

    def prompt(self, problem: Problem) -> str:
        return f"Problem: {problem.prompt}"

    async def execute(self, problem: Problem, completion: str, seed: int) -> Execution:
        status, rate = self.outcomes.pop(0)
        source = parse_completion(completion).source
        return Execution(status=status, workflow=source, public_pass_rate=rate, pass_rate=rate)  # type: ignore[arg-type]

    def results(self, problem: Problem, rollouts: list[Rollout]) -> list[Result]:
        return [Result(reward=Reward(total=rollout.executions[-1].pass_rate)) for rollout in rollouts]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "traces.jsonl"


def run(file: Path, environment: ScriptedEnvironment, teacher: Any = None, **settings: int) -> list[str]:
    settings = {"rounds": 3, "samples": 1, "seed": 3, "concurrency": 32} | settings
    work = distill(environment, teacher or ScriptedTeacher(), [PROBLEM], TraceFile(file), **settings)  # type: ignore[arg-type]
    return asyncio.run(work)


def traces(file: Path, environment: ScriptedEnvironment, **settings: int) -> list[TeacherTrace]:
    run(file, environment, **settings)
    return read_traces(file)


def test_rounds_go_on_until_the_public_tests_pass_and_are_concatenated(file: Path) -> None:
    (trace,) = traces(file, ScriptedEnvironment(("ok", 0.0), ("ok", 0.5), ("ok", 1.0)))
    assert trace.rounds == 3
    parsed = parse_completion(trace.text)
    assert parsed.source == trace.workflow
    assert parsed.reasoning == trace.reasoning
    file.unlink()
    (short,) = traces(file, ScriptedEnvironment(("ok", 1.0)))
    assert short.rounds == 1
    assert trace.reasoning.startswith(short.reasoning)


def test_the_number_of_rounds_is_bounded(file: Path) -> None:
    (trace,) = traces(file, ScriptedEnvironment(("ok", 0.0), ("ok", 0.0), ("ok", 1.0)), rounds=2)
    assert trace.rounds == 2


def test_a_failure_of_ours_leaves_no_trace_and_is_counted(file: Path) -> None:
    assert len(run(file, ScriptedEnvironment(("ok", 0.0), ("infrastructure", 0.0)))) == 1
    assert read_traces(file) == []


def test_a_failed_workflow_is_recorded_as_such(file: Path) -> None:
    (trace,) = traces(file, ScriptedEnvironment(("timeout", 0.0)), rounds=1)
    assert (trace.status, trace.pass_rate) == ("timeout", 0.0)


class UnsteadyTeacher(ScriptedTeacher):
    """Raises the given error in those of its calls whose number is in `fails`; counts its calls."""

    def __init__(self, error: Exception, fails: Container[int]) -> None:
        super().__init__()
        self.error, self.fails, self.calls = error, fails, 0

    async def write(self, problem: Problem, rounds: Any, seed: int) -> str:
        self.calls += 1
        if self.calls in self.fails:
            raise self.error
        return "no workflow" if self.calls == 1 else await super().write(problem, rounds, seed)


class PassingEnvironment(ScriptedEnvironment):
    async def execute(self, problem: Problem, completion: str, seed: int) -> Execution:
        if "workflow(" not in completion:
            return Execution(status="invalid")
        self.outcomes = [("ok", 1.0)]
        return await super().execute(problem, completion, seed)


def test_what_a_teacher_wrote_is_kept_and_only_the_rest_is_asked_again(file: Path) -> None:
    teacher = UnsteadyTeacher(WorkerError("down"), fails={2, 5})
    failed = run(file, PassingEnvironment(), teacher, samples=6, rounds=1)
    assert failed == ["down", "down"]
    made = read_traces(file)
    assert sorted(trace.sample for trace in made) == [0, 2, 3, 5]
    assert [trace.status for trace in made].count("invalid") == 1
    file.write_bytes(file.read_bytes() + b'{"problem_id": "p", "sam')  # torn by a crash
    again = UnsteadyTeacher(RequestRejected("too long"), fails={2})
    again.calls = 1
    assert run(file, PassingEnvironment(), again, samples=6, rounds=1) == ["too long"]
    assert again.calls == 3
    assert len(read_traces(file)) == 5


def test_a_teacher_that_is_gone_is_not_asked_for_every_trace(file: Path) -> None:
    teacher = UnsteadyTeacher(WorkerError("gone"), fails=range(1000))
    assert run(file, PassingEnvironment(), teacher, samples=500, concurrency=4) == ["gone"] * 4
    assert teacher.calls == 4


def test_an_error_that_is_none_of_the_teachers_is_not_swallowed(file: Path) -> None:
    with pytest.raises(ConnectionError, match="no teacher"):
        run(file, PassingEnvironment(), UnsteadyTeacher(ConnectionError("no teacher"), fails={1}))
    with pytest.raises(ConnectionError, match="no teacher"):
        run(file, PassingEnvironment(), UnsteadyTeacher(ConnectionError("no teacher"), fails={1}))
