# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Tests that are skipped: what the machine lacks costs no solution its verdict, and no solution has a test skipped."""

from __future__ import annotations

import time

import pytest

from fastgrpo_sandbox import AssertTests, UnittestTests
from fastgrpo_sandbox.columns import read_tests
from fastgrpo_sandbox.counting import count_tests
from fastgrpo_sandbox.job import refusal
from fastgrpo_sandbox.skipping import skip_probes
from fastgrpo_sandbox.types import NoTestError

pytestmark = pytest.mark.jail
RIGHT, WRONG = "def f(x): return x + 1", "def f(x): return x"
UNIT = "import importlib.util, os, shutil, sys, unittest\nfrom unittest import skipIf\n"
ASKS = "        self.assertEqual(f(1), 2)\n"
PLAIN = "import os, pytest\ndef test_a():\n{}"
BESIDE = f"class B(unittest.TestCase):\n    def test_b(self):\n{ASKS}"


def case(body: str, first: str = "", around: str = "") -> str:
    return f"{UNIT}{first}class T(unittest.TestCase):\n{around}{body}{BESIDE}"


def method(lines: str, decorator: str = "") -> str:
    return f"{decorator}    def test_a(self):\n{lines}        self.assertEqual(f(1), 3)\n"


BY_MACHINE = {
    "skipTest under a condition": case(method("        if sys.platform == 'linux': self.skipTest('no')\n")),
    "after a docstring and imports": case(
        method(
            "        'Why.'\n        import os\n        if os.name == 'posix':\n"
            "            raise unittest.SkipTest('no')\n"
        )
    ),
    "a package that is not there": case(
        method(
            "        try:\n            import absent\n        except ImportError:\n            self.skipTest('no')\n"
        )
    ),
    "a flag of the file's": case(
        method("", "    @unittest.skipUnless(HAS, 'no')\n"),
        "try:\n    import absent\n    HAS = True\nexcept ImportError:\n    HAS = False\n",
    ),
    "a decorator by another name": case(
        method("", "    @wants\n"), "wants = skipIf(shutil.which('no-such-program') is None, 'no')\n"
    ),
    "a function of the file's": case(
        method("", "    @skipIf(not there('absent'), 'no')\n"),
        "def there(name):\n    return importlib.util.find_spec(name) is not None\n",
    ),
    "an environment variable": case(method("        if not os.environ.get('RUN_SLOW'): self.skipTest('no')\n")),
    "the test's class": case(method(""), "@skipIf(sys.version_info > (3,), 'no')\n"),
    "setUp": case(method(""), around="    def setUp(self):\n        if os.name == 'posix': self.skipTest('no')\n"),
    "setUpClass": case(
        method(""),
        around="    @classmethod\n    def setUpClass(cls):\n"
        "        if os.name == 'posix': raise unittest.SkipTest('no')\n",
    ),
    "an exception that is not called": case(method("        if os.name == 'posix': raise unittest.SkipTest\n")),
    "a return": case(method("        if os.name == 'posix': return self.skipTest('no')\n")),
    "more than a skip": case(
        method("        if os.name == 'posix':\n            print('no')\n            self.skipTest('no')\n")
    ),
    "either it or a test": case(
        method("        if os.name == 'posix': self.skipTest('no')\n        else: self.assertEqual(f(1), 3)\n")
    ),
    "what is looked up first": case(
        method("        wanted = os.environ.get('RUN_SLOW')\n        if not wanted: self.skipTest('no')\n")
    ),
    "a function that skips": case(
        method("        need()\n"),
        "def need():\n    try:\n        import absent\n    except ImportError:\n"
        "        raise unittest.SkipTest('no')\n",
    ),
    "a flag that is chosen": case(
        method("", "    @skipIf(OFF, 'no')\n"), "if os.name == 'posix':\n    OFF: bool = True\nelse:\n    OFF = False\n"
    ),
    "a comprehension, and a reason that names the solution": case(
        method("", "    @skipIf(any(each in os.name for each in ('posix',)), 'not for this solution')\n")
    ),
    "a class that it has from": case(
        method(""),
        "class Base(unittest.TestCase):\n    def setUp(self):\n        if os.name == 'posix': self.skipTest('no')\n",
    ).replace("class T(unittest.TestCase)", "class T(Base)"),
    "a loop": case(
        method(
            "        for name in ('json', 'absent'):\n            if importlib.util.find_spec(name) is None:\n"
            "                self.skipTest('no')\n"
        )
    ),
    "a loop that imports": case(
        method(
            "        for name in NAMES:\n            try:\n                importlib.import_module(name)\n"
            "            except ImportError:\n                self.skipTest(name)\n            else:\n                continue\n"
        ),
        "NAMES = ['json', 'absent']\n",
    ),
    "an attribute of setUp's": case(
        method("        if not self.has: self.skipTest('no')\n"),
        around="    def setUp(self):\n        super().setUp()\n        self.x = 1\n        self.has = shutil.which('absent')\n        self.made = f(1)\n",
    ),
    "an attribute of setUpClass'": case(
        method("        if self.missing or cls_lacks(): self.skipTest('no')\n"),
        "def cls_lacks(): return False\n",
        "    @classmethod\n    def setUpClass(cls):\n        cls.missing = [name for name in ('absent',) if not importlib.util.find_spec(name)]\n",
    ),
    "an attribute of the class": case(
        method("        if self.OFF: self.skipTest('no')\n"), around="    NAME = 'posix'\n    OFF = os.name == NAME\n"
    ),
    "an attribute of the class, by a decorator": case(
        method("", "    @unittest.skipIf(OFF, 'no')\n"), around="    OFF = os.name == 'posix'\n"
    ),
    "a method that skips": case(
        method("        self.need('json', 'absent')\n"),
        around="    def need(self, *names, first=None):\n        if not names: return\n        for name in names:\n"
        "            if importlib.util.find_spec(name) is None: self.skipTest(name)\n",
    ),
    "a method that tells": case(
        method("        if not self.has('absent'): self.skipTest('no')\n"),
        around="    @staticmethod\n    def has(name):\n        return importlib.util.find_spec(name) is not None\n",
    ),
    "a property": case(
        method("        if self.off: self.skipTest('no')\n"),
        around="    @property\n    def off(self):\n        return os.name == 'posix'\n",
    ),
    "a set-up of the class that it has from": case(
        method(
            "        self.need()\n",
        ),
        "class Base(unittest.TestCase):\n    def setUp(self): self.name = os.name\n"
        "    def need(self):\n        if self.name == 'posix': self.skipTest('no')\n",
        "    def setUp(self):\n        super().setUp()\n        self.other = 1\n",
    ).replace("class T(unittest.TestCase)", "class T(Base)"),
    "a function that makes a decorator": case(
        method("", "    @needs('absent')\n"),
        "def needs(name):\n    return unittest.skipUnless(importlib.util.find_spec(name), name)\n",
    ),
    "a function with an argument": case(
        method("        need('json')\n        need(name='absent')\n"),
        "def need(name):\n    if importlib.util.find_spec(name): return\n    raise unittest.SkipTest('no')\n",
    ),
    "behind what has nothing to do with it": case(
        method("        import random\n        random.seed(0)\n        if os.name == 'posix': self.skipTest('no')\n")
    ),
    "behind what unittest undoes in the end": case(
        method("        if os.name == 'posix': self.skipTest('no')\n"),
        "import tempfile\nfrom unittest.mock import patch\n",
        "    def setUp(self):\n        self.tmp = tempfile.TemporaryDirectory()\n        self.addCleanup(self.tmp.cleanup)\n"
        "        self.path = os.path.join(self.tmp.name, 'x')\n        self.sleep = patch('time.sleep')\n"
        "        self.sleep.start()\n        self.addCleanup(self.sleep.stop)\n",
    ),
    "a class beside its own": case(
        "    pass\n", f"class Mixin:\n{method(chr(32) * 8 + 'if os.name: self.skipTest(1)' + chr(10))}"
    ).replace("class T(unittest.TestCase)", "class T(Mixin, unittest.TestCase)"),
}


@pytest.mark.parametrize("source", BY_MACHINE.values(), ids=BY_MACHINE)
def test_what_the_machine_skips_passes_and_the_rest_decides(pool, source):
    tests = UnittestTests(source)
    assert pool.run(RIGHT, tests=tests).tests == (True, True)
    assert pool.run(WRONG, tests=tests).tests == (True, False)


BY_SOLUTION = {
    "an answer": (case(method("        if f(1) == 1: self.skipTest('no')\n")), WRONG),
    "an error": (
        case(method("        try:\n            f(1)\n        except Exception:\n            self.skipTest('no')\n")),
        "def f(x): return 1 / 0",
    ),
    "a name that it lacks": (case(method("", "    @skipIf('g' not in globals(), 'no')\n")), WRONG),
    "a name that it lacks, beside": (
        case(
            method("        if G is None: self.skipTest('no')\n"), "try:\n    G = g\nexcept NameError:\n    G = None\n"
        ),
        WRONG,
    ),
    "a name that it lacks, in a function": (
        case(
            method("", "    @skipIf(lacks(), 'no')\n"),
            "def lacks():\n    try: return not g\n    except NameError: return True\n",
        ),
        WRONG,
    ),
    "what cannot be imported from it": (
        case(
            method("        if not HAS: self.skipTest('no')\n"),
            "try:\n    from solution import g\n    HAS = True\nexcept ImportError:\n    HAS = False\n",
        ),
        WRONG,
    ),
    "another platform": (
        case(method("        if sys.platform == 'win32': self.skipTest('no')\n")),
        f"import sys\nsys.platform = 'win32'\n{WRONG}",
    ),
    "another platform, by a decorator": (
        case(method("", "    @skipIf(sys.platform == 'win32', 'no')\n")),
        f"import sys\nsys.platform = 'win32'\n{WRONG}",
    ),
    "an environment variable": (
        case(method("", "    @skipIf(os.environ.get('CI'), 'no')\n")),
        f"import os\nos.environ['CI'] = '1'\n{WRONG}",
    ),
    "a file": (
        case(method("        if os.path.exists('/tmp/x'): self.skipTest('no')\n")),
        f"open('/tmp/x', 'w')\n{WRONG}",
    ),
    "its own SkipTest": (
        case(method("")),
        "import unittest\ndef f(x): raise unittest.SkipTest('no')",
    ),
    "a mark on the tests' class": (case(method("")), f"{WRONG}\nf.__unittest_skip__ = True"),
    "what a test of it has not noted": (
        case(
            "    def test_0(self):\n        self.assertEqual(f(1), 3)\n        DONE.append(1)\n"
            + method("        if not DONE: self.skipTest('no')\n"),
            "DONE = []\n",
        ),
        WRONG,
    ),
    "an attribute that another test gives": (
        case(
            "    def test_0(self):\n        self.assertEqual(f(1), 3)\n        type(self).done = True\n"
            + method("        if not self.done: self.skipTest('no')\n"),
            around="    done = False\n",
        ),
        WRONG,
    ),
    "an attribute that another test fills": (
        case(
            "    def test_0(self):\n        self.assertEqual(f(1), 3)\n        self.done.append(1)\n"
            + method("        if not self.done: self.skipTest('no')\n"),
            around="    done = []\n",
        ),
        WRONG,
    ),
    "an attribute that it is asked for in the end": (
        case(
            method("        if self.made is None: self.skipTest('no')\n"),
            around="    made = None\n    def setUp(self):\n        self.made = None\n"
            "        try: self.made = f(1)\n        except ValueError: pass\n",
        ),
        "def f(x): raise ValueError",
    ),
    "a method that asks it": (
        case(
            method("        self.need()\n"),
            around="    def need(self):\n        if f(1) == 1: self.skipTest('no')\n",
        ),
        WRONG,
    ),
    "a loop that asks it": (
        case(method("        for x in range(2):\n            if f(x) == x: self.skipTest('no')\n")),
        WRONG,
    ),
    "behind a folder": (
        case(
            method(
                "        os.makedirs('x', exist_ok=True)\n        made = f(1)\n        if made == 1: self.skipTest('no')\n"
            )
        ),
        WRONG,
    ),
    "an object of the test's": (
        case(
            method(
                "        try:\n            self.made.x\n        except Exception:\n            self.skipTest('no')\n"
            ),
            around="    def setUp(self): self.made = f(1)\n",
        ),
        WRONG,
    ),
}


@pytest.mark.parametrize("given", ["os.environ['RUN'] = '1'", "os.environ.update(RUN='1')"])
def test_what_the_tests_set_themselves_skips_none(pool, given):
    skips = "        if not os.environ.get('RUN'): self.skipTest('no')\n"
    tests = UnittestTests(case(f"    def test_a(self):\n{skips}{ASKS}", f"{given}\n"))
    assert pool.run(RIGHT, tests=tests).tests == (True, True)
    assert pool.run(WRONG, tests=tests).tests == (False, False)


@pytest.mark.parametrize(("source", "code"), BY_SOLUTION.values(), ids=BY_SOLUTION)
def test_no_solution_has_a_test_skipped(pool, source, code):
    assert not any(pool.run(code, tests=UnittestTests(source)).tests)


UNDECIDED = {
    "a statement that writes": (
        "        os.makedirs('x', exist_ok=True)\n        if os.path.exists('x'): self.skipTest('no')\n"
    ),
    "a while": "        while True:\n            if os.name == 'posix': self.skipTest('no')\n            break\n",
    "a with": "        with self.subTest(1):\n            if os.name == 'posix': self.skipTest('no')\n",
    "an error of what writes": ("        try: os.mkdir('/x')\n        except OSError: self.skipTest('no')\n"),
}


def test_functions_that_call_one_another_without_end_are_read_in_no_time():
    calls = "".join(f"    def h{i}(self):\n        self.h{i - 1}()\n        self.h{i - 1}()\n" for i in range(1, 25))
    first = "    def h0(self):\n        if os.name == 'posix': self.skipTest('no')\n"
    source = case(method("        self.h24()\n"), around=first + calls)
    assert skip_probes(source, ("T.test_a",))
    assert not refusal(UnittestTests(source))


@pytest.mark.parametrize("lines", UNDECIDED.values(), ids=UNDECIDED)
def test_a_test_of_which_nobody_knows_whether_it_is_skipped_is_refused(lines):
    plain = lines.replace("self.skipTest", "pytest.skip").replace("self.subTest(1)", "open('x')")
    for tests in (UnittestTests(case(method(lines))), AssertTests(("test_a()",), PLAIN.format(plain))):
        assert "may be skipped, and whether it is cannot be told" in refusal(tests)
        with pytest.raises(NoTestError, match="may be skipped"):
            read_tests({"test": tests})


MARK = "@pytest.mark.skipif(os.name == 'posix', reason='no')\n"
BY_PYTEST = {
    "a mark": f"import os, pytest\n{MARK}def test_a():\n    assert f(1) == 3\n",
    "a mark by another name": (
        "import sys\nfrom pytest import mark\n@mark.skipif(sys.version_info > (3,), reason='no')\n"
        "def test_a():\n    assert f(1) == 3\n"
    ),
    "a mark of a coroutine": (f"import os, pytest\n{MARK}async def test_a():\n    assert f(1) == 3\n"),
    "skip in a test": (
        "import os, pytest\ndef test_a():\n    if os.name == 'posix': pytest.skip('no')\n    assert f(1) == 3\n"
    ),
    "a decorator of unittest's": (
        "import os, unittest\n@unittest.skipIf(os.name == 'posix', 'no')\ndef test_a():\n    assert f(1) == 3\n"
    ),
    "a mark by a name of the file's": (
        f"import os, pytest\nnever = {MARK[1:]}@never\ndef test_a():\n    assert f(1) == 3\n"
    ),
    "a package that is asked for": (
        "import pytest\ndef test_a():\n    absent = pytest.importorskip('absent')\n    assert absent.f(f(1)) == 3\n"
    ),
    "a fixture": (
        "import os, pytest\n@pytest.fixture\ndef x():\n    if os.name == 'posix': pytest.skip('no')\n    yield 1\n"
        "def test_a(x):\n    assert f(x) == 3\n"
    ),
    "a function that skips": (
        "import os, pytest\ndef need():\n    if os.name == 'posix': pytest.skip('no')\n"
        "class TestA:\n    def test_a(self):\n        need()\n        assert f(1) == 3\n"
    ),
    "an object that a method sets up": (
        "import os, pytest\nclass TestA:\n    def setup_method(self):\n        self.x = os.name\n"
        "    def need(self, name):\n        if self.x == name: pytest.skip('no')\n"
        "    def test_a(self):\n        self.need('posix')\n        assert f(1) == 3\n"
    ),
    "a mark of a class": (f"import os, pytest\n{MARK}class TestA:\n    def test_a(self):\n        assert f(1) == 3\n"),
}
LAST = "def test_b():\n    assert f(1) == 2\n"


@pytest.mark.parametrize("source", BY_PYTEST.values(), ids=BY_PYTEST)
def test_what_the_machine_skips_passes_as_pytest_finds_it(pool, source):
    tests = read_tests({"test": source + LAST})
    assert pool.run(RIGHT, tests=tests).tests == (True, True)
    assert pool.run(WRONG, tests=tests).tests == (True, False)
    assert not pool.run("x = 1", tests=tests).tests[1]


@pytest.mark.parametrize(
    "source",
    [
        "import pytest\n@pytest.mark.skip\nclass TestA:\n    def test_a(self):\n        assert f(1) == 3\n",
        "import pytest\npytestmark = [pytest.mark.slow]\n@pytest.mark.skipif(True, reason='no')\nclass TestA: pass\n",
        "import unittest\n@unittest.skip('no')\ndef test_a():\n    assert f(1) == 3\n",
    ],
)
def test_what_is_skipped_for_good_is_not_counted(pool, source):
    tests = read_tests({"test": source + LAST})
    assert count_tests(tests) == 1
    assert pool.run(RIGHT, tests=tests).tests == (True,)


@pytest.mark.parametrize(
    "lines",
    [
        "    if f(1) != 3: pytest.skip('no')\n",
        "    try: f(1)\n    finally: pytest.skip('no')\n",
        "    f(1)\n    pytest.skip('no')\n",
    ],
)
def test_what_a_solution_answers_skips_no_test_of_pytests(pool, lines):
    tests = read_tests({"test": f"import pytest\ndef test_a():\n{lines}    assert f(1) == 3\n{LAST}"})
    assert pool.run(RIGHT, tests=tests).tests == (False, True)


@pytest.mark.parametrize(
    "flag",
    [
        "import solution\nOFF = not hasattr(solution, 'g')",
        "OFF = f(1) == 2",
        "try:\n    g\n    OFF = False\nexcept NameError:\n    OFF = True",
    ],
)
def test_what_the_setup_asks_of_a_solution_skips_no_test_of_pytests(pool, flag):
    source = (
        f"import pytest\n{flag}\n@pytest.mark.skipif(OFF, reason='no')\ndef test_a():\n    assert f(1) == 3\n{LAST}"
    )
    assert pool.run(RIGHT, tests=read_tests({"test": source})).tests[0] is False


ENV = "import os, pytest\n"
BY_PYTESTS_SOLUTION = {
    "the environment": (
        f"{ENV}def test_a():\n    if os.environ.get('CI'): pytest.skip('no')\n    assert f(1) == 2\n",
        f"import os\nos.environ['CI'] = '1'\n{WRONG}",
    ),
    "the environment, by a mark": (
        f"{ENV}@pytest.mark.skipif('CI' in os.environ, reason='no')\ndef test_a():\n    assert f(1) == 2\n",
        f"import os\nos.environ['CI'] = '1'\n{WRONG}",
    ),
    "the environment, in another test": (
        f"{ENV}{LAST}def test_a():\n    if os.environ.get('CI'): pytest.skip('no')\n    assert f(1) == 2\n",
        "import os\ndef f(x): os.environ['CI'] = '1'",
    ),
    "what another test has not noted": (
        f"import pytest\nDONE = []\n{LAST}    DONE.append(1)\n"
        "def test_a():\n    if not DONE: pytest.skip('no')\n    assert f(1) == 2\n",
        WRONG,
    ),
    "an argument, in another test": (
        "import pytest\nDATA = [1]\ndef test_b():\n    assert f(DATA) == 2\n"
        "def test_a():\n    if not DATA: pytest.skip('no')\n    assert f([1]) == 2\n",
        "def f(x): x.clear()",
    ),
}


@pytest.mark.parametrize(("source", "code"), BY_PYTESTS_SOLUTION.values(), ids=BY_PYTESTS_SOLUTION)
def test_no_solution_has_a_test_of_pytests_skipped(pool, source, code):
    """What it makes of the environment is heard in the process of the tests, with its first answer."""
    assert not any(pool.run(code, tests=read_tests({"test": source})).tests)


@pytest.mark.parametrize(
    "source",
    [
        f"import os, pytest\n{MARK}def test_a():\n    assert f(1) == 2\n",
        UNIT + f"@skipIf(os.name == 'posix', 'no')\n{BESIDE}",
    ],
)
def test_where_all_tests_are_skipped_none_passes(pool, source):
    """Any program would."""
    assert pool.run(WRONG, tests=read_tests({"test": source})).tests == (False,)


def test_the_conditions_of_many_tests_take_moments():
    """Each looked through the whole text."""
    methods = "".join(
        f"    @skipIf(os.name == 'nt', '')\n    def test_{i}(self): assert f({i}) == TABLE[{i}]\n" for i in range(200)
    )
    source = f"{UNIT}TABLE = {list(range(20_000))}\nclass T(unittest.TestCase):\n{methods}"
    began = time.process_time()
    assert len(skip_probes(source, tuple(f"T.test_{i}" for i in range(200)))) == 200
    assert time.process_time() - began < 5


def test_a_package_of_pytests_that_is_there_is_imported(pool):
    tests = read_tests(
        {"test": f"import pytest\njson = pytest.importorskip('json')\n{LAST}    assert json.dumps(f(1)) == '2'\n"}
    )
    assert [pool.run(code, tests=tests).tests for code in (RIGHT, WRONG)] == [(True,), (False,)]
