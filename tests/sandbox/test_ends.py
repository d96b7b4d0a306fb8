"""How a judged job ends does not depend on which of its two processes is quicker."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, CheckTests

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
