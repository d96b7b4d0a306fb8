"""The canonical structure: operators and control flow, whatever they are written like."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.flow.baselines import WORKFLOWS
from fastgrpo.flow.complexity import complexity
from fastgrpo.flow.parse import parse_completion
from fastgrpo.flow.structure import structure_of, substructures
from tests.helpers.work import calls_of


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


# Calls of functions, a tenth of a second's: a hostile workflow is read within the trainer's process.
MOST_CALLS = 1_500_000


@settings(deadline=None, max_examples=10)
@given(st.integers(2, 40), st.integers(1, 40))
def test_helpers_that_call_helpers_are_followed_for_so_long(names: int, calls: int) -> None:
    code = "\n    ".join(
        f"def f{number}(): {'; '.join([f'f{(number + 1) % names}()'] * calls)}; generate(problem)"
        for number in range(names)
    )
    tree = ast.parse(f"async def workflow(problem):\n    {code}\n    f0()")
    assert "generate" in structure_of(tree)
    assert calls_of(lambda: structure_of(tree)) < MOST_CALLS


CALLER = "async def workflow(p):\n f()\n"
NAMES = [f"a{number}" for number in range(780)]
LOOPS = "".join(f"{' ' * depth}for a in a:\n{' ' * depth} if a:\n" for depth in range(1, 48, 2))
HOSTILE = {
    "a helper called often": f"def f():\n generate\n {'a<' * 3700}a\nasync def workflow(p):\n {'f;' * 64}f\n",
    "operators called often": f"def f():\n {'test,' * 1400}a\nasync def workflow(p):\n {'f;' * 64}f\n",
    "loops in loops": f"def f():\n{LOOPS}{' ' * 49}test;{'a<' * 2600}a\nasync def workflow(p):\n {'f;' * 64}f\n",
    "lambdas in lambdas": f"f=lambda:{'(f:=lambda:' * 26}{'f<' * 3600}f{')' * 26}\n{CALLER}",
    "one name for all of many": f"{'f=' * 1900}[{'f,' * 1900}]\n{CALLER}",
    "many names for all of many": f"{'='.join(NAMES)}=f=[{','.join(NAMES)}]\n{CALLER}",
    "a tuple for all of many": f"{','.join(NAMES)},f=[{','.join(NAMES)}]\n{CALLER}",
    "meaning after meaning": "f=[f,f,f,f,f,f,f,f]\n" * 390 + CALLER,
    "helpers as deep as can be": "".join(
        f"def {name}():\n {'test if a else(' * 50}{after},{after}{')' * 50}\n" for name, after in pairwise("fghijklm")
    )
    + f"def m():\n {'[' * 50}test{']' * 50}\n{CALLER}",
}


@pytest.mark.parametrize("code", HOSTILE.values(), ids=HOSTILE)
def test_no_workflow_that_is_accepted_takes_long_to_read(code: str) -> None:
    tree = parse_completion(f"</think>\n```python\n{code}```").tree
    for read in (structure_of, substructures, complexity):
        assert calls_of(partial(read, tree)) < MOST_CALLS


def test_helpers_are_followed_as_deep_as_any_stack_allows() -> None:
    """Each as deep as is accepted, they were a RecursionError in the trainer."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 600)
    try:
        assert "else(if(test" in structure_of(ast.parse(HOSTILE["helpers as deep as can be"]))
    finally:
        sys.setrecursionlimit(limit)
