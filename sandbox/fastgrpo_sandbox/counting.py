"""How many tests there are, before any ran: the denominator that no job can change."""

from __future__ import annotations

from fastgrpo_sandbox.guest.asserts import compile_asserts
from fastgrpo_sandbox.types import AssertTests, CheckTests, Tests, UnittestTests
from fastgrpo_sandbox.unittest_source import unittest_names


def count_tests(tests: Tests) -> int:
    """Assertions, unittest methods or cases in `tests`, counted from the text alone. Raises SyntaxError for tests that
    do not parse and IndexError for a `select` beyond the last assertion."""
    match tests:
        case CheckTests():
            return _count_selected(tests)
        case AssertTests():
            return len(tests.asserts)
        case UnittestTests():
            return len(unittest_names(tests.source))
    return len(tests.cases)


def _count_selected(tests: CheckTests) -> int:
    _, total, _ = compile_asserts(tests.source)
    if tests.select is None:
        return total
    if any(not 0 <= index < total for index in tests.select):
        raise IndexError(f"select names assertion {max(tests.select)}, but there are {total} (counted from 0)")
    return len(tests.select)
