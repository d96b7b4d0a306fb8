"""Complexity grows with structure, whatever it is written like."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.structures import WORKFLOWS
from fastgrpo.flow.complexity import complexity


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


@pytest.mark.parametrize(
    "hidden",
    [
        "codes = [g(problem) for g in [generate] * 8]",
        "codes = [g(problem) for g in 8 * (generate,)]",
        "codes = list(map(generate, range(8)))",
        "codes = list(map(lambda _: generate(problem), range(8)))",
        "codes = list(itertools.starmap(generate, [(problem,)] * 8))",
        "codes = [g(problem) for g in itertools.repeat(generate, 8)]",
        "g = generate; codes = [g(problem) for _ in range(8)]",
        "g = h = generate; codes = [h(problem) for _ in range(8)]",
        "codes = [(g := generate)(problem)] + [g(problem) for _ in range(7)]",
        "g = lambda: generate(problem); codes = [g() for _ in range(8)]",
        "g = functools.partial(generate, problem); codes = [g() for _ in range(8)]",
        "async def g(): return await generate(problem)\n    codes = [g() for _ in range(8)]",
        "def g(): return generate(problem)\n    h = g\n    codes = [h() for _ in range(8)]",
        "async def g(n): return [await generate(problem)] + (await g(n - 1) if n else [])\n    codes = g(7)",
    ],
)
def test_calls_are_hard_to_hide(hidden: str) -> None:
    assert of(hidden) > 0.9 * of("codes = [generate(problem) for _ in range(8)]")


def test_an_alias_and_a_positional_argument_hide_nothing() -> None:
    assert of("g = generate\n    return await g(problem)") >= of("return await generate(problem)")
    assert of("return await test(problem, '', 5)") > of("return await test(problem, '', 1)")


def test_code_handed_to_a_call_counts_as_a_loop_of_unknown_length() -> None:
    handed = of("def run(f, n): return [f(problem) for _ in range(n)]\n    codes = run(generate, 8)")
    assert handed > of("codes = [generate(problem) for _ in x]")
    assert of("return await ensemble(problem, [code])") < of("return await ensemble(problem, generate)")


def test_a_workflow_that_calls_itself_counts_as_often() -> None:
    recursive = (
        "async def workflow(problem, n=7):\n    await generate(problem)\n    if n: await workflow(problem, n - 1)"
    )
    assert complexity(ast.parse(recursive)) > of("codes = [generate(problem) for _ in range(7)]")


def test_a_function_counts_for_as_often_as_it_is_named() -> None:
    helper = "async def draft(): return await generate(problem)\n    "
    unused, once, twice = (of(helper + "; ".join(["await draft()"] * n) if n else helper + "pass") for n in range(3))
    plain = [of("; ".join(["await generate(problem)"] * n)) for n in (1, 2)]
    assert plain[0] < unused < once < twice
    assert plain[1] < twice < plain[1] + 0.1
    assert once < plain[1]


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(1, 3))
def test_names_for_names_are_bounded(names: int, calls: int) -> None:
    """Each function calls the next one, the last one calls the first."""
    code = "\n    ".join(
        f"def f{number}(): {'; '.join([f'f{(number + 1) % names}()'] * calls)}; generate(problem)"
        for number in range(names)
    )
    assert of("generate(problem)") < of(f"{code}\n    f0()") < 1


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
