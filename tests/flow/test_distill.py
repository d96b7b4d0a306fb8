"""Distillation: rounds with feedback become one trace; the scripted teacher escalates; bad traces stay out."""

import asyncio
import random
from types import SimpleNamespace

import pytest

from fastgrpo.errors import UserError
from fastgrpo.flow.distill import Trace, distill, read_traces, write_traces
from fastgrpo.flow.parse import parse_completion
from fastgrpo.flow.teachers import ScriptedTeacher
from fastgrpo.flow.types import Execution, Problem
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


def traces(environment: ScriptedEnvironment, rounds: int = 3) -> list[Trace]:
    return asyncio.run(distill(environment, ScriptedTeacher(), [PROBLEM], rounds=rounds, samples=1, seed=3))


def test_rounds_go_on_until_the_public_tests_pass_and_are_concatenated() -> None:
    (trace,) = traces(ScriptedEnvironment(("ok", 0.0), ("ok", 0.5), ("ok", 1.0)))
    assert trace.rounds == 3
    parsed = parse_completion(trace.text)
    assert parsed.source == trace.workflow
    assert parsed.reasoning == trace.reasoning
    (short,) = traces(ScriptedEnvironment(("ok", 1.0)))
    assert short.rounds == 1
    assert trace.reasoning.startswith(short.reasoning)


def test_the_number_of_rounds_is_bounded() -> None:
    (trace,) = traces(ScriptedEnvironment(("ok", 0.0), ("ok", 0.0), ("ok", 1.0)), rounds=2)
    assert trace.rounds == 2


def test_a_failure_of_ours_leaves_no_trace() -> None:
    assert traces(ScriptedEnvironment(("ok", 0.0), ("infrastructure", 0.0))) == []


def test_traces_survive_the_file_and_a_broken_line_is_named(tmp_path) -> None:
    draw = random.Random(0)
    written = [
        Trace(problem_id=f"p{i}", prompt="é\n", reasoning="r", workflow="w", rounds=1, pass_rate=draw.random())
        for i in range(3)
    ]
    path = tmp_path / "traces.jsonl"
    write_traces(path, written)
    assert read_traces(path) == written
    path.write_bytes(path.read_bytes() + b'{"prompt": 1}\n')
    with pytest.raises(UserError, match=r"traces\.jsonl:4"):
        read_traces(path)
    with pytest.raises(UserError, match="absent"):
        read_traces(tmp_path / "absent")


def test_an_unreachable_teacher_is_not_swallowed() -> None:
    class Silent:
        async def write(self, problem, rounds, seed):
            raise ConnectionError("no teacher")

    with pytest.raises(ConnectionError, match="no teacher"):
        asyncio.run(distill(SimpleNamespace(), Silent(), [PROBLEM], rounds=1, samples=1, seed=0))
