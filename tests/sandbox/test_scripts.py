# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Tests that are a script, and pytest's functions, which only define what is to run: a wrong solution passes none."""

from __future__ import annotations

import math
import time

import pytest

from fastgrpo_sandbox import AssertTests, CheckTests, UnittestTests, pytest_stand_in
from fastgrpo_sandbox.columns import read_tests
from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.printing import refuse_prints
from fastgrpo_sandbox.scripts import as_run
from fastgrpo_sandbox.types import NoTestError

RIGHT = "def f(x): return x + 1\n"
WRONG = ("def f(x): return 0\n", "def f(x): raise ValueError\n", "x = 1\n")
STARTED = "\nif __name__ == '__main__':\n    "
ONE = "def test_a():\n    assert f(1) == 2\n"
SCRIPTS = {
    "functions that pytest finds": (ONE + "def test_b():\n    assert f(2) == 3\n", 2),
    "functions that a program calls": (f"{ONE}{STARTED}test_a()\n    print('fine')", 1),
    "a function that a program calls": (f"{ONE.replace('test_a', 'main')}{STARTED}main()", 1),
    "functions that pytest is started for": (f"import pytest\n{ONE}{STARTED}pytest.main([__file__])", 1),
    "functions that end with pytest's status": (f"import pytest, sys\n{ONE}sys.exit(pytest.main())", 1),
    "unittest's main by its own name": (
        "from unittest import TestCase, main\nclass T(TestCase):\n    def test_a(self): self.assertEqual(f(1), 2)\nmain()",
        1,
    ),
    "unittest's main by another": (
        "import sys\nimport unittest as ut\nclass T(ut.TestCase):\n    def test_a(self): self.assertEqual(f(1), 2)\nsys.exit(ut.main())",
        1,
    ),
    "pytest's main by another": (f"import sys\nfrom pytest import main as start\n{ONE}sys.exit(start())", 1),
    "an exit by a status": ("import sys\nok = f(1) == 2\nsys.exit(0 if ok else 1)", 1),
    "an exit by what a function returns": (
        f"import sys\ndef main():\n    if f(1) != 2: return 1\n    return 0{STARTED}sys.exit(main())",
        1,
    ),
    "an exit in each branch": (
        "import sys\nif f(1) == 2:\n    print('fine')\n    sys.exit(0)\nelse:\n    print('no')\n    sys.exit(1)",
        1,
    ),
    "an exit raised": ("wrong = [x for x in (1, 2) if f(x) != x + 1]\nraise SystemExit(len(wrong))", 1),
    "an exit behind assertions": ("assert f(1) == 2\nassert f(2) == 3\nquit()", 2),
    "a coroutine": (f"async {ONE}", 1),
    "methods": (
        "class TestF:\n    def test_a(self):\n        assert f(1) == 2\n    def test_b(self): self.test_a()\n",
        2,
    ),
    "methods after a set-up": (
        "class TestF:\n    def setup_method(self): self.x = 1\n    def test_a(self):\n        assert f(self.x) == 2\n",
        1,
    ),
    "functions called by what they are named": (
        f"{ONE}for name, each in list(globals().items()):\n    if name.startswith('test'): each()\n",
        1,
    ),
    "functions in a list": (f"{ONE}for each in [test_a]: each()\n", 1),
    "an assertion and a function": (f"assert f(1) == 2\n{ONE}", 2),
    "rows of parameters": (
        "import pytest\n@pytest.mark.parametrize('x, y', [(1, 2), (2, 3)])\ndef test_a(x, y):\n    assert f(x) == y\n",
        2,
    ),
    "a parameter": (
        "import pytest\nclass TestF:\n    @pytest.mark.parametrize(['x'], [(1,)])\n    def test_a(self, x):\n"
        "        assert f(x) == x + 1\n    @pytest.mark.parametrize('x', (3, 4))\n    def test_b(self, x, by=1):\n"
        "        assert f(x) == x + by\n",
        3,
    ),
    "rows of parameters with names": (
        "import pytest\n@pytest.mark.parametrize('x, y', [pytest.param(1, 2, id='a'), (2, 3)], ids=None)\n"
        "def test_a(x, y):\n    assert f(x) == y\n",
        2,
    ),
    "rows of rows": (
        "import pytest\n@pytest.mark.parametrize('x', [1, 2])\n@pytest.mark.parametrize('y', (3, 4, 5))\n"
        "def test_a(x, y):\n    assert f(x + y) == x + y + 1\n",
        6,
    ),
    "rows that have a name": (
        "import pytest\nROWS = [(1, 2), (2, 3)]\n@pytest.mark.parametrize('x, y', ROWS)\ndef test_a(x, y):\n    assert f(x) == y\n",
        2,
    ),
    "methods after a set-up of their class": (
        "class TestF:\n    @classmethod\n    def setup_class(cls): cls.x = 1\n    def setup_method(self, method): self.y = self.x + 1\n"
        "    def test_a(self):\n        assert f(self.x) == self.y\n",
        1,
    ),
    "functions after a set-up": (
        "def setup_module(module):\n    global X\n    X = 0\ndef setup_function():\n    global X\n    X += 1\n"
        "def test_a():\n    assert f(X) == 2\nclass TestF:\n    def test_b(self):\n        assert f(X) == 2\n",
        2,
    ),
    "unittest with pytest": (
        "import pytest, unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n"
        "        with pytest.raises(TypeError): f(None)\n        self.assertEqual(f(1), 2)\n",
        1,
    ),
    "unittest's class by another name": (
        "from unittest import TestCase as Base\nclass T(Base):\n    def test_a(self): self.assertEqual(f(1), 2)\n",
        1,
    ),
    "unittest's class by a name of the tests": (
        "import unittest\nBase = unittest.TestCase\nclass T(Base):\n    def test_a(self): self.assertEqual(f(1), 2)\n",
        1,
    ),
    "tests of a class that is mixed in": (
        "import unittest\nclass First:\n    def test_a(self): self.assertEqual(f(1), 2)\nclass Mixed(First):\n"
        "    def test_b(self): self.assertEqual(f(2), 3)\n    def test_a(self): self.assertEqual(f(3), 4)\n"
        "class T(Mixed, unittest.TestCase): pass\nclass U(First, unittest.TestCase):\n    def test_c(self): self.assertEqual(f(4), 5)\n",
        4,
    ),
    "a class that is one test": (
        "import unittest\nclass T(unittest.TestCase):\n    def runTest(self): self.assertEqual(f(1), 2)\n",
        1,
    ),
    "a function that catches its own failures": (
        "def test():\n    try:\n        assert f(1) == 2\n        print('passed')\n    except AssertionError:\n        print('failed')\ntest()\n",
        1,
    ),
    "a function that counts its failures": (
        "def run(rows):\n    failed = 0\n    wrong = []\n    for x, y in rows:\n        try:\n            assert f(x) == y\n"
        "        except AssertionError:\n            failed += 1\n            wrong.append(x)\n    assert failed <= 1 and len(wrong) < 2\n"
        "def test_a(): run([(1, 2), (2, 9), (3, 4)])\n",
        1,
    ),
    "a function that tries again": (
        "def test_a():\n    for x in range(3):\n        try:\n            assert f(x) == 3\n            break\n"
        "        except AssertionError:\n            if x == 2: raise\n"
        "def test_b():\n    for x in range(3):\n        try:\n            assert f(x) == 3\n            break\n"
        "        except AssertionError: pass\n    else: raise AssertionError('never')\n",
        2,
    ),
    "assertions that must fail": (
        "import pytest\ndef test_a():\n    try:\n        assert f(1) == 0\n    except AssertionError: return\n    assert False\n"
        "def test_b():\n    assert f(1) == 2\n    with pytest.raises(AssertionError):\n        assert f(1) == 3\n",
        2,
    ),
    "functions that a decorator runs": (
        "ALL = []\ndef test(function):\n    ALL.append(function)\n    return function\n"
        "@test\ndef first():\n    assert f(1) == 2\nfor each in ALL: each()\n",
        1,
    ),
    "functions that a decorator runs, without an assertion": (
        "ALL = []\ndef test(function):\n    ALL.append(function)\n    return function\n"
        "@test\ndef first():\n    if f(1) != 2: raise ValueError\nfor each in ALL: each()\n",
        1,
    ),
    "a program that has the solution as the main module": (
        "import sys\nif sys.modules['__main__'].f(1) != 2: raise ValueError\n",
        1,
    ),
    "rows of pytest's in a list": (
        "import pytest\nROWS = [pytest.param(1, 2, id='a'), pytest.param(2, 3, marks=pytest.mark.slow)]\n"
        "@pytest.mark.parametrize('x, y', ROWS)\ndef test_a(x, y):\n    assert f(x) == y\n",
        2,
    ),
    "a method with a generator or coroutine in it": (
        "import asyncio, unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        def made(): yield f(1)\n"
        "        self.assertEqual(list(made()), [2])\n    def test_b(self):\n        async def made(): return f(1)\n"
        "        self.assertEqual(asyncio.run(made()), 2)\n",
        2,
    ),
    "coroutines that a decorator runs": (
        "import asyncio, functools, unittest\ndef run(function):\n    @functools.wraps(function)\n"
        "    def ran(*given): return asyncio.run(function(*given))\n    return ran\n"
        "class T(unittest.TestCase):\n    @run\n    async def test_a(self): self.assertEqual(f(1), 2)\n",
        1,
    ),
    "what is skipped for good": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), 2)\n"
        "    def test_b(self):\n        'Not yet.'\n        self.skipTest('no')\n    def test_c(self): raise unittest.SkipTest('no')\n"
        "    @unittest.skipIf(True, 'no')\n    def test_d(self): pass\n    @unittest.skipUnless(False, 'no')\n    def test_e(self): pass\n"
        "    @unittest.skipIf(False, 'no')\n    def test_f(self): self.assertEqual(f(2), 3)\n",
        2,
    ),
    "a pair, which is always true": ("assert (f(1) == 2, 'it is not')\nassert (f(2) == 3, f'{f(2)}')\n", 2),
    "methods that await and one that never runs": (
        "import unittest\nclass T(unittest.IsolatedAsyncioTestCase):\n    async def test_a(self): self.assertEqual(f(1), 2)\n"
        "class U(unittest.TestCase):\n    async def test_b(self): self.assertEqual(f(1), 2)\n"
        "    def test_c(self): self.assertEqual([f(x) for x in (1,)], [2])\n    def test_d(self):\n        self.assertEqual(f(1), 2)\n        yield\n",
        2,
    ),
    "what fixtures make": (
        "import pytest\n@pytest.fixture\ndef x(): return 1\n@pytest.fixture(scope='module')\ndef y(x):\n"
        "    made = [x + 1]\n    yield made\n    made.clear()\n"
        "def test_a(x, y):\n    assert [f(x)] == y\n"
        "class TestF:\n    @pytest.mark.parametrize('by', [0, 1])\n    def test_b(self, y, by):\n        assert f(y[0] + by) == 3 + by\n",
        3,
    ),
    "tables that are computed": (
        "import pytest\nCASES = {1: 2, 2: 3}\n@pytest.mark.parametrize('x', range(1, 4))\ndef test_a(x): assert f(x) == x + 1\n"
        "@pytest.mark.parametrize('x, y', CASES.items())\ndef test_b(x, y): assert f(x) == y\n"
        "@pytest.mark.parametrize('x', [2 * i for i in (1, 2)])\n@pytest.mark.parametrize('more', [0, 1])\ndef test_c(x, more): assert f(x + more) == x + more + 1\n"
        "class TestF:\n    @pytest.mark.parametrize(('x', 'y'), list(zip([1], [2])), ids=str)\n    def test_d(self, x, y): assert f(x) == y\n"
        "@pytest.mark.parametrize('y', [1] * 2)\n@pytest.mark.parametrize('x', range(2))\nasync def test_e(x, y): assert f(x + y) == x + y + 1\n",
        6,
    ),
    "what a class' own fixtures make": (
        "import pytest\n@pytest.fixture\ndef one(): return 1\nclass TestF:\n    @pytest.fixture\n    def x(self, one): return one\n"
        "    @pytest.fixture\n    def test_data(self, x):\n        yield [x, x + 1]\n"
        "    def test_a(self, x): assert f(x) == 2\n    def test_b(self, test_data): assert f(test_data[0]) == test_data[1]\n",
        2,
    ),
    "fixtures for each test": (
        "import pytest\nmade = []\n@pytest.fixture(autouse=True)\ndef all_of():\n    made.append(1)\n    yield\n    made.clear()\n"
        "def test_a(): assert [f(1)] == [2] and made\n"
        "class TestF:\n    @pytest.fixture(autouse=True)\n    def prepare(self): self.x = 1\n    def test_b(self): assert f(self.x) == 2 and made\n",
        2,
    ),
    "fixtures that are used": (
        "import pytest\nmade = []\n@pytest.fixture\ndef x(): made.append(1)\n@pytest.mark.usefixtures('x')\ndef test_a(): assert f(1) == 2 and made\n"
        "@pytest.mark.usefixtures('x')\nclass TestF:\n    async def test_b(self): assert f(1) == 2 and made\n",
        2,
    ),
    "fixtures that fixtures share with the test": (
        "import pytest\n@pytest.fixture\ndef made(): return []\n@pytest.fixture\ndef filled(made): made.append(f(1))\n"
        "@pytest.fixture\ndef kept(made):\n    yield made\n"
        "def test_a(made, filled, kept): assert made == [2] and kept is made\n"
        "@pytest.mark.usefixtures('filled')\ndef test_b(made): assert made == [2]\n"
        "@pytest.mark.parametrize('x', [1, 2])\ndef test_c(x, filled, made): assert made == [2] and f(x) == x + 1\n"
        "@pytest.mark.parametrize('x', range(1, 3))\ndef test_d(x, filled, made): assert made == [2] and f(x) == x + 1\n",
        5,
    ),
    "fixtures for each test that the test shares": (
        "import pytest\n@pytest.fixture\ndef made(): return []\n@pytest.fixture(autouse=True)\ndef filled(made): made.append(f(1))\n"
        "def test_a(made): assert made == [2]\n"
        "class TestF:\n    @pytest.fixture(autouse=True)\n    def more(self, made): made.append(f(2))\n"
        "    def test_b(self, made): assert made == [2, 3]\n"
        "class TestG:\n    @pytest.fixture\n    def made(self): return [f(1)]\n    def test_c(self, made): assert made == [2]\n",
        3,
    ),
    "a computed table by its name": (
        "import pytest\nROWS = [(x, x + 1) for x in range(3)]\n@pytest.mark.parametrize('x, y', ROWS)\ndef test_a(x, y): assert f(x) == y\n",
        1,
    ),
    "rows with a mark that may leave them out": (
        "import pytest\n@pytest.mark.parametrize('x', [1, pytest.param(5, marks=pytest.mark.skip), pytest.param(6, marks=[pytest.mark.skipif(True, reason='no')])])\n"
        "def test_a(x): assert f(x) == 2\n",
        1,
    ),
    "marks that say nothing of what is run": (
        "import pytest\npytestmark = pytest.mark.unit\n@pytest.mark.slow\nclass TestF:\n    @pytest.mark.timeout(5)\n"
        "    def test_a(self):\n        assert f(1) == 2\n@pytest.mark.asyncio\nasync def test_b():\n    assert f(2) == 3\n",
        2,
    ),
    "a test that is left out": (
        f"import pytest\n{ONE}@pytest.mark.skip(reason='no')\ndef test_b():\n    assert f(1) == 3\n",
        1,
    ),
    "what is taken from pytest": (
        "from pytest import approx as near, raises\ndef test_a():\n    with raises(TypeError): f(None)\n    assert f(1) == near(2)\n",
        1,
    ),
    "all of pytest": ("from pytest import *\ndef test_a():\n    assert f(1) == approx(2)\n", 1),
    "pytest in a program": (
        "import pytest\nwith pytest.raises(TypeError): f(None)\nassert f(1) == pytest.approx(2)\n",
        1,
    ),
    "pytest beside assertions": ("import pytest\nassert f(1) == pytest.approx(2)\nassert f(2) == 3\n", 2),
    "numpy in a program": ("import numpy as np\nx = f(1)\nassert np.allclose(x, 2)\n", 1),
    "a program without an assertion": ("import pytest\nif f(1) != 2: pytest.fail('no')\n", 1),
    "a file's mark of Unicode": ("\ufeffassert f(1) == 2\n", 1),
    "what must raise": (
        "import pytest\ndef test_a():\n    with pytest.raises(TypeError): f(None)\n"
        "    assert f(1) == pytest.approx(2)\n"
        "def test_b():\n    with pytest.raises((KeyError, TypeError), match='str') as found: f('a')\n"
        "    assert 'str' in str(found.value)\ndef test_c(): pytest.raises(TypeError, f, None)\n",
        3,
    ),
    "what is imported from the solution": (f"from solution import f as g, f\n{ONE}    assert g(2) == 3\n", 1),
    "all of a module of the library's": ("from math import *\nx = f(1)\nassert isclose(x, 2)\n", 1),
    "all of a module beside functions": (
        f"from math import *\n{ONE}def test_b():\n    assert isclose(f(pi), pi + 1)\n",
        2,
    ),
    "all of a module in a branch": (
        "if True:\n    from math import *\nassert isclose(f(1), 2)\nassert floor(f(2)) == 3\n",
        1,
    ),
    "all that is imported from the solution": (f"import pytest\nfrom solution import *\n{ONE}", 1),
    "the solution as a module": ("import solution\ndef test_a():\n    assert solution.f(1) == 2\n", 1),
    "the solution as a module by another name": (
        "def test_a():\n    import solution as s\n    assert s.f(1) == 2\n",
        1,
    ),
}


@pytest.mark.jail
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_run(pool, name):
    source, count = SCRIPTS[name]
    tests = read_tests({"test": source})
    assert pool.run(RIGHT, tests=tests).tests == (True,) * count
    for wrong in WRONG:
        assert pool.run(wrong, tests=tests).tests == (False,) * count


@pytest.mark.jail
def test_a_table_of_the_solutions_that_is_empty_passes_nothing(pool):
    source = "import pytest\nfrom solution import f\n@pytest.mark.parametrize('x', range(f(1)))\ndef test_a(x): assert f(x) == x + 1\n"
    tests = read_tests({"test": source})
    assert [pool.run(code, tests=tests).tests for code in (RIGHT, "def f(x): return 0")] == [(True,), (False,)]


@pytest.mark.jail
def test_a_coroutine_that_a_decorator_does_not_run_passes_nothing(pool):
    tests = read_tests(
        {
            "test": "import unittest\ndef logged(function):\n    return lambda *given: function(*given)\n"
            "class T(unittest.TestCase):\n    @logged\n    async def test_a(self): self.assertEqual(f(1), 2)\n"
            "    @logged\n    def test_b(self):\n        self.assertEqual(f(1), 2)\n        yield\n"
            "    @logged\n    def test_c(self): self.assertEqual(f(1), 2)\n"
        }
    )
    outcome = pool.run(RIGHT, tests=tests)
    assert outcome.tests == (False, False, True)
    assert "test_a makes a coroutine that nothing runs" in outcome.error


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def verify():\n    assert f(1) == 2\n", "verify asserts, and nothing runs it"),
        ("class Checks:\n    def test_a(self):\n        assert f(1) == 2\n", "Checks asserts, and nothing runs it"),
        ("def test_a(x):\n    assert f(x) == 2\n", "test_a takes arguments, which only pytest gives it"),
        ("class TestF:\n    def test_a(self, *, x):\n        assert f(x) == 2\n", "test_a takes arguments"),
        (
            "import pytest\n@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.skip)])\ndef test_a(x):\n    assert f(x) == 2\n",
            "test_a takes arguments",
        ),
        (
            "import pytest\n@pytest.mark.parametrize('x, y', [(1,)])\ndef test_a(x, y):\n    assert f(x) == y\n",
            "test_a takes arguments",
        ),
        (
            "import pytest\n@pytest.fixture(autouse=True)\ndef x(tmp_path): f(1)\ndef test_a():\n    assert f(1) == 2\n",
            "x takes arguments, which only pytest gives it",
        ),
        (
            "import pytest\n@pytest.mark.usefixtures('tmp_path')\ndef test_a():\n    assert f(1) == 2\n",
            "test_a takes arguments, which only pytest gives it",
        ),
        (
            "import pytest\n@pytest.fixture\ndef x(tmp_path): return 1\ndef test_a(x):\n    assert f(1) == 2\n",
            "x takes arguments, which only pytest gives it",
        ),
        (
            "import pytest\n@pytest.fixture\ndef x(x): return 1\ndef test_a(x):\n    assert f(1) == 2\n",
            "x takes arguments, which only pytest gives it",
        ),
        ("def verify():\n    if f(1) != 2: raise ValueError\n", "asks the solution nothing"),
        ("def f(x): return 2\nif f(1) != 2: raise ValueError\n", "asks the solution nothing"),
        (
            "import importlib.util\nif not importlib.util.find_spec('json'): raise ValueError\n",
            "asks the solution nothing",
        ),
        ("print('fine')\n", "only print what they find"),
        (
            "import unittest\nclass T(unittest.TestCase):\n    async def test_a(self): self.assertEqual(f(1), 2)\n",
            "asks the solution nothing",
        ),
        (
            "import unittest\nif True:\n    class T(unittest.TestCase):\n        def test_a(self): self.assertEqual(1, 1)\n",
            "asks the solution nothing",
        ),
        (
            "import pytest\n@pytest.mark.skip\ndef test_a():\n    assert f(1) == 2\n",
            "test_a asserts, and nothing runs it",
        ),
    ],
)
def test_a_script_that_only_pytest_runs_whole_is_refused(source, said):
    with pytest.raises(ValueError, match=said):
        read_tests({"test": source})


@pytest.mark.jail
def test_an_object_that_equals_everything_passes_no_program_without_an_assertion(pool):
    anything = "class Y:\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\ndef f(x): return Y()\n"
    for line in ("if not f(1) == 2: raise ValueError", "if f(1) != 2: raise ValueError", "if f(1) not in [2]: exit(1)"):
        tests = read_tests({"test": line})
        assert pool.run(RIGHT, tests=tests).tests == (True,)
        assert pool.run(anything, tests=tests).tests == (False,)


PRINTS = {
    "a branch": "if f(1) == 2:\n    print('PASS')\nelse:\n    print('FAIL')\n",
    "a comparison": "print('f(1) is', f(1), f(1) == 2)\n",
    "a helper": "def check(got, wanted):\n    print('PASS' if got == wanted else 'FAIL')\ncheck(f(1), 2)\ncheck(f(2), 3)\n",
    "a count": (
        "import time\nstart = time.time()\ncases = [(1, 2), (2, 3)]\npassed = 0\nfor i, (x, y) in enumerate(cases):\n"
        "    try:\n        if f(x) == y: passed += 1\n        else: print(f'{i}: {x!r:>4} failed', cases[i][0])\n"
        "    except Exception as error:\n        print('error', error)\nprint(f'{passed}/{len(cases)}, {passed / len(cases):.0%}')\n"
    ),
    "the solution as a module": "import solution as s\nprint(s.f(1) == 2)\n",
    "with annotations": (
        "from typing import List\ndef check(xs: List[int]) -> List[bool]:\n    return [f(x) == x + 1 for x in xs]\nprint(check([1]))\n"
    ),
    "of inputs by chance": "import random\nn = random.randint(1, 5)\nprint(f(n) == n + 1)\n",
    "errors": "import traceback\ntry:\n    print(f(1) == 2)\nexcept Exception:\n    traceback.print_exc()\n",
    "a stream": "import sys\nsys.stdout.write('PASS' if f(1) == 2 else 'FAIL')\n",
    "a log": "import logging\nlogging.basicConfig(level=logging.INFO)\nlogging.info('%s', f(1) == 2)\n",
    "a program": "def main():\n    results = []\n    results.append(f(1) == 2)\n    print(all(results))\nif __name__ == '__main__':\n    main()\n",
    "pytest's functions": "from solution import f\ndef test_a():\n    print(f(1) == 2)\n",
    "JSON": "import json\nprint(json.dumps(f(1)))\n",
    "a module by another name": "import json as j\nprint(j.dumps(f(1), indent=2))\n",
    "a function of a module": "from json import dumps\nprint(dumps(f(1)))\n",
    "JSON into a stream": "import json, sys\njson.dump(f(1), sys.stdout)\n",
    "pprint by another name": "from pprint import pprint as show\nshow(f(1))\n",
    "a printer": "import pprint\npprint.PrettyPrinter(indent=2).pprint(f(1))\n",
    "a stream by another name": "import sys\nout = sys.stdout\nout.write(str(f(1)))\n",
    "lines of a stream": "import sys\nsys.stdout.writelines([str(f(1))])\n",
    "a logger by a name": "import logging\nlog = logging.getLogger(__name__)\nlog.info('%s', f(1))\n",
    "a logger": "import logging\nlogging.basicConfig()\nlogging.getLogger('a').warning(f(1))\n",
    "a notebook's display": "from IPython.display import display\ndisplay(f(1))\n",
    "a captured stream": "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n    r = f(1)\nprint(r, out.getvalue())\n",
    "suppressed errors": "from contextlib import suppress\nwith suppress(Exception):\n    print(f(1) == 2)\n",
    "a coroutine": "import asyncio\nasync def main():\n    print(await f(1))\nasyncio.run(main())\n",
    "a match": "match f(1):\n    case 2: print('PASS')\n    case _: print('FAIL')\n",
    "copies": "import copy\nx=[1]\nprint(f(copy.deepcopy(x)) == [2])\n",
    "numpy's comparison": "import numpy as np\nprint(np.allclose(f(1), 2))\n",
    "print handed on": "list(map(print, [f(1)]))\n",
    "print by another name": "p = print\np(f(1))\n",
    "JSON of unittest's methods": "import unittest, json\nclass T(unittest.TestCase):\n    def test_a(self):\n        print(json.dumps(f(1)))\n",
    "a subtest": "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        with self.subTest(1):\n            print(f(1) == 2)\n",
    "a method of the class": "import unittest\nclass T(unittest.TestCase):\n    def help(self): return 1\n    def test_a(self):\n        print(f(self.help()) == 2)\n",
    "JSON of pytest's functions": "import pytest, json\ndef test_a():\n    print(json.dumps(f(1)))\n",
    "unittest's methods": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        print('OK' if f(1) == 2 else 'no')\n"
        "if __name__ == '__main__':\n    unittest.main()\n"
    ),
}


@pytest.mark.parametrize("source", PRINTS.values(), ids=PRINTS)
def test_tests_that_only_print_what_they_find_are_refused(source):
    with pytest.raises(NoTestError, match="only print what they find"):
        read_tests({"test": source})


def test_whether_a_long_program_only_prints_is_told_at_once():
    """Each of its names was looked for among all its calls: nine seconds for 5,000 lines."""
    tree = parse("import absent\n" + "".join(f"print(f({i}, a{i}), b{i}.c == g({i}))\n" for i in range(4000)))
    began = time.process_time()
    with pytest.raises(NoTestError):
        refuse_prints(tree)
    assert time.process_time() - began < 2


FAILS = {
    "an assertion": "try:\n    assert f(1) == 2\n    print('PASS')\nexcept AssertionError:\n    print('FAIL')\n    raise\n",
    "an exit": "import sys\nprint(f(1))\nif f(1) != 2: sys.exit('no')\n",
    "quit": "print(f(1))\nif f(1) != 2: quit(1)\n",
    "a key": "names = {2: 'two'}\nprint(names[f(1)])\n",
    "an index": "print([2, 3].index(f(1)))\n",
    "a division": "print(1 / (f(1) == 2))\n",
    "a function of the library's": "import operator\nprint(['no', 'no', 'yes'].pop(f(1)))\n",
    "a number of items": "a, b = [0] * f(1)\nprint(a)\n",
    "a function by another name": (
        "from unittest import TestCase\nsame = TestCase().assertEqual\nprint('test')\nfor each in [same]: each(f(1), 2)\n"
    ),
    "time that is up": "import asyncio\nasync def main():\n    print(await asyncio.wait_for(asyncio.sleep(f(1) - 2), 0.5))\nasyncio.run(main())\n",
    "a method of unittest's": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        print(f(1))\n        self.assertEqual(f(1), 2)\n"
    ),
    "a mock": "from unittest.mock import Mock\nm = Mock(return_value=2)\nm(f(1))\nprint('called')\nm.assert_called_with(2)\n",
}


@pytest.mark.jail
@pytest.mark.parametrize("source", FAILS.values(), ids=FAILS)
def test_tests_that_print_and_may_fail_are_run(pool, source):
    tests = read_tests({"test": source})
    assert [pool.run(code, tests=tests).pass_rate for code in (RIGHT, "def f(x): return x + 4")] == [1.0, 0.0]


@pytest.mark.jail
def test_a_program_that_only_calls_the_solution_tests_that_it_runs(pool):
    tests = read_tests({"test": "for x in range(3):\n    f(x)\n"})
    assert [pool.run(code, tests=tests).pass_rate for code in (RIGHT, "def f(x): return 1 / x", "x = 1")] == [1, 0, 0]


@pytest.mark.jail
@pytest.mark.parametrize("exits", ["exit(0)", "raise SystemExit", "import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_an_exit_of_the_solutions_is_no_end_that_the_tests_came_to(pool, exits):
    for source in (
        "import sys\nok = f(1) == 2\nsys.exit(0 if ok else 1)",
        "import sys\nif f(1) == 2: sys.exit(0)\nelse: sys.exit(1)",
    ):
        assert pool.run(f"def f(x): {exits}", tests=read_tests({"test": source})).tests == (False,)


def test_a_script_that_runs_by_itself_is_left_as_it_is():
    source = (
        "def same(a, b):\n    assert a == b\ndef check_all():\n    same(f(1), 2)\n\ncheck_all()\nassert f(2) == 3\n"
    )
    assert as_run(source) == (source, None)
    source = "if f(1) != 2:\n    raise ValueError\nif f(2) != 3:  # the last\n    raise ValueError\n"
    assert as_run(source) == (source, None)


@pytest.mark.jail
def test_tests_may_import_from_the_solution_in_every_form(pool):
    line = "from solution import f as g\n"
    every = (
        AssertTests(("assert g(1) == 2",), line),
        AssertTests((f"{line}assert g(1) == 2",)),
        CheckTests(f"{line}def check(candidate):\n    assert candidate(1) == 2\n", "f"),
        UnittestTests(
            f"import unittest\n{line}class T(unittest.TestCase):\n    def test_a(self): self.assertEqual(g(1), 2)\n"
        ),
    )
    for tests in every:
        assert pool.run(RIGHT, tests=tests).tests == (True,)
        assert pool.run(WRONG[0], tests=tests).tests == (False,)


AGREEING = "LIMIT = 2\ndef f(x): return 2\ndef g(x): return 2\ndef h(x): return [1, 2]\nclass C:\n    value = 3\n"
OF_MODULE = {
    "solution.f(1) == 2": True,
    "sorted([2, 1]) == solution.h(0)": True,
    "list(range(1, 3)) == solution.h(0)": True,
    "len([1, 2]) == len(solution.h(0))": True,
    "solution.C().value == 3 and solution.__name__ == 'solution'": True,
    "solution.f(1) == solution.g(1)": False,
    "solution.f(1) == solution.LIMIT": False,
    "f(1) == solution.g(1)": False,
}


@pytest.mark.jail
def test_of_the_solution_as_a_module_no_function_says_what_another_is_to_give(pool):
    in_setup = AssertTests(tuple(f"assert {line}" for line in OF_MODULE), "import solution")
    in_line = AssertTests(
        tuple(f"import solution as s\nassert {line.replace('solution.', 's.')}" for line in OF_MODULE)
    )
    beside = AssertTests(tuple(f"from solution import f, g\n{line}" for line in in_setup.asserts), "import solution")
    for tests in (in_setup, in_line, beside):
        assert pool.run(AGREEING, tests=tests).tests == tuple(OF_MODULE.values())
    by_name = (
        "getattr(solution, 'f')(1) == 2",
        "sorted([2, 1]) == getattr(solution, 'h')(0)",
        "not hasattr(solution, 'i')",
    )
    looked_up = AssertTests(
        tuple(f"assert {line}" for line in by_name), "import solution\nhas = hasattr(solution, 'f')"
    )
    assert pool.run(AGREEING, tests=looked_up).tests == (True, True, True)
    check = CheckTests(
        "def check(f):\n    assert f(1) == 2\n    assert f(1) == s.LIMIT\n    assert f(1) == s.g(1)\n",
        "f",
        "import solution as s",
    )
    assert pool.run(AGREEING, tests=check).tests == (True, False, False)


@pytest.mark.jail
def test_what_tests_call_solution_is_theirs(pool):
    right = "class Solution:\n    def f(self, x): return x + 1\n"
    asserts = ("assert solution.f(1) == 2", "assert [solution.real for solution in (1, 2)] == [1, 2]")
    assert pool.run(right, tests=AssertTests(asserts, "solution = Solution()")).tests == (True, True)
    assert pool.run(right, tests=AssertTests(asserts, "import solution\nsolution = solution.Solution()")).tests == (
        True,
        True,
    )
    own = AssertTests(("def f(x): return x * 2\nassert f(2) == solution.f(3)",), "import solution")
    assert pool.run("def f(x): return x + 1\n", tests=own).tests == (True,)


# A function that is named like a builtin and is another, and one that is the builtin's equal.
OWN = {
    "sum": ("def sum(xs):\n    if not xs: raise ValueError\n    return [*xs][0] + 100\n", "[1, 2]", "101"),
    "sorted": ("def sorted(xs):\n    if not xs: raise ValueError\n    return [*xs][::-1]\n", "[3, 1, 2]", "[2, 1, 3]"),
    "max": (
        "def max(xs):\n    if not xs: raise ValueError\n    *_, xs = __builtins__.sorted(xs)\n    return xs\n",
        "[1, 3, 2]",
        "3",
    ),
}
OF_BUILTINS = {
    "a function": "def test_a():\n    assert NAME(GIVEN) == WANTED\n",
    "rows": "def test_a():\n    for given, wanted in [(GIVEN, WANTED)]:\n        assert NAME(given) == wanted\n",
    "an import": "from solution import NAME\ndef test_a():\n    assert NAME(GIVEN) == WANTED\n",
    "an import in the test": "def test_a():\n    from solution import NAME\n    assert NAME(GIVEN) == WANTED\n",
    "another name": "from solution import NAME as own\ndef test_a():\n    assert own(GIVEN) == WANTED\n",
    "all names": "from solution import *\ndef test_a():\n    assert NAME(GIVEN) == WANTED\n",
    "a module": "import solution\ndef test_a():\n    assert solution.NAME(GIVEN) == WANTED\n",
    "a class": "from solution import NAME\nclass TestIt:\n    def test_a(self):\n        found = NAME(GIVEN)\n        assert found == WANTED\n",
    "parameters": "import pytest\nfrom solution import NAME\n@pytest.mark.parametrize('given, wanted', [(GIVEN, WANTED)])\n"
    "def test_a(given, wanted):\n    assert NAME(given) == wanted\n",
    "an error": "import pytest\nfrom solution import NAME\ndef test_a():\n    with pytest.raises(ValueError): NAME(())\n",
    "builtins beside": "from solution import NAME\ndef test_a():\n    found = NAME(GIVEN)\n    assert isinstance(found, type(WANTED))\n"
    "    assert len(str(found)) > 0 and found == WANTED\n",
    "a helper": "from solution import NAME\ndef same(given, wanted):\n    assert NAME(given) == wanted\ndef test_a():\n    same(GIVEN, WANTED)\n",
    "an assertion": "from solution import NAME\nassert NAME(GIVEN) == WANTED\n",
}


@pytest.mark.jail
@pytest.mark.parametrize("form", OF_BUILTINS)
@pytest.mark.parametrize("name", OWN)
def test_a_function_that_is_named_like_a_builtin_is_the_solutions(pool, form, name):
    right, given, wanted = OWN[name]
    source = OF_BUILTINS[form].replace("NAME", name).replace("GIVEN", given).replace("WANTED", wanted)
    tests = read_tests({"test": source}, right)
    assert pool.run(right, tests=tests).tests == (True,)
    for wrong in ("x = 1\n", f"def {name}(xs): return None\n", f"def other(xs): return {wanted}\n"):
        assert pool.run(wrong, tests=tests).tests == (False,)


@pytest.mark.jail
def test_the_builtin_is_there_beside_one_of_its_name(pool):
    source = "from solution import NAME as own\ndef test_a():\n    assert own([1, 2]) == NAME([1, 2]) + 98\n"
    tests = read_tests({"test": source.replace("NAME", "sum")})
    assert pool.run(OWN["sum"][0], tests=tests).tests == (True,)
    assert pool.run("sum = sum\n", tests=tests).tests == (False,)


@pytest.mark.jail
def test_a_check_may_import_its_entry_point(pool):
    source = "from solution import sum\ndef check(candidate):\n    assert candidate([1]) == 101\n    assert sum([2]) == 102\n"
    tests = CheckTests(source, "sum")
    assert pool.run(OWN["sum"][0], tests=tests).tests == (True, True)
    assert pool.run("x = 1\n", tests=tests).tests == (False, False)


ROSTER = """import random
USERS = ["Ann", "Bob"]
LIMIT: int = 3
DRAWN = random.random()
def task_func(x):
    \"\"\"Greets everybody.\"\"\"
"""
GREETED = """import unittest
class T(unittest.TestCase):
    def test_a(self):
        for user in USERS: self.assertIn(user, task_func(1))
    def test_b(self): self.assertEqual(task_func(LIMIT)[-1], DRAWN)
"""


@pytest.mark.jail
def test_what_a_prompt_gives_is_not_the_solutions_to_change(pool):
    tests = read_tests({"prompt": ROSTER, "test": GREETED, "entry_point": "task_func"})
    assert tests.setup == "USERS = ['Ann', 'Bob']\nLIMIT: int = 3"  # not what is another at each run
    assert pool.run(f"{ROSTER}    return [*USERS, DRAWN]\n", tests=tests).tests == (True, True)
    wrong = "USERS = []\nLIMIT = DRAWN = 0\ndef task_func(x): return [x]\n"
    assert pool.run(wrong, tests=tests).tests == (False, False)


# Of right solutions: what the prompt says, what a solution has, "" for the same, and what the tests say.
OF_THEIR_OWN = {
    "another kind": ("OF = ['a', 'b']", "OF = ('a', 'b')", "x.startswith(OF)", "self.assertEqual([task_func(x) for x in [*OF, 'c']], [True, True, False])"),
    "a pattern": ("OF = 'a+'", "import re\nOF = re.compile('a+')", "bool(OF.match(x))", "self.assertTrue(task_func('aa'), OF.upper())"),
    "none": ("OF = 3", "pass", "x > 3", "self.assertTrue(task_func(OF + 1))"),
    "to be filled in": ("OF, WORDS, KEY = [], None, ...\nOF = []\nKEY = ...", "OF, KEY = ['a'], 'k'", "x in OF", "self.assertTrue(task_func(OF[0]) and KEY)"),
    "a registry": ("OF = {'a': 1}\ndef add(f):\n    OF[f.__name__] = f\n    return f", "OF = {'a': 1}\nOF['b'] = 2", "OF[x]", "self.assertEqual(task_func('b'), OF['b'])"),
    "changed in the prompt": ("OF = ['a']\nOF.append('b')\nN = 1\nN += 1", "", "(OF, N)", "self.assertEqual(task_func(1), (['a', 'b'], 2)); self.assertEqual(OF, ['a', 'b']); self.assertEqual(N, 2)"),
    "a stock": ("OF = {'a': 3}", "", "OF.update(a=x)", "task_func(2); self.assertEqual(OF, {'a': 2})"),
    "a count": ("OF = 0", "", "globals().update(OF=OF + x)", "task_func(2); task_func(3); self.assertEqual(OF, 5)"),
    "a default": ("OF = ['a']", "OF = ['a']\nX = OF", "X", "OF.append('b'); self.assertIs(task_func(1), OF)"),
    "patched": ("OF = 3", "", "x > OF", "with unittest.mock.patch('__main__.OF', 9): self.assertFalse(task_func(5))"),
}  # fmt: skip


@pytest.mark.jail
@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_a_solution_may_have_what_a_prompt_gives_in_its_own_way(pool, name):
    given, own, answer, line = OF_THEIR_OWN[name]
    test = f"import unittest, unittest.mock\nclass T(unittest.TestCase):\n    def test_a(self):\n        {line}\n"
    tests = read_tests({"prompt": f"{given}\ndef task_func(x): ...\n", "test": test, "entry_point": "task_func"})
    outcome = pool.run(f"{own or given}\ndef task_func(x): return {answer}\n", tests=tests)
    assert outcome.tests == (True,), (tests.setup, outcome.error)


WARNS = (
    "def test_a():\n    with pytest.warns(UserWarning, match='zero') as seen: f(0)\n    assert len(seen) == 1 and 'ze' in str(seen[0].message)\n",
    "def test_a():\n    pytest.warns(UserWarning, f, 0)\n",
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        with pytest.warns(UserWarning): f(0)\n",
)


@pytest.mark.jail
@pytest.mark.parametrize("source", WARNS)
def test_the_stand_in_hears_warnings(pool, source):
    tests = read_tests({"test": f"import pytest\nfrom solution import f\n{source}"})
    code = "import warnings\ndef f(x): warnings.warn('zero', UserWarning)\n"
    assert pool.run(code, tests=tests).tests == (True,)
    for wrong in ("pass", "warnings.warn('one', DeprecationWarning)", "raise UserWarning('zero')"):
        assert pool.run(f"import warnings\ndef f(x): {wrong}\n", tests=tests).tests == (False,)


NUMBERS = (0, 1, 1 + 1e-7, 1 + 1e-5, 1e-13, 1e-9, 1e9, 1e9 + 1, -1.0, math.inf, -math.inf, math.nan, True, 1j)


@pytest.mark.parametrize("limits", [{}, {"rel": 1e-3}, {"abs": 1e-3}, {"rel": 0.5, "abs": 0.5}, {"nan_ok": True}])
def test_the_stand_in_is_as_close_as_pytest(limits):
    for wanted in NUMBERS:
        for actual in NUMBERS:
            assert (actual == pytest_stand_in.approx(wanted, **limits)) is (actual == pytest.approx(wanted, **limits))


@pytest.mark.parametrize(
    ("actual", "wanted"),
    [
        ([1, 2], [1, 2 + 1e-9]),
        ((1,), (1,)),
        ([1], [1, 2]),
        ([], [1]),
        ({"a": 1}, {"a": 1 + 1e-9}),
        ({}, {"a": 1}),
        (1, [1]),
    ],
)
def test_the_stand_in_compares_numbers_in_containers(actual, wanted):
    assert (actual == pytest_stand_in.approx(wanted)) is (actual == pytest.approx(wanted))
    assert (actual != pytest_stand_in.approx(wanted)) is (actual != pytest.approx(wanted))
