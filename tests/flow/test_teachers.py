"""The scripted teacher: valid workflows of many structures, whatever the query; more drafts after a failure."""

from __future__ import annotations

import asyncio
from collections import Counter
from statistics import quantiles

from fastgrpo.flow.complexity import complexity
from fastgrpo.flow.parse import Workflow, parse_completion
from fastgrpo.flow.structure import structure_of
from fastgrpo.flow.teachers import ScriptedTeacher
from fastgrpo.flow.types import Execution, Problem
from fastgrpo_sandbox import AssertTests

TESTS = AssertTests(asserts=("assert f() == 1",))
PROBLEM = Problem(id="p", prompt="def f():", entry_point="f", solution="", public_tests=TESTS, hidden_tests=TESTS)
TEACHER = ScriptedTeacher(("large", "small"))


def write(seed: int, problem: Problem = PROBLEM, failed: bool = False) -> str:
    rounds = [("", Execution(status="ok"))] if failed else []
    return asyncio.run(TEACHER.write(problem, rounds, seed))


def workflows(count: int, failed: bool = False) -> list[Workflow]:
    return [parse_completion(write(seed, failed=failed)) for seed in range(count)]


def test_one_problem_gets_many_structures_cheap_and_dear() -> None:
    written = workflows(200)
    structures = Counter(structure_of(workflow.tree) for workflow in written)
    assert len(structures) > 15
    assert structures["generate"] > 20
    lowest, *_, highest = quantiles((complexity(workflow.tree) for workflow in written), n=10)
    assert highest > 2 * lowest
    language = " ".join(workflow.source for workflow in written)
    for part in ("break", "gather", "custom(", "ensemble(", "revise(", "temperature=heat", 'worker="small"', "hint in"):
        assert part in language


def test_equal_reasoning_has_equal_code() -> None:
    """Or the policy could not learn which code to write."""
    written = {workflow.reasoning: workflow.source for workflow in workflows(400)}
    assert all(written[workflow.reasoning] == workflow.source for workflow in workflows(400))


def test_after_a_failure_it_drafts_until_the_tests_pass() -> None:
    for workflow in workflows(40, failed=True):
        assert workflow.reasoning.startswith("The tests fail")
        assert "until(generate test)" in structure_of(workflow.tree)


def test_it_draws_without_regard_to_the_query() -> None:
    long = Problem(
        id="p", prompt="x " * 99, entry_point="f", solution="", public_tests=TESTS, hidden_tests=TESTS, difficulty=1.0
    )
    assert all(write(seed).replace("A short", "A long") == write(seed, long) for seed in range(20))


def test_texts_are_short_enough_for_a_tiny_policy() -> None:
    assert max(len(write(seed)) for seed in range(200)) < 600


def test_without_a_choice_no_worker_is_named() -> None:
    written = [asyncio.run(ScriptedTeacher().write(PROBLEM, [], seed)) for seed in range(100)]
    assert not any("worker=" in text for text in written)
