"""The canonical structure: operators and control flow, whatever they are written like."""

from __future__ import annotations

import ast
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.flow.baselines import WORKFLOWS
from fastgrpo.flow.structure import structure_of, substructures


def of(body: str) -> str:
    return structure_of(ast.parse(f"async def workflow(problem):\n    {body}"))


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("generate", "generate"),
        ("until passed", "until(generate test)"),
        ("3 generate, first passed", "each(generate) until(test)"),
        ("small until passed, then large", "until(generate@small test) generate"),
        ("plan, until passed", "custom until(generate test)"),
        ("generate, review, revise", "generate review if(revise)"),
        ("3 generate, ensemble, test", "each(generate) ensemble test*"),
    ],
)
def test_the_taught_structures_read_as_what_they_do(name: str, structure: str) -> None:
    assert structure_of(ast.parse(WORKFLOWS[name])) == structure


@pytest.mark.parametrize(
    ("body", "structure"),
    [
        ("for _ in range(3): await generate(problem)", "loop(generate)"),
        ("while not await test(problem, '', 0): await generate(problem)", "until(test generate)"),
        ("for _ in range(3):\n        await generate(problem)\n        break", "generate"),
        ("if x: await generate(problem)\n    else: await review(problem, '')", "if(generate else(review))"),
        ("if 1: await generate(problem)\n    else: await review(problem, '')", "generate"),
        ("if x: y = 1\n    return await generate(problem)", "generate"),
        ("return await ensemble(problem, [await generate(problem)])", "generate ensemble"),
        (
            "async def f(p): return await generate(p)\n    return [await f(problem), await f(problem)]",
            "generate generate",
        ),
        ("g = {'a': generate}\n    return await g['a'](problem)", "generate"),
        ("return ''", ""),
        ("return ''\n    await generate(problem)", ""),
    ],
)
def test_control_flow(body: str, structure: str) -> None:
    assert of(body) == structure


def test_parts_are_counted() -> None:
    tree = ast.parse(WORKFLOWS["small until passed, then large"])
    assert substructures(tree) == {"until(generate@small test)": 1, "generate@small": 1, "test": 1, "generate": 1}


def test_code_without_a_workflow_has_no_structure() -> None:
    assert structure_of(ast.parse("await generate(problem)")) == ""


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(1, 40))
def test_helpers_that_call_helpers_are_followed_for_so_long(names: int, calls: int) -> None:
    code = "\n    ".join(
        f"def f{number}(): {'; '.join([f'f{(number + 1) % names}()'] * calls)}; generate(problem)"
        for number in range(names)
    )
    began = time.process_time()
    assert "generate" in of(f"{code}\n    f0()")
    assert time.process_time() - began < 1
