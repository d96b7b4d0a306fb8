"""Complexity grows with structure, whatever it is written like."""

from __future__ import annotations

import ast
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.flow.baselines import WORKFLOWS
from fastgrpo.flow.complexity import complexity
from fastgrpo.flow.types import WorkerCall


def of(body: str) -> float:
    return complexity(ast.parse(f"async def workflow(problem):\n    {body}"))


def test_canonical_structures_are_ordered() -> None:
    values = {name: complexity(ast.parse(code)) for name, code in WORKFLOWS.items()}
    assert min(values, key=values.__getitem__) == "generate"
    assert max(values, key=values.__getitem__) == "generate, test, review, revise"
    assert values["generate"] < 0.2
    assert values["until passed"] < 0.35
    assert values["3 generate, ensemble"] < values["3 generate, ensemble, test"]


def test_retries_and_loops_cost_more() -> None:
    retries = [of(f"return await test(problem, '', retries={n})") for n in (0, 1, 2, 4)]
    assert retries == sorted(set(retries))
    assert of("while x:\n        await generate(problem)") > of("await generate(problem)")
    assert of("for _ in x:\n        await generate(problem)") > of("await generate(problem)")


def served(*operators: str, retries: int = 0) -> float:
    calls = [WorkerCall(operator=name, retries=retries if name == "test" else 0) for name in operators]
    return complexity(ast.parse("async def workflow(problem):\n    return await generate(problem)"), calls)


def test_a_loop_costs_what_it_costs_at_run_time() -> None:
    """Its trips are in no text; the calls that were served are."""
    texts = [of(f"for _ in range({n}):\n        await generate(problem)") for n in (2, 8)]
    assert texts[0] == texts[1]
    assert served("generate") == of("return await generate(problem)")
    assert served(*["generate"] * 8, "ensemble") == pytest.approx(9 / 17)
    assert served("test", retries=8) == pytest.approx(5 / 13)
    drafts = [served(*["generate"] * n) for n in (2, 4, 8, 24)]
    assert drafts == sorted(set(drafts))


def test_what_no_text_shows_is_what_was_served() -> None:
    hidden = ast.parse("async def workflow(problem):\n    exec('...')\n    return await globals()['f'](problem)")
    calls = [WorkerCall(operator=name) for name in ("generate", "generate", "generate", "ensemble", "fly")]
    assert complexity(hidden, calls) == pytest.approx(5 / 13)


@pytest.mark.parametrize(
    "hidden",
    [
        "g = generate; return await g(problem)",
        "g = h = generate; return await h(problem)",
        "g: object = generate; return await g(problem)",
        "g, h = generate, review; return await g(problem)",
        "(g, *h) = [generate, review]; return await g(problem)",
        "g = {'g': generate}; return await g['g'](problem)",
        "g = [generate, custom]; return await g[0](problem)",
        "g = generate if x else review; return await g(problem)",
        "return await (g := generate)(problem)",
        "g = lambda: generate(problem); return await g()",
        "g = lambda p, f=generate: f(p); return await g(problem)",
        "g = functools.partial(generate, problem); return await g()",
        "async def g(): return await generate(problem)\n    return await g()",
        "async def g(p, f=generate): return await f(p)\n    return await g(problem)",
        "async def g(p, *, f=generate): return await f(p)\n    return await g(problem)",
        "def g(): return generate(problem)\n    h = g\n    return await h()",
    ],
)
def test_an_operator_by_another_name_is_an_operator(hidden: str) -> None:
    assert (
        of("return await generate(problem)")
        < of(hidden)
        < of("return [await generate(problem), await f(problem)]") + 0.1
    )
    twice = f"{hidden}; {hidden.rpartition('return ')[2]}" if "return await g(" in hidden else hidden
    assert of(twice) >= of(hidden)


def test_an_alias_and_a_positional_argument_hide_nothing() -> None:
    assert of("g = generate\n    return await g(problem)") >= of("return await generate(problem)")
    assert of("return await test(problem, '', 5)") > of("return await test(problem, '', 1)")


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


def test_nested_loops_and_names_for_names_are_finite() -> None:
    """Eight names, each the last one in 48 lists, was infinity over infinity."""
    names = ["generate", *"abcdefg"]
    lines = [f"{new} = lambda: {nested(old, 48)}" for old, new in pairwise(names)]
    value = complexity(ast.parse("\n".join([*lines, f"async def workflow(problem):\n    return {nested('g', 20)}"])))
    assert 0 < value < 1


def nested(text: str, times: int) -> str:
    for _ in range(times):
        text = f"[{text} for _ in range(8)]"
    return text


OPERATORS = st.sampled_from(["generate(problem)", "review(problem, c)", "test(problem, c)", "ensemble(problem, [c])"])


@settings(deadline=None)
@given(st.lists(OPERATORS, min_size=1, max_size=8), OPERATORS)
def test_one_more_call_or_branch_is_more_complex(calls: list[str], more: str) -> None:
    body = "\n    ".join(f"c = await {call}" for call in calls)
    assert 0 < of(body) < of(f"{body}\n    c = await {more}") < 1
    assert of(body) < of(f"{body}\n    if c:\n        pass")
