"""Complexity grows with structure, whatever it is written like."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.structures import WORKFLOWS
from fastgrpo.workflow.complexity import complexity


def of(body: str) -> float:
    return complexity(ast.parse(f"async def workflow(problem):\n    {body}"))


def test_canonical_structures_are_ordered() -> None:
    values = {name: complexity(ast.parse(code)) for name, code in WORKFLOWS.items()}
    assert min(values, key=values.__getitem__) == "generate"
    assert max(values, key=values.__getitem__) == "3 generate, ensemble, test"
    assert values["generate"] < 0.2
    assert values["generate, test"] < values["generate, test, review, revise"]
    assert values["3 generate, ensemble"] < values["3 generate, ensemble, test"]


def test_more_drafts_retries_and_rounds_cost_more() -> None:
    drafts = [of(f"return await asyncio.gather(*[generate(problem) for _ in range({n})])") for n in (1, 2, 5)]
    retries = [of(f"return await test(problem, '', retries={n})") for n in (0, 1, 2, 4)]
    nested = "for _ in range(2):\n        for _ in range(3):\n            await generate(problem)"
    assert drafts == sorted(set(drafts))
    assert retries == sorted(set(retries))
    assert of(nested) > of("for _ in range(3):\n        await generate(problem)")
    assert of("while x:\n        await generate(problem)") > of("await generate(problem)")


def test_an_alias_and_a_positional_argument_hide_nothing() -> None:
    assert of("g = generate\n    return await g(problem)") >= of("return await generate(problem)")
    assert of("return await test(problem, '', 5)") > of("return await test(problem, '', 1)")


@pytest.mark.parametrize(
    "iterated", ["range(10**9)", "range(0, 5, 0)", "range(9, 3)", "range()", "range(1, 2, 3, 4)", "[]", "range(True)"]
)
def test_odd_loops_are_bounded(iterated: str) -> None:
    assert of("await generate(problem)") < of(f"for _ in {iterated}:\n        await generate(problem)") < 1


OPERATORS = st.sampled_from(["generate(problem)", "review(problem, c)", "test(problem, c)", "ensemble(problem, [c])"])


@settings(deadline=None)
@given(st.lists(OPERATORS, min_size=1, max_size=8), OPERATORS)
def test_one_more_call_or_branch_is_more_complex(calls: list[str], more: str) -> None:
    body = "\n    ".join(f"c = await {call}" for call in calls)
    assert 0 < of(body) < of(f"{body}\n    c = await {more}") < 1
    assert of(body) < of(f"{body}\n    if c:\n        pass")
