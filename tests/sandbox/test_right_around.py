# ruff: noqa: E501 - programs for the jail are strings, one assertion a line
"""Right solutions that pass in one process must pass in two. What tests set around the solution, and setups that use it."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, CheckTests

pytestmark = pytest.mark.jail

READS = """import decimal, logging, os, random, sys, time, warnings
def draw(): return random.random()
def env(name): return os.environ.get(name)
def now(): return time.time()
def ask(): return input('? ')
def line(): return sys.stdin.readline()
def words(): return sys.stdin.read().split()
def loud(kind=UserWarning):
    warnings.warn('old', kind)
    return 1
def read(path):
    with open(path) as f: return f.read()
def arguments(): return sys.argv[1:]
def third(): return decimal.Decimal(1) / 3
def complain(): print('E', file=sys.stderr)
def dice(): return [random.randint(1, 6) for _ in range(2)]
def waited():
    began = time.monotonic()
    time.sleep(60)
    return began
"""
TREE = """class Node:
    def __init__(self, value):
        self.value = value
        self.left = self.right = None
def height(node): return 0 if node is None else 1 + max(height(node.left), height(node.right))
def double(x): return 2 * x
"""

RIGHT = {
    "seeds": (
        READS,
        "import random",
        (
            "random.seed(3)\nassert draw() == random.Random(3).random()",
            "random.seed(a=5)\nfirst = [draw() for _ in range(3)]\nrandom.seed(5)\nassert [draw(), draw()] == first[:2]",
        ),
    ),
    "environment": (
        READS,
        "import decimal, os, sys\nfrom unittest import mock",
        (
            "os.environ['COLOR'] = 'red'\nassert env('COLOR') == 'red'",
            "with mock.patch.dict(os.environ, {'COLOR': 'blue'}):\n    assert env('COLOR') == 'blue'",
            "del os.environ['COLOR']\nassert env('COLOR') is None",
            "sys.argv = ['prog', '-v']\nassert arguments() == ['-v']",
            "with decimal.localcontext() as context:\n    context.prec = 3\n    assert str(third()) == '0.333'",
            "assert str(third()) == '0.' + 28 * '3'",
        ),
    ),
    "streams": (
        READS,
        "import contextlib, io, sys\nfrom unittest import mock",
        (
            "with mock.patch('builtins.input', return_value='typed'):\n    assert ask() == 'typed'",
            "with mock.patch('builtins.input', side_effect=['a', 'b']) as given:\n    assert [ask(), ask()] == ['a', 'b']\nassert given.call_count == 2",
            "sys.stdin = io.StringIO('one\\ntwo\\n')\nassert ask() == 'one' and line() == 'two\\n'",
            "with mock.patch('sys.stdin', io.StringIO('3 4\\n5')):\n    assert words() == ['3', '4', '5']",
            "seen = io.StringIO()\nwith contextlib.redirect_stderr(seen):\n    complain()\nassert seen.getvalue() == 'E\\n'",
            "with mock.patch('builtins.open', mock.mock_open(read_data='made up')):\n    assert read('nowhere') == 'made up'",
        ),
    ),
    "mocks": (
        READS,
        "import random, time\nfrom unittest import mock",
        (
            "with mock.patch('time.time', return_value=5):\n    assert now() == 5",
            "assert now() > 10**9",
            "with mock.patch.object(random, 'randint', return_value=4):\n    assert dice() == [4, 4]",
            "with mock.patch('time.sleep') as slept:\n    assert waited() > 0\nslept.assert_called_once_with(60)",
            "@mock.patch('time.time', lambda: 7)\ndef at(): return now()\nassert at() == 7 and now() != 7",
        ),
    ),
    "warnings": (
        READS,
        "import warnings",
        (
            "with warnings.catch_warnings(record=True) as seen:\n    warnings.simplefilter('always')\n    loud()\nassert len(seen) == 1 and str(seen[0].message) == 'old' and seen[0].category is UserWarning",
            "with warnings.catch_warnings():\n    warnings.simplefilter('error')\n    try:\n        loud(FutureWarning)\n        raised = False\n    except FutureWarning:\n        raised = True\nassert raised",
            "assert loud() == 1",
        ),
    ),
    "a setup that uses the solution": (
        TREE,
        "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\ndef twice(x): return double(double(x))",
        (
            "assert height(root) == 3",
            "assert isinstance(root.left, Node) and root.left.value == 2",
            "root.right = Node(9)\nassert root.right.value == 9 and height(root) == 3",
            "assert twice(2) == 8 and double(1) == 2",
        ),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(every_assertion_passes, name):
    every_assertion_passes(*RIGHT[name])


def test_a_setup_of_check_may_make_objects_of_the_solutions_classes(pool):
    tests = CheckTests(
        "def check(candidate):\n    assert candidate(root) == 2", "height", "root = Node(1)\nroot.left = Node(2)"
    )
    assert pool.run(TREE, tests=tests).tests == (True,)


def test_a_setup_that_names_what_a_solution_lacks_fails_it(pool):
    outcome = pool.run("def height(node): return 1", tests=AssertTests(("assert height(root) == 1",), "root = Node(1)"))
    assert (outcome.status, outcome.tests) == ("failed", (False,))


def test_a_setup_does_not_make_the_solution_a_source_of_wanted_values(pool):
    code = "class Y:\n    def __eq__(self, other): return True\ndef f(x): return Y()\ndef want(x): return Y()"
    tests = AssertTests(("assert f(1) == want(1)", "assert g(1) == 2"), "def g(x): return f(x)")
    assert not any(pool.run(code, tests=tests).tests)


SETS = "import os\ndef put(key, value): os.environ[key] = value\ndef drop(key): os.environ.pop(key)\ndef put_and_fail(key):\n    os.environ[key] = '1'\n    raise KeyError(key)\n"


def test_the_environment_that_a_solution_sets_is_there_for_the_tests(pool, every_assertion_passes):
    lines = (
        "import os\nput('A', '1')\nassert os.environ['A'] == '1' and os.getenv('A') == '1'",
        "import os\nos.environ['B'] = '2'\ndrop('B')\nassert 'B' not in os.environ",
        "import os\ntry: put_and_fail('C')\nexcept KeyError: pass\nassert os.getenv('C') == '1'",
        "import os\nfrom unittest.mock import patch\nwith patch.dict(os.environ, {'D': '3'}):\n    put('E', '4')\n    assert os.environ['D'] + os.environ['E'] == '34'\nassert 'D' not in os.environ and 'E' not in os.environ",
    )
    every_assertion_passes(SETS, "", lines)
    assert not any(pool.run("def put(*given): pass\ndrop = put_and_fail = put\n", tests=AssertTests(lines)).tests)
    hostile = SETS + "os.environ = {1: 2}\nput = lambda *given: None\n"
    assert pool.run(hostile, tests=AssertTests(lines[:1])).tests == (False,)
