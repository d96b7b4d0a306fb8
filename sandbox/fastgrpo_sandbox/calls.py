"""Contests' tests that call a function with JSON: APPS', TACO's and LiveCodeBench's, as their graders read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from fastgrpo_sandbox.extract import defined_names
from fastgrpo_sandbox.types import AssertTests, CheckTests, Tests, UnittestTests

_ASSERT_SAME = "assert same("
_WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)
# What a function may use without importing it, and how deep it may call itself, as where these problems come from.
IMPORTED = """
from typing import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from bisect import bisect, bisect_left, bisect_right, insort, insort_left, insort_right
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, perm, prod, sqrt
import collections, functools, heapq, itertools, math, random, re, string, sys
sys.setrecursionlimit(50_000)
"""
# As contest graders compare: tuples are lists, floats are equal within 1e-6.
_SAME = """
import math

def same(got, *answers):
    return any(close(got, answer) for answer in answers)

def close(got, wanted):
    if isinstance(got, (list, tuple)) and isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(close, got, wanted))
    if isinstance(wanted, float) and isinstance(got, (int, float)):
        return math.isclose(got, wanted, rel_tol=1e-6, abs_tol=1e-6)
    return got == wanted
"""


def call_tests(target: str, cases: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> AssertTests:
    """One assertion on a call of `target` for each (arguments, accepted results), plain data."""
    asserts = (
        f"{_ASSERT_SAME}{target}({', '.join(map(repr, given))}), {', '.join(map(repr, wanted))})"
        for given, wanted in cases
    )
    return AssertTests(asserts=tuple(asserts), setup=_SAME)


def with_imports(code: str, tests: Tests) -> str:
    """The solution after what it may use without importing it: where the `tests` are `call_tests`, or of a `class
    Solution` as LeetCode's, which is no program of its own."""
    if isinstance(tests, AssertTests) and tests.setup == _SAME:
        return f"{imports_for(''.join(tests.asserts[:1]).removeprefix(_ASSERT_SAME))}{code}"
    method = "Solution" in _text(tests) and "Solution" in defined_names(code)
    return f"{IMPORTED}{code}" if method else code


def imports_for(target: str) -> str:
    """IMPORTED, but for what tests call, as `gcd`: that is the solution's to define."""
    return f"{IMPORTED}globals().pop({target.partition('(')[0]!r}, None)\n"


def _text(tests: Tests) -> str:
    match tests:
        case AssertTests(asserts=asserts, setup=setup):
            return "\n".join((setup, *asserts))
        case CheckTests(source=source, entry_point=entry_point, setup=setup):
            return "\n".join((setup, source, entry_point))
        case UnittestTests(source=source, setup=setup):
            return "\n".join((setup, source))
    return ""


def arguments_and_results(given: Any, wanted: Any) -> tuple[list[Any], list[Any]]:
    """Arguments and accepted results of a pair: values, or as text one JSON value a line and JSON.

    APPS wraps some results in a list of one. Raises ValueError for text that is no JSON.
    """
    arguments = json_lines(given) if isinstance(given, str) else given if isinstance(given, list) else [given]
    wanted = json_value(wanted) if isinstance(given, str) and isinstance(wanted, str) else wanted
    accepted = [wanted, *(wanted if isinstance(wanted, list) and len(wanted) == 1 else [])]
    return [_with_numbers(value) for value in arguments], [_with_numbers(value) for value in accepted]


def _with_numbers(value: Any) -> Any:
    """JSON has no keys but texts: where all are whole numbers, they were numbers, as APPS' own grader reads them."""
    if isinstance(value, dict) and all(isinstance(key, str) and _WHOLE.fullmatch(key) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def json_lines(text: str) -> list[Any]:
    """LiveCodeBench's arguments. Raises ValueError."""
    return [json_value(line) for line in text.splitlines() if line.strip()]


def json_value(text: str) -> Any:
    """One JSON value. Raises ValueError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"has a test whose value {text[:40]!r} is not JSON: {error}") from None
