"""How a judged job ends does not depend on which of its two processes is quicker."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, CheckTests, Limits, StdioTests, UnittestTests

pytestmark = [pytest.mark.jail, pytest.mark.usefixtures("steady")]
TIMES = 100
FINE = "def f(x): return x + 1"
ASSERTS = AssertTests(("assert f(1) == 2",))

EARLY = {
    "the setup does not import": CheckTests("def check(c):\n    assert c(1) == 2", "f", "import no_such_module"),
    "the tests do not import": CheckTests("import no_such_module\ndef check(c):\n    assert c(1) == 2", "f"),
    "a line's setup does not import": AssertTests(("assert f(1) == 2",), "import no_such_module"),
    "nothing is asserted": CheckTests("def check(c): pass", "f"),
    "no check is defined": CheckTests("x = 1\nif 0: assert 1", "f"),
    "the judge exits": CheckTests("def check(c):\n    import os; os._exit(3)\n    assert c(1) == 2", "f"),
}
IMPORTS = {
    "import no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
    "1 / 0": "ZeroDivisionError: division by zero",
    "def f(:": "SyntaxError: invalid syntax",
    "import os\nprint('x' * 9999)\nraise SystemExit(3)": "SystemExit: 3",
}


def ends(pool, code, tests, **options):
    outcomes = pool.run_all([{"code": code, "tests": tests, **options}] * TIMES)
    return {(outcome.status, (outcome.error.strip().splitlines() or [""])[-1]) for outcome in outcomes}


@pytest.mark.parametrize("tests", EARLY.values(), ids=EARLY)
def test_a_judge_that_ends_early_fails_the_job(pool, tests):
    assert {status for status, _ in ends(pool, FINE, tests, stdin="x" * 1000)} == {"failed"}


@pytest.mark.parametrize(("code", "said"), IMPORTS.items())
def test_a_solution_that_fails_at_import_says_why(pool, code, said):
    assert ends(pool, code, ASSERTS) == {("failed", said)}


@pytest.mark.parametrize("tests", [None, ASSERTS])
def test_the_error_of_code_that_does_not_compile_shows_the_code_alone(pool, tests):
    """Policies read it: no frame of ours stands in it."""
    error = pool.run("x = 1\nprint(", tests=tests).error
    lines = [line.strip() for line in error.strip().splitlines()]
    assert lines == ['File "solution.py", line 2', "print(", "^", "SyntaxError: '(' was never closed"]


def test_what_a_solution_printed_before_it_failed_is_there(pool):
    outcomes = pool.run_all([{"code": "print('said')\n1 / 0", "tests": ASSERTS}] * TIMES)
    assert {outcome.stdout for outcome in outcomes} == {"said\n"}


def test_an_argument_of_the_tests_may_be_long(pool):
    lines = ("[1]) == 1", "'a' * (17 << 20)) == 17 << 20", "[1, 2]) == 2")
    source = "def check(c):\n" + "".join(f"    assert c({line}\n" for line in lines)
    outcome = pool.run("def f(v): return len(v)", tests=CheckTests(source, "f"))
    assert outcome.tests == (True, True, True)


def test_one_answer_too_long_costs_its_own_assertion_alone(pool):
    source = "def check(c):\n" + "".join(f"    assert len(c({size})) == {size}\n" for size in (1, 17 << 20, 2))
    outcome = pool.run("def f(n): return 'a' * n", tests=CheckTests(source, "f"))
    assert outcome.tests == (True, False, True)


# A result frame as the guest makes it, (error, kind, value, tests), with a count of tests that is not the host's.
SAYS_A_COUNT = """
import os
def frame(error, kind):
    text = lambda value: b"\\xdb" + len(value).to_bytes(4, "big") + value
    body = b"\\x94" + text(error) + text(kind) + b"\\xc0" + b"\\xdd\\0\\0\\0\\0"
    os.write(3, len(body).to_bytes(4, "little") + b"R" + body)
def f(x):
    frame(b"1 of 1 tests failed", KIND)
    os._exit(0)
"""
UNIT = UnittestTests("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)")
SPEAKERS = [
    ("nothing failed", FINE, ASSERTS, ""),
    ("a count", "def f(x): return x", ASSERTS, "host"),
    ("a count of cases", "print(1)", StdioTests((("", "2"),)), "host"),
    ("a limit", "while True: pass", ASSERTS, "host"),
    ("an import", "raise ValueError('1 of 1 tests failed')", ASSERTS, "jail"),
    ("a forged count", SAYS_A_COUNT.replace("KIND", "b'x'"), ASSERTS, "jail"),
    ("an exit status", "import os; os._exit(7)", None, "jail"),
    ("a signal", "import ctypes; ctypes.string_at(0)", None, "jail"),
    ("a case's traceback", "raise ValueError(input())", StdioTests((("1", "2"),)), "jail"),
    ("a unittest", "def f(x): return x", UNIT, "jail"),
    ("the checker", "print(1)", StdioTests((("", "2"),), checker="def checker(i, o, e): raise ValueError(e)"), "jail"),
    ("the judge", "def f(x): raise ValueError(x)", AssertTests(("assert f(1) == 1",), "f('hidden')"), "jail"),
]


@pytest.mark.parametrize(("code", "tests", "by"), [row[1:] for row in SPEAKERS], ids=[row[0] for row in SPEAKERS])
def test_an_error_has_a_speaker_whatever_it_says(pool, code, tests, by):
    outcome = pool.run(code, tests=tests, limits=Limits(wall_s=10, cpu_s=1))
    assert (outcome.error_by, bool(outcome.error)) == (by, bool(by)), outcome
