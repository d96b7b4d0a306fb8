"""What the policy reads tells it the query and the public tests, and no secret."""

from __future__ import annotations

import msgspec
import pytest

from fastgrpo.flow.names import OPERATORS
from fastgrpo.flow.parse import parse_completion
from fastgrpo.flow.problems.files import load
from fastgrpo.flow.prompt import query_prompt, round_feedback
from fastgrpo.flow.types import NO_TESTS, Execution
from tests.flow.conftest import ADD


def test_the_short_prompt_adds_a_few_words() -> None:
    for problem in load("humaneval")[:20]:
        text = query_prompt(problem, "short")
        assert problem.prompt.strip() in text
        assert len(text.split()) - len(problem.prompt.split()) <= 4
        assert problem.id not in text


@pytest.mark.parametrize("answer", [None, "5"])
def test_both_prompts_say_that_there_are_no_public_tests_and_only_then(answer: str | None) -> None:
    without = msgspec.structs.replace(ADD, public_tests=NO_TESTS, answer=answer)
    assert query_prompt(without, "short") == f"Problem:\n{ADD.prompt}\nThere are no public tests.\nWorkflow:\n"
    full = query_prompt(without, "full")
    assert full.endswith(f"has no public tests, so test() passes nothing.\n\nThe problem:\n{ADD.prompt}")
    assert ("asks for a number" in full) == (answer is not None)
    for instruction in ("short", "full"):
        assert "no public tests" not in query_prompt(ADD, instruction)


def test_the_full_prompt_describes_every_operator_and_a_valid_example() -> None:
    problem = load("humaneval")[0]
    text = query_prompt(problem, "full")
    assert text.endswith(problem.prompt)
    assert all(f"- {name}(" in text for name in OPERATORS)
    example = text[text.index("<think>One") : text.index("The problem:")]
    assert parse_completion(example).source.startswith("async def workflow")


def test_the_full_prompt_names_the_workers_where_there_is_a_choice() -> None:
    problem = load("humaneval")[0]
    assert 'worker="small" or "tiny"' in query_prompt(problem, "full", ("large", "small", "tiny"))
    assert "{workers}" not in query_prompt(problem, "full", ("one",))
    assert "worker=" not in query_prompt(problem, "full", ("one",))


def test_feedback_shows_public_results_only() -> None:
    execution = Execution(status="ok", pass_rate=0.25, feedback="1 of 2 public tests fail:\nassert f(1) == 2")
    text = round_feedback(execution)
    assert "assert f(1) == 2" in text
    assert "0.25" not in text
    assert text.endswith("\n")
