"""Distinctness within a group, and the reward's terms."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.config import EfficiencyBy, RewardWeights
from fastgrpo.flow.baselines import WORKFLOWS
from fastgrpo.flow.complexity import complexity
from fastgrpo.flow.names import OPERATORS
from fastgrpo.flow.reward import distinctness, group_rewards, inefficiency, spent_calls, warmed_up
from fastgrpo.flow.types import Execution, WorkerCall

ONE, TWO = WORKFLOWS["generate"], WORKFLOWS["3 generate, ensemble, test"]


def tree(code: str) -> ast.AST:
    return ast.parse(code)


def test_copies_are_not_distinct() -> None:
    assert distinctness([tree(ONE), tree(ONE), tree(TWO)])[:2] == [0.0, 0.0]
    assert distinctness([tree(ONE), tree(ONE), tree(TWO)])[2] > 0.5


def test_names_texts_and_comments_make_no_difference() -> None:
    left = (
        'async def workflow(problem):\n    """Doc."""\n    a = await generate(problem, "Be brief")\n    return a  # x'
    )
    right = 'async def workflow(query):\n    best = await generate(query, "Think!")\n    return best'
    assert distinctness([tree(left), tree(right)]) == [0.0, 0.0]


def test_another_operator_worker_or_loop_makes_a_difference() -> None:
    left = "async def workflow(p):\n    r = await review(p, '')\n    return r.feedback"
    for right in (
        left.replace("review", "revise"),
        left.replace("''", "'', worker='small'"),
        left.replace("    r =", "    for _ in x: r ="),
    ):
        assert min(distinctness([tree(left), tree(right)])) > 0


@pytest.mark.parametrize(
    "junk",
    [
        "{code}\nX = ----------{number}\n",
        "{code}\n{number}.5\n",
        "import os\nx{number} = 1\ndef f{number}(a, b={number}): return a\n{code}",
        "async def unused{number}(p): return await review(p, '')\n{code}",
        "{code}\n    await review(problem, '{number}')",
        "{head}\n    if {number} < 0:\n        pass\n    return await generate(problem, '{number}')",
        "{head}\n    if False:\n        await review(problem, 'x' * {number})\n    return await generate(problem)",
        "{head}\n    try:\n        return await generate(problem)\n    finally:\n        x = {number}",
        "{head}\n    while True:\n        return await generate(problem)",
        "{head}\n    f{number} = generate\n    return await f{number}(problem)",
        "{head}\n    async def f{number}(): return await generate(problem)\n    return await f{number}()",
        "{head}\n    for i in range({number}): i += 1\n    return await generate(problem, temperature={number} / 9)",
    ],
)
def test_junk_makes_no_workflow_distinct(junk: str) -> None:
    head = ONE.partition("\n")[0]
    codes = [ONE, *(junk.format(code=ONE, head=head, number=number) for number in range(1, 8))]
    assert distinctness([tree(code) for code in codes]) == [0.0] * 8


def test_structure_that_never_runs_makes_no_workflow_distinct() -> None:
    dead = "async def workflow(p):\n    if len(p.prompt) > 10**9: await review(p, '')\n    return await generate(p)"
    once = [WorkerCall(operator="generate", worker="w")]
    assert min(distinctness([tree(ONE), tree(dead)])) > 0
    assert distinctness([tree(ONE), tree(dead)], [once, once]) == [0.0, 0.0]
    assert min(distinctness([tree(ONE), tree(dead)], [once, [*once, WorkerCall(operator="review", worker="w")]])) > 0
    refused = WorkerCall(operator="review")
    assert distinctness([tree(ONE), tree(dead)], [once, [*once, refused]]) == [0.0, 0.0]


def test_alone_or_absent_is_not_distinct() -> None:
    assert distinctness([tree(ONE)]) == [0.0]
    assert distinctness([None, tree(ONE), None]) == [0.0, 0.0, 0.0]
    assert distinctness([]) == []


def test_a_number_too_long_to_write_out_is_a_constant_like_any_other() -> None:
    """Python refuses to write more than 4300 digits, but reads 4000 hexadecimal ones: 8000 characters of code may."""
    long = f"async def workflow(p):\n    n = 0x{'f' * 4000}\n    return ''"
    rewards = group_rewards([ok(long, 0.0, 0.1), ok(long[:-20] + "1\n    return ''", 0.0, 0.1)], RewardWeights())
    assert all(terms is not None and terms.terms["diversity"] == 0 for terms in rewards)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([None, *WORKFLOWS.values()]), max_size=8), st.randoms())
def test_distinctness_is_bounded_and_blind_to_order(codes: list[str | None], random: object) -> None:
    trees = [None if code is None else tree(code) for code in codes]
    values = distinctness(trees)
    assert all(0 <= value <= 1 for value in values)
    assert all(value == 0 for value, code in zip(values, codes, strict=True) if code and codes.count(code) > 1)
    assert distinctness(trees[::-1]) == pytest.approx(values[::-1])


def ok(code: str, pass_rate: float, complexity: float) -> Execution:
    calls = tuple(answered(name) for name in OPERATORS if name in code)
    return Execution(status="ok", workflow=code, pass_rate=pass_rate, complexity=complexity, calls=calls)


def answered(operator: str, **account: Any) -> WorkerCall:
    whole = {
        "worker": "w",
        "requests": 1,
        "answered": 1,
        "prompt_tokens": 60,
        "completion_tokens": 40,
        "cost_usd": 0.5,
        "seconds": 2,
    }
    return WorkerCall(operator=operator, **{**whole, **account})


def test_terms_add_up() -> None:
    weights = RewardWeights(performance=2.0, complexity=0.5, efficiency=0.4, diversity=0.1, format=0.7)
    group = [
        ok(ONE, 0.5, 0.2),
        ok(TWO, 1.0, 0.6),
        Execution(status="invalid", error="no"),
        Execution(status="timeout", workflow=ONE, complexity=0.2),
        Execution(status="infrastructure", workflow=ONE),
    ]
    first, second, invalid, timeout, ours = group_rewards(group, weights)
    assert first is not None
    assert (first.terms["performance"], first.terms["efficiency"]) == (1.0, 0.0)
    assert first.terms["complexity"] == pytest.approx(0.1)
    assert first.terms["diversity"] > 0
    assert first.total == pytest.approx(1.0 - 0.1 + first.terms["diversity"])
    assert second is not None
    assert second.terms["efficiency"] == pytest.approx(0.4 * 2 / 6)
    assert second.total == pytest.approx(2.0 - 0.3 - 0.4 / 3 + second.terms["diversity"])
    assert invalid is not None
    assert (invalid.total, invalid.terms["format"], invalid.terms["complexity"]) == (-0.7, 0.7, 0.0)
    assert timeout is not None
    assert timeout.total == pytest.approx(-0.1)
    assert ours is None


def spending(*calls: WorkerCall) -> Execution:
    return Execution(status="ok", workflow=ONE, calls=calls)


@pytest.mark.parametrize("by", ["tokens", "calls", "dollars", "seconds"])
def test_spent_is_counted_in_single_calls(by: EfficiencyBy) -> None:
    one, dear = (
        answered("generate"),
        answered("custom", prompt_tokens=100, completion_tokens=100, cost_usd=1, seconds=4),
    )
    group = [
        spending(one),
        spending(one, one, answered("test", requests=0, answered=0)),
        spending(one, dear),
        spending(),
    ]
    tested = [spending(one), spending(one, WorkerCall(operator="test"))]
    assert spent_calls(group[::3], by) == [1.0, 0.0]
    assert spent_calls(tested, by) == [1.0, 1.0]
    assert spent_calls([spending(one), spending(one, dear)], by) == [1.0, 2.0 if by == "calls" else 3.0]


def test_a_request_that_nobody_waited_for_is_charged_as_one_call() -> None:
    left = answered("generate", answered=0, prompt_tokens=0, completion_tokens=0, cost_usd=0, seconds=0)
    assert spent_calls([spending(answered("generate")), spending(*[left] * 20)], "tokens") == [1.0, 20.0]
    assert spent_calls([spending(*[left] * 20)], "dollars") == [20.0]


def test_the_unit_is_a_call_of_the_dearest_worker_and_free_calls_are_counted() -> None:
    large, small = answered("generate", worker="large"), answered("generate", worker="small", cost_usd=0.125)
    assert spent_calls([spending(small, small, large), spending(small)], "dollars") == [1.5, 0.25]
    free = answered("generate", cost_usd=0.0)
    assert spent_calls([spending(free, free, answered("review", cost_usd=0.0))], "dollars") == [3.0]


def test_inefficiency_is_zero_for_one_call_and_below_one() -> None:
    values = [inefficiency(spent) for spent in (0.0, 0.5, 1.0, 2.0, 5.0, 1e9)]
    assert values[:3] == [0.0, 0.0, 0.0]
    assert values[3:5] == [0.2, 0.5]
    assert values == sorted(values)
    assert values[-1] <= 1.0


def group_of(*runs: tuple[str, float, int]) -> list[float]:
    """Rewards of runs of (code, pass rate, calls), each call with its test where there are several."""
    executions = []
    for code, pass_rate, count in runs:
        calls = [answered("generate")] * count + [WorkerCall(operator="test")] * (count if "test" in code else 0)
        complex_ = complexity(tree(code), calls)
        executions.append(
            Execution(status="ok", workflow=code, pass_rate=pass_rate, complexity=complex_, calls=tuple(calls))
        )
    return [terms.total for terms in group_rewards(executions, RewardWeights()) if terms]


def test_what_a_query_needs_earns_most() -> None:
    """A draft that is right a half of the time deserves the loop, one that is right at once a single call."""
    until = WORKFLOWS["until passed"]
    single, loop = group_of((ONE, 0.534, 1), (until, 0.724, 3))
    assert loop > single + 0.05
    easy, needless = group_of((ONE, 1.0, 1), (until, 1.0, 1))
    assert easy > needless


def test_failing_in_a_new_way_earns_nothing() -> None:
    failed = Execution(status="failed", workflow=TWO, complexity=0.6)
    rewards = group_rewards([ok(ONE, 1.0, 0.2), failed], RewardWeights())
    assert [terms and terms.terms["diversity"] for terms in rewards] == [0.0, 0.0]


def test_costs_grow_to_their_weights_and_nothing_else_changes() -> None:
    weights = RewardWeights(complexity=0.2, efficiency=0.3, warmup_steps=4)
    costs = [(w.complexity, w.efficiency) for w in (warmed_up(weights, step) for step in (0, 1, 4, 9))]
    assert costs == [(0.0, 0.0), (0.05, pytest.approx(0.075)), (0.2, 0.3), (0.2, 0.3)]
    assert warmed_up(weights, 9) == weights
    plain = RewardWeights()
    assert warmed_up(plain, 0) == plain
