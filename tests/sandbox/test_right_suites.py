# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Right solutions under unittest suites and on standard input, as people write both."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, BlockingSandboxPool, StdioTests, UnittestTests
from fastgrpo_sandbox.guest import zygote

pytestmark = pytest.mark.jail

CLOCK = "import json, math, random, time\ndef stamp(): return json.dumps({'at': time.time()})\ndef roll(): return random.randint(1, 6)\n"
SUITE = """
import json, math, random, time, unittest
from unittest.mock import patch
class T(unittest.TestCase):
    @classmethod
    def setUpClass(cls): cls.patcher = patch('time.time', return_value=5.0); cls.patcher.start()
    def test_patched(self): self.assertEqual(json.loads(stamp()), {'at': 5.0})
    @patch('random.randint', side_effect=[2, 3])
    def test_effects(self, randint):
        for wanted in (2, 3):
            with self.subTest(wanted=wanted): self.assertEqual(roll(), wanted)
        self.assertEqual(randint.call_count, 2)
"""
STARTED = "\nif __name__ == '__main__':\n    unittest.main()\n"


@pytest.mark.parametrize("end", ["", STARTED, "\nunittest.main(verbosity=2)\n", STARTED.replace("'", '"')])
def test_a_suite_with_mocks_passes_however_it_would_be_started(pool, end):
    outcome = pool.run(CLOCK, tests=UnittestTests(SUITE + end))
    assert (outcome.status, outcome.tests) == ("ok", (True, True)), outcome


@pytest.mark.parametrize("name", ["__main__", "solution"])
def test_tests_may_import_the_solution_by_a_name(pool, name):
    lines = (f"from {name} import LIMIT; self.assertEqual(f(1), LIMIT)", "with patch.object(m, 'LIMIT', 5): self.assertEqual(m.f(1), 5)")  # fmt: skip
    methods = "".join(f"    def test_{i}(self):\n        {line}\n" for i, line in enumerate(lines))
    source = f"import unittest, {name} as m\nfrom unittest.mock import patch\nclass T(unittest.TestCase):\n{methods}"
    outcome = pool.run("LIMIT = 3\ndef f(x): return x * LIMIT", tests=UnittestTests(source))
    assert outcome.tests == (True, True), outcome.error


@pytest.mark.parametrize("form", ["unittest", "assert"])
@pytest.mark.parametrize(
    "program",
    [
        "print(f(1))",
        "int(input('n? '))",
        "sys.exit(f(-1))",
        "unittest.main()",
        "argparse.ArgumentParser().parse_args(['x'])",
    ],
)
def test_what_a_solution_does_as_a_program_is_not_asked(pool, program, form):
    code = f"import argparse, sys, unittest\ndef f(x): return x + 1\nif __name__ == '__main__':\n    {program}\n"
    suite = "import unittest\nfrom unittest.mock import patch\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), 2)\n    @patch('__main__.f', return_value=9)\n    def test_b(self, p): self.assertEqual((f(1), __name__), (9, '__main__'))\n"
    tests = UnittestTests(suite) if form == "unittest" else AssertTests(("assert f(1) == 2",))
    assert pool.run(code, tests=tests).pass_rate == 1.0


@pytest.mark.parametrize(
    "change",
    [
        "json.dumps = lambda *a, **k: '2'",
        "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *a: True)",
        "def f(x):\n    math.isclose = lambda *a, **k: True\n    return 77",
        "def lie(*a, **k): return True\nmath.isclose.__class__\nrandom.choice = lie",
    ],
)
def test_a_solution_that_changes_what_the_tests_import_fails(pool, change):
    tests = UnittestTests(
        "import json, math, random, unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(json.dumps(f(1)), '2')\n    def test_b(self): self.assertTrue(math.isclose(f(1), 2))\n"
    )
    outcome = pool.run(f"import json, math, random\ndef f(x): return 77\n{change}\n", tests=tests)
    assert (outcome.status, outcome.tests) == ("failed", (False, False))


@pytest.mark.parametrize(
    "change",
    [
        "os.path.exists = lambda path: True",  # of a module in a module
        "fractions.Fraction.__eq__ = lambda *a: True",
        "class Same:\n    def __get__(self, value, kind=None): return lambda *a: True\nfractions.Fraction.__eq__ = Same()",
        "from unittest.mock import MagicMock\ndef f(x):\n    os.path.exists = MagicMock()\n    return 77",  # no mock of the tests
    ],
)
def test_a_solution_that_changes_what_is_in_what_the_tests_import_fails(pool, change):
    suite = "import fractions, os, unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertTrue(f(1) and os.path.exists('nothing'))\n    def test_b(self): self.assertEqual(fractions.Fraction(f(1)), 2)\n"
    code = f"import fractions, os\ndef f(x): return 77\n{change}\n"
    outcome = pool.run(code, tests=UnittestTests(suite))
    assert (outcome.status, outcome.tests) == ("failed", (False, False))
    assert "changed unittest, the builtins or a module of the tests" in outcome.error


@pytest.mark.parametrize(
    "change", ["math.pi = 0.0", "import string\nstring.digits = ''", "def f(x):\n    math.tau = 0.0\n    return 0.0"]
)
def test_a_solution_that_changes_a_constant_of_what_the_tests_import_fails(pool, change):
    suite = "import math, string, time, tempfile, unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertAlmostEqual(f(1), math.pi * len(string.digits) * math.tau)\n"
    assert pool.run(f"import math\ndef f(x): return 0.0\n{change}\n", tests=UnittestTests(suite)).tests == (False,)
    used = "import math, os, string, tempfile, time\ndef f(x):\n    os.environ['TZ'] = 'UTC-3'\n    time.tzset()\n    tempfile.mkstemp()\n    string.letters = 'ab'\n    return math.pi * 10 * math.tau\n"
    assert pool.run(used, tests=UnittestTests(suite)).tests == (True,)


BUILTINS = """
import unittest
class T(unittest.TestCase):
    def test_a(self): self.assertEqual(len(f(3)), 3)
    def test_b(self): self.assertEqual(sorted(f(2)), sorted([1, 2]))
    def test_c(self): self.assertIsInstance(f(1), list)
    def test_d(self): self.assertTrue(all(map(isinstance, f(2), [int, int])) and abs(sum(f(3)) - 6) < 1e-6)
    def test_e(self):
        max = 3
        self.assertEqual([str(x) for x in f(max)], ["1", "2", "3"])
"""


def test_tests_mean_the_builtins_by_their_names(pool):
    code = "class Any(type):\n    def __instancecheck__(self, value): return True\nclass list(metaclass=Any): pass\ndef len(x): return 3\nsorted = lambda x: 0\nall = lambda x: True\nabs = lambda x: 0\nsum = str = len\ndef f(n): return 'no'\n"
    assert pool.run(code, tests=UnittestTests(BUILTINS)).tests == (False,) * 5
    own = "def len(x): return 'mine'\ndef sum(n): return list(range(1, n + 1)) if len(n) == 'mine' else []\ndef f(n): return sum(n)\n"
    assert pool.run(own, tests=UnittestTests(BUILTINS)).tests == (True,) * 5


@pytest.mark.parametrize(
    ("code", "asked"),
    [
        ("def sum(a, b): return a + b", "self.assertEqual(sum(1, 2), 3)"),
        (
            "class ConnectionError(Exception): pass\ndef f(): raise ConnectionError",
            "with self.assertRaises(ConnectionError): f()",
        ),
        (
            "class Base:\n    def g(self): return 1\ndef f(): return Base",
            "self.assertEqual(super().id(), self.id()); self.assertEqual(f()().g(), 1)",
        ),
        (
            "def f(): return [vars, 3]",
            "x = 3; self.assertEqual((locals()['x'], 'f' in globals(), type(f()) is list), (3, True, True))",
        ),
    ],
)
def test_what_a_solution_has_of_a_builtins_name_is_asked_where_it_is_meant(pool, code, asked):
    suite = f"import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        {asked}\n"
    assert pool.run(code, tests=UnittestTests(suite)).tests == (True,)


def test_an_object_is_not_found_equal_by_not_being_unequal(pool):
    suite = "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertFalse(f(1) != 2)\n    def test_b(self): self.assertFalse(f(1) not in [2, 3])\n    def test_c(self): self.assertTrue(f(2) != 2 and f(2) not in [2] and not (f(1) != f(1)))\n"
    liar = "class Y:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\ndef f(x): return Y()"
    assert pool.run(liar, tests=UnittestTests(suite)).tests[:2] == (False, False)
    assert pool.run("def f(x): return x + 1", tests=UnittestTests(suite)).tests == (True, True, True)


def test_a_solution_that_changes_numpys_own_tests_fails():
    pytest.importorskip("numpy")
    suite = "import numpy as np, unittest\nclass T(unittest.TestCase):\n    def test_a(self): np.testing.assert_allclose(f(1), [1.0, 2.0])\n    def test_b(self): self.assertTrue(np.allclose(f(1), [1.0, 2.0]) and (f(1) == np.array([1, 2])).all() and (f(1) < 3).all())\n"
    with BlockingSandboxPool(cells=1, preload=("numpy",)) as pool:
        right = pool.run("import numpy as np\ndef f(x): return np.array([x, 2.0])", tests=UnittestTests(suite))
        assert right.tests == (True, True), right
        for change in ("np.testing.assert_allclose = lambda *a: None", "np.allclose = lambda *a: True"):
            wrong = f"import numpy as np\n{change}\ndef f(x): return None"
            assert pool.run(wrong, tests=UnittestTests(suite)).tests == (False, False)


def test_a_comparison_may_give_what_has_no_truth(pool):
    """As an array's or a table's does; only what stands before the last of a chain is asked for it, as by Python."""
    suite = "import unittest\nclass Row(list):\n    def __eq__(self, other): return Row(a == other for a in self)\n    def __lt__(self, other): return Row(a < other for a in self)\n    def __bool__(self): raise ValueError('ambiguous')\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertTrue(all(Row(f(1)) == 1))\n        self.assertFalse(any(Row(f(1)) < 1))\n        self.assertEqual(sum(0 == Row(f(1))), 0)\n        with self.assertRaises(ValueError): 3 > Row(f(1)) > 0\n"
    assert pool.run("def f(x): return [1, 1]", tests=UnittestTests(suite)).tests == (True,)
    assert pool.run("def f(x): return [1, 2]", tests=UnittestTests(suite)).tests == (False,)


def test_a_stream_that_the_tests_left_closed_costs_no_verdict(pool):
    suite = "import io, sys, unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        sys.stdout = io.StringIO()\n        f()\n        self.assertEqual(sys.stdout.getvalue(), '1\\n')\n        sys.stdout.close()\n"
    assert pool.run("def f(): print(1)", tests=UnittestTests(suite)).tests == (True,)
    assert pool.run("def f(): print(2)", tests=UnittestTests(suite)).tests == (False,)


def test_a_byte_order_mark_begins_a_program_as_it_begins_a_file(pool):
    assert pool.run("\ufeffprint(1)").stdout == "1\n"
    assert pool.run("\ufeffdef f(): return 1", tests=AssertTests(("assert f() == 1",))).pass_rate == 1.0


def test_a_pool_of_the_default_size_fits_the_limits_on_any_host(pool, monkeypatch):
    monkeypatch.setattr(zygote, "count_all", lambda: 128)
    assert zygote.cpu_count() == 4
    code = "import os, multiprocessing\nfrom concurrent.futures import ThreadPoolExecutor\nwith multiprocessing.Pool() as p, ThreadPoolExecutor() as t:\n    print(os.cpu_count() <= 4, os.cpu_count.__module__, p.map(abs, [-1] * 50) == list(t.map(abs, [1] * 50)))"
    assert pool.run(code).stdout == "True __main__ True\n"


def test_standard_input_has_its_name(pool):
    tests = StdioTests((("1 2\n", "3"), ("é 4\n", "é4")))
    code = "words = open('/dev/stdin').read().split()\nprint(sum(map(int, words)) if words[0].isdigit() else ''.join(words))"
    assert pool.run(code, tests=tests).tests == (True, True)


def test_a_test_of_no_use_to_the_solution_s_own_class(pool):
    """What a class of the tests asks of its base by super() is the base's word, and equals no plain data by its word."""

    liar = "class Y:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    def __hash__(self): return 1\n    def area(self): return Y()\n"
    lines = (
        "class T(Y):\n    pass\nassert T() == 5",
        "class T(Y):\n    def m(self): return super().area()\nassert T().m() == 9",
        "class T(Y):\n    def __eq__(self, o): return super().__eq__(o)\nassert T() == 5",
        "class T(Y):\n    pass\nassert T().area() in (9, 10)",
    )
    assert not any(pool.run(liar, tests=AssertTests(lines)).tests)


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nprint(3)\nsys.stdout.close()",
        "import sys\nprint(3)\nsys.stderr.close()",
        "import sys\nprint(3, flush=True)\nsys.stdout = None",
        "with open(1, 'w') as out: out.write('3')",
        "import atexit, sys\nprint(3)\natexit.register(sys.stdout.close)",
    ],
)
def test_a_script_may_close_its_streams(pool, code):
    outcome = pool.run(code, tests=StdioTests((("", "3"),)))
    assert (outcome.status, outcome.tests) == ("ok", (True,)), outcome
