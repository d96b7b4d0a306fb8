"""Distinctness within a group, and the reward's terms."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.structures import WORKFLOWS
from fastgrpo.config import RewardWeights
from fastgrpo.flow.diversity import distinctness
from fastgrpo.flow.reward import group_rewards
from fastgrpo.flow.types import Execution

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


def test_another_operator_or_attribute_makes_a_difference() -> None:
    left = "async def workflow(p):\n    r = await review(p, '')\n    return r.feedback"
    assert min(distinctness([tree(left), tree(left.replace("review", "revise"))])) > 0
    assert min(distinctness([tree(left), tree(left.replace("feedback", "ok"))])) > 0


def test_alone_or_absent_is_not_distinct() -> None:
    assert distinctness([tree(ONE)]) == [0.0]
    assert distinctness([None, tree(ONE), None]) == [0.0, 0.0, 0.0]
    assert distinctness([]) == []


def test_a_number_too_long_to_write_out_is_a_constant_like_any_other() -> None:
    """Python refuses to write more than 4300 digits, but reads 4000 hexadecimal ones: 8000 characters of code may."""
    long = f"async def workflow(p):\n    n = 0x{'f' * 4000}\n    return ''"
    rewards = group_rewards([ok(long, 0.0, 0.1), ok(long[:-20] + "1\n    return ''", 0.0, 0.1)], RewardWeights())
    assert all(terms is not None and terms.terms["diversity"] > 0 for terms in rewards)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([None, *WORKFLOWS.values()]), max_size=8), st.randoms())
def test_distinctness_is_bounded_and_blind_to_order(codes: list[str | None], random: object) -> None:
    trees = [None if code is None else tree(code) for code in codes]
    values = distinctness(trees)
    assert all(0 <= value <= 1 for value in values)
    assert all(value == 0 for value, code in zip(values, codes, strict=True) if code and codes.count(code) > 1)
    assert distinctness(trees[::-1]) == pytest.approx(values[::-1])


def ok(code: str, pass_rate: float, complexity: float) -> Execution:
    return Execution(status="ok", workflow=code, pass_rate=pass_rate, complexity=complexity)


def test_terms_add_up() -> None:
    weights = RewardWeights(performance=2.0, complexity=0.5, diversity=0.1, format=0.7)
    group = [
        ok(ONE, 0.5, 0.2),
        ok(TWO, 1.0, 0.6),
        Execution(status="invalid", error="no"),
        Execution(status="timeout", workflow=ONE, complexity=0.2),
        Execution(status="infrastructure", workflow=ONE),
    ]
    first, second, invalid, timeout, ours = group_rewards(group, weights)
    assert first is not None
    assert first.terms["performance"] == 1.0
    assert first.terms["complexity"] == pytest.approx(0.1)
    assert first.terms["diversity"] > 0
    assert first.total == pytest.approx(1.0 - 0.1 + first.terms["diversity"])
    assert second is not None
    assert second.total == pytest.approx(2.0 - 0.3 + second.terms["diversity"])
    assert invalid is not None
    assert (invalid.total, invalid.terms["format"], invalid.terms["complexity"]) == (-0.7, 0.7, 0.0)
    assert timeout is not None
    assert timeout.total == pytest.approx(-0.1)
    assert ours is None


def test_failing_in_a_new_way_earns_nothing() -> None:
    failed = Execution(status="failed", workflow=TWO, complexity=0.6)
    rewards = group_rewards([ok(ONE, 1.0, 0.2), failed], RewardWeights())
    assert [terms and terms.terms["diversity"] for terms in rewards] == [0.0, 0.0]
