"""A sample of every data set, with the fields it really has: the right solution passes, wrong ones do not."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import zlib
from typing import Any

import pytest

from fastgrpo.errors import UserError
from fastgrpo.flow.problems import contests
from fastgrpo.flow.types import Problem
from fastgrpo_sandbox import AssertTests, BlockingSandboxPool, StdioTests
from tests.flow.problems.conftest import Judge, Load

ADD = "def add(a, b):\n    return a + b\n"
HELPER = """
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    return isinstance(x, np.ndarray) and x.dtype in (np.float64, np.float32)

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"
"""
TABLES = "inputs = [[1, 2], [0.1, 0.2], [-1, 1], [[1], [2]]]\n{0}results = [3, 0.3, 0, [1, 2]]\n"
HUMANEVAL_PLUS = {
    "task_id": "HumanEval/0",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "entry_point": "add",
    "test": HELPER
    + "def check(candidate):\n    "
    + TABLES.format("    ")
    + "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to add.",
    "code": ADD.replace("\n", "\r\n"),
    "test_setup_code": "two = 2",
    "test_list": ["assert add(1, two) == 3", "assert add(0, 1) == 1", "assert add(1, 1) == 2"],
    "challenge_test_list": [],
}
MBPP_TREE = MBPP | {
    "code": "class Leaf:\r\n\tdef __init__(self, n):\r\n\t\tself.n = n\r\ndef add(a, b):\r\n\treturn a.n + b.n\r\n",
    "test_setup_code": "one = Leaf(1) \r\nfour = Leaf(4)",
    "test_list": ["assert add(one, four) == 5", "assert add(four, four) == 8"],
}
SANITIZED = {
    "source_file": "a.ipynb",
    "task_id": 3,
    "prompt": "Write a function to add.",
    "code": ADD,
    "test_imports": ["import math"],
    "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.1, 0.2), 0.3)"],
}
MBPP_PLUS = SANITIZED | {
    "task_id": 4,
    "test": HELPER
    + TABLES.format("")
    + "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(add(*inp), exp, 0)\n",
}
MBPP_PLUS_SUM = MBPP_PLUS | {
    "code": ADD.replace("add", "sum"),
    "test_list": ["assert sum(1, 2) == 3"],
    "test": MBPP_PLUS["test"].replace("add(", "sum("),
}
MBPP_PLUS_EMPTY = MBPP_PLUS | {
    "test": "def assertion(out, exp, atol):\n    exact = out == exp\n"
    + TABLES.format("")
    + "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(add(*inp), exp, 0)\n",
}
BIGCODEBENCH = {
    "task_id": "BigCodeBench/0",
    "complete_prompt": 'import math\ndef add(a, b):\n    """Sum."""\n',
    "instruct_prompt": "Sum.",
    "canonical_solution": "    return a + b",
    "code_prompt": "import math\ndef add(a, b):\n",
    "test": "import unittest\nclass TestCases(unittest.TestCase):\n"
    "    def test_a(self):\n        self.assertEqual(add(1, 1), 2)\n"
    "    def test_b(self):\n        self.assertEqual(add(1, 2), 3)\n",
    "entry_point": "add",
    "doc_struct": "{}",
    "libs": "['math']",
}
CLASS_EVAL = {
    "task_id": "ClassEval_0",
    "skeleton": 'class Adder:\n    def add(self, a, b):\n        """Sum."""\n',
    "solution_code": "class Adder:\n    def add(self, a, b):\n        return a + b + int(math.sin(0))\n",
    "import_statement": ["import math"],
    "class_name": "Adder",
    "test_classes": ["AdderTest"],
    "methods_info": [],
    "test": "import unittest\nclass AdderTest(unittest.TestCase):\n"
    "    def test_add_1(self):\n        self.assertEqual(Adder().add(1, 1), 2)\n"
    "    def test_add_2(self):\n        self.assertEqual(Adder().add(1, 2), 3)\n",
}
STARTER = "class Solution:\n    def addAll(self, nums: List[int], more: int) -> int:\n        "
METHOD = STARTER + "return sum(nums) + more\n"
LEETCODE = {
    "task_id": "add-all",
    "question_id": 1,
    "difficulty": "Easy",
    "problem_description": "Add all.",
    "starter_code": STARTER,
    "prompt": "from typing import *\nimport math\n",
    "completion": METHOD,
    "entry_point": "Solution().addAll",
    "test": "def check(candidate):\n"
    + "".join(f"    assert candidate(nums = [1, {n}],more = 0) == {n + 1}\n" for n in range(4)),
    "query": "",
    "response": "",
    "input_output": [{"input": "nums = [1, 0], more = 0", "output": "1"}],
}


def case(given: str, wanted: str, kind: str) -> dict[str, str]:
    return {"input": given, "output": wanted, "testtype": kind}


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(json.dumps(value).encode())).decode()


LCB_STDIN = {
    "question_title": "Sum",
    "question_content": "Print the sum.",
    "platform": "atcoder",
    "question_id": "abc1_a",
    "contest_id": "abc1",
    "contest_date": "2024-01-01T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([case("1 2\n", "3\n", "stdin")]),
    "private_test_cases": packed([case("1 1\n", "2\n", "stdin"), case("2 2\n", "4\n", "stdin")]),
    "metadata": "{}",
}
LCB_FUNCTIONAL = LCB_STDIN | {
    "question_id": "2000",
    "platform": "leetcode",
    "starter_code": STARTER,
    "public_test_cases": json.dumps([case("[1, 2]\n0", "3", "functional")]),
    "private_test_cases": json.dumps([case("[1, 2]\n4", "7", "functional"), case("[]\n-1", "-1", "functional")]),
    "metadata": json.dumps({"func_name": "addAll"}),
}
READS = "print(sum(map(int, input().split())))\n"
APPS = {
    "problem_id": 7,
    "question": "Print the sum.",
    "solutions": json.dumps(["print sum(map(int, raw_input().split()))", READS]),
    "input_output": json.dumps({"inputs": ["1 2\n", ["1 1"], "5 5\n"], "outputs": ["3\n", ["2"], "10\n"]}),
    "difficulty": "introductory",
    "url": "",
    "starter_code": "",
}
APPS_CALLS = APPS | {
    "problem_id": 8,
    "solutions": json.dumps([METHOD]),
    "input_output": json.dumps({"fn_name": "addAll", "inputs": [[[1, 2], 0], [[], 4]], "outputs": [[3], 4]}),
    "starter_code": STARTER,
}
TACO = {key: APPS[key] for key in ("question", "solutions", "input_output", "starter_code", "difficulty")} | {
    "raw_tags": "[]",
    "name": None,
    "source": "codeforces",
    "tags": "[]",
    "time_limit": "2 seconds",
}
DEEPCODER = {
    "problem": "Print the sum.",
    "tests": json.dumps([case("1 2", "3", "stdin"), case("1 1", "2", "stdin")]),
    "solutions": [f"```python\n{READS}```"],
}
CODE_CONTESTS = {
    "name": "1_A. Sum",
    "description": "Print the sum.",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["1 1\n"], "output": ["2\n"]},
    "generated_tests": {"input": ["2 2\n"], "output": ["4\n"]},
    "source": 2,
    "difficulty": 7,
    "solutions": {"language": [2, 1, 3], "solution": ["int main() {}", "print input()", READS]},
    "incorrect_solutions": {"language": [3], "solution": ["print(0)"]},
    "time_limit": {"seconds": 2, "nanos": 0},
}
EVALPLUS = {
    "task_id": "HumanEval/9",
    "prompt": "def add(a, b):\n",
    "contract": "",
    "canonical_solution": "    return a + b\n",
    "entry_point": "add",
    "base_input": [[1, 2], [0.1, 0.2]],
    "plus_input": [[[1], [2]]],
    "atol": 0,
}
# name: record, a right solution (None: the record's own), public and hidden tests
SAMPLES: dict[str, tuple[dict[str, Any], str | None, int, int]] = {
    "HumanEval+": (HUMANEVAL_PLUS, None, 2, 2),
    "EvalPlus' own file": (EVALPLUS, None, 1, 2),
    "MBPP full": (MBPP, None, 1, 2),
    "MBPP whose setup makes objects of the solution's": (MBPP_TREE, None, 1, 1),
    "MBPP sanitized": (SANITIZED, None, 1, 1),
    "MBPP+": (MBPP_PLUS, None, 2, 2),
    "MBPP+ of a function named like a builtin": (MBPP_PLUS_SUM, None, 2, 2),
    "MBPP+ whose script asserts nothing": (MBPP_PLUS_EMPTY, None, 1, 1),
    "BigCodeBench": (BIGCODEBENCH, None, 1, 1),
    "ClassEval": (CLASS_EVAL, None, 1, 1),
    "LeetCode": (LEETCODE, None, 2, 2),
    "LiveCodeBench stdin": (LCB_STDIN, READS, 1, 2),
    "LiveCodeBench functional": (LCB_FUNCTIONAL, METHOD, 1, 2),
    "APPS": (APPS, None, 1, 2),
    "APPS calls": (APPS_CALLS, None, 1, 1),
    "TACO": (TACO, None, 1, 2),
    "DeepCoder": (DEEPCODER, None, 1, 1),
    "CodeContests": (CODE_CONTESTS, None, 1, 2),
}


@pytest.mark.jail
@pytest.mark.parametrize("name", SAMPLES)
def test_the_right_solution_passes_and_none_that_returns_nothing(load: Load, judge: Judge, name: str) -> None:
    record, right, public_count, hidden_count = SAMPLES[name]
    [problem] = load(record)
    public, hidden = judge(problem, right or problem.solution or "")
    assert (public.tests, hidden.tests) == ((True,) * public_count, (True,) * hidden_count), (
        public.error or hidden.error
    )
    for wrong in (gives_nothing(problem), "", "raise SystemExit"):
        public, hidden = judge(problem, wrong)
        assert (public.tests, hidden.tests) == ((False,) * public_count, (False,) * hidden_count)


@pytest.mark.jail
def test_keys_that_were_numbers_are_numbers(load: Load, judge: Judge) -> None:
    calls = {"fn_name": "up", "inputs": [[{"1": 2}], [{"3": 4}]], "outputs": [[{"2": 2}], {"4": 4}]}
    up = "class Solution:\n    def up(self, given): return {key + 1: value for key, value in given.items()}"
    [problem] = load(APPS_CALLS | {"solutions": json.dumps([up]), "input_output": json.dumps(calls)})
    assert [outcome.pass_rate for outcome in judge(problem, up)] == [1.0, 1.0]
    texts = APPS_CALLS | {"input_output": json.dumps({**calls, "outputs": [{"a2": 2}, {"4": 4, "x": 1}]})}
    assert load(texts)[0].tests.asserts[1] == "assert same(Solution().up({3: 4}), {'4': 4, 'x': 1})"


@pytest.mark.jail
def test_what_a_problem_asks_for_is_not_among_what_it_gives(load: Load, judge: Judge) -> None:
    calls = {"fn_name": "gcd", "inputs": [[4, 6], [9, 6]], "outputs": [2, 3]}
    row = APPS_CALLS | {"solutions": "[]", "starter_code": "def gcd(a, b):", "input_output": json.dumps(calls)}
    [problem] = load(row)
    assert judge(problem, "def gcd(a, b):\n    return gcd(b, a % b) if b else a")[1].pass_rate == 1.0
    assert [outcome.pass_rate for outcome in judge(problem, "x = 1")] == [0.0, 0.0]
    [problem] = load(row | {"starter_code": "class Solution:\n    def gcd(self, a, b):"})
    assert judge(problem, "class Solution:\n    def gcd(self, a, b): return gcd(a, b)")[1].pass_rate == 1.0


@pytest.mark.jail
def test_a_list_as_long_as_the_input_that_shows_nothing_is_no_answer(load: Load, judge: Judge) -> None:
    calls = {"fn_name": "up", "inputs": [[[3, 1]], [[5, 2, 4]]], "outputs": [[1, 3], [2, 4, 5]]}
    up = "class Solution:\n    def up(self, xs): return tuple(sorted(xs))"
    [problem] = load(APPS_CALLS | {"solutions": json.dumps([up]), "input_output": json.dumps(calls)})
    assert judge(problem, up)[1].pass_rate == 1.0
    nothing = "class L(list): __iter__ = lambda self: iter(())\n" + up.replace("tuple(sorted(xs))", "L(xs)")
    assert [outcome.pass_rate for outcome in judge(problem, nothing)] == [0.0, 0.0]


@pytest.mark.jail
@pytest.mark.parametrize("numpy", [False, True])
def test_a_list_of_no_number_is_close_to_none(load: Load, judge: Judge, numpy: bool) -> None:
    """To numpy.allclose, which the tests of HumanEval+ and MBPP+ ask, an empty list is as close as any number."""
    inputs = "inputs = [[0.5, 1], [2, 0.5], [1, 0.25], [1, 1]]\nresults = [1.5, 2.5, 1.25, [1.0, 1.0]]\n"
    test = MBPP_PLUS["test"].replace(TABLES.format(""), inputs)
    [problem] = load(MBPP_PLUS | {"test": test, "code": "def add(a, b):\n    return a + b if a != b else [1.0, 1.0]\n"})
    tests = problem.tests
    assert isinstance(tests, AssertTests)
    assert [outcome.pass_rate for outcome in judge(problem, problem.solution or "")] == [1.0, 1.0]
    for wrong in ("[]", "()", "1.0", "[[]]", "[1.0]", "[1.5] * 2"):
        code = f"def add(a, b): return {wrong}"
        if numpy:
            pytest.importorskip("numpy")
            with BlockingSandboxPool(cells=1, preload=("numpy",)) as pool:
                assert not any(pool.run(code, tests=tests).tests)
        else:
            assert [outcome.pass_rate for outcome in judge(problem, code)] == [0.0, 0.0]


@pytest.mark.jail
@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("close", ["assert np.allclose", "np.testing.assert_allclose"])
def test_nothing_is_close_to_a_list_of_no_number(load: Load, judge: Judge, numpy: bool, close: str) -> None:
    """Of an empty list all are floats, so these tests ask numpy, to which any number is close to it."""
    tables = "inputs = [[[], []], [[], [3]]]\nresults = [[], [3]]\n"
    test = MBPP_PLUS["test"].replace(TABLES.format(""), tables).replace("assert np.allclose", close)
    [problem] = load(MBPP_PLUS | {"test": test})
    tests = problem.tests
    assert isinstance(tests, AssertTests)
    if numpy:
        pytest.importorskip("numpy")
    with BlockingSandboxPool(cells=1, preload=("numpy",) if numpy else ()) as pool:
        assert pool.run(problem.solution or "", tests=tests).pass_rate == 1.0
        for wrong in ("None", "0", "0.5", "{}", "[[]]", "''", "[1]", "object()"):
            outcome = pool.run(f"def add(a, b): return {wrong}", tests=tests)
            assert outcome.tests == (False, False), wrong


@pytest.mark.jail
def test_own_checks_that_broadcast_are_left_alone(load: Load, judge: Judge) -> None:
    near = "import numpy as np\ndef near(a, b):\n    assert np.allclose(a, b)\n"
    check = near + "def check(f):\n    near(f(1), 1)\n    near(f(2), 2)\n"
    [problem] = load(
        {"id": 1, "prompt": "x", "entry_point": "f", "solution": "def f(x): return [x, x]", "check": check}
    )
    assert [outcome.pass_rate for outcome in judge(problem, problem.solution or "")] == [1.0, 1.0]


@pytest.mark.jail
def test_what_must_raise_is_a_test_of_checks_too(load: Load, judge: Judge) -> None:
    """`assert False` was taken for an assertion that tests nothing, and a solution that raised nothing passed."""
    tried = "    try:\n        f(-1)\n        assert False\n    except ValueError:\n        assert True\n"
    check = f"def check(f):\n    assert f(1) == 2\n{tried}    assert f(2) == 3\n"
    right = "def f(x):\n    if x < 0: raise ValueError\n    return x + 1"
    [problem] = load({"id": 1, "prompt": "x", "entry_point": "f", "solution": right, "check": check})
    assert [outcome.tests for outcome in judge(problem, right)] == [(True,), (True, True)]
    for wrong in ("x + 1", "{}[x]"):
        code = f"def f(x): return {wrong} if x < 0 else x + 1"
        assert [outcome.tests for outcome in judge(problem, code)] == [(True,), (False, wrong == "x + 1")]


@pytest.mark.jail
def test_an_assertion_in_the_place_of_another_is_one_test_with_it(load: Load, judge: Judge) -> None:
    either = "    if isinstance(f(1), list):\n        assert f(1) == [2]\n    else:\n        assert f(1) == 2\n"
    check = f"def check(f):\n{either}    assert f(2)\n"
    right = "def f(x): return x + 1"
    [problem] = load({"id": 1, "prompt": "x", "entry_point": "f", "solution": right, "check": check})
    for code in (right, "def f(x): return [x + 1]"):
        assert [outcome.tests for outcome in judge(problem, code)] == [(True,), (True,)]
    assert [outcome.tests for outcome in judge(problem, "def f(x): return x + 2")] == [(False,), (True,)]


def gives_nothing(problem: Problem) -> str:
    if not problem.entry_point:
        return "print()"
    first, _, method = problem.entry_point.partition("().")
    inner = f"class {first}:\n    def {method or 'add'}(self, *_, **__): return None"
    return inner if first[0].isupper() else f"def {first}(*_): return None"


def test_helpers_and_tables_stay_with_the_tests_that_need_them(load: Load) -> None:
    [problem] = load(HUMANEVAL_PLUS)
    assert isinstance(problem.public_tests, AssertTests)
    assert problem.public_tests.asserts[0].startswith("assertion(add(1, 2), 3, 0)")
    assert "def assertion" in problem.public_tests.setup
    assert "inputs" not in problem.public_tests.setup


def test_contest_problems_bring_their_own_public_tests(load: Load) -> None:
    for record in (LCB_STDIN, CODE_CONTESTS):
        [problem] = load(record)
        assert problem.public_tests == StdioTests(cases=(("1 2\n", "3\n"),))
        assert len(problem.hidden_tests.cases) == 2
        assert "standard input" in problem.prompt


def test_mbpp_shows_the_objects_of_its_example(load: Load) -> None:
    [problem] = load(MBPP_TREE)
    assert problem.prompt.endswith("Example:\none = Leaf(1) \nfour = Leaf(4)\nassert add(one, four) == 5\n")


def test_records_without_an_id_are_named_by_their_place(load: Load) -> None:
    problems = load(TACO, TACO, APPS, DEEPCODER)
    assert [problem.id for problem in problems] == ["set/1", "set/2", "set/7", "set/4"]
    assert {problem.dataset for problem in problems} == {"set"}


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a pickle was opened')",))


@pytest.mark.parametrize("value", [Runs(), "[]", [1]])
def test_a_pickle_is_never_opened(load: Load, value: object) -> None:
    text = base64.b64encode(zlib.compress(pickle.dumps(value))).decode()
    with pytest.raises(UserError, match="private_test_cases in a pickle, which could run code"):
        load(LCB_STDIN | {"private_test_cases": text})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (LCB_STDIN | {"private_test_cases": "nonsense"}, "neither JSON nor base64 of zlib of JSON"),
        (LCB_STDIN | {"public_test_cases": "[]", "private_test_cases": "[]"}, "has no tests"),
        (LCB_FUNCTIONAL | {"public_test_cases": json.dumps([case("nope", "3", "functional")])}, "'nope' is not JSON"),
        (APPS | {"input_output": "{"}, "input_output that cannot be read"),
        (APPS | {"input_output": ""}, "input_output that cannot be read"),
        (APPS | {"input_output": json.dumps({"inputs": ["1"], "outputs": []})}, "has 1 inputs and 0 outputs"),
        (CODE_CONTESTS | {"public_tests": {"input": ["1"], "output": []}}, "has 1 inputs and 0 outputs"),
        (MBPP | {"test_list": []}, "has no tests"),
        (HUMANEVAL_PLUS | {"test": HELPER}, r"do not define check\(candidate\)"),
        ({"data_source": "x", "prompt": []}, "has the fields data_source, prompt, which are of no known data set"),
        ({"prompt": "x", "wanted": 1}, "rows for a reward function need its name as --reward"),
    ],
)
def test_a_wrong_record_is_one_clear_sentence(load: Load, record: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load(record)
    assert "set.jsonl:1: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_unpacks_without_end_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contests, "MOST_UNPACKED", 1000)
    packed_tests = base64.b64encode(zlib.compress(b" " * 10_000)).decode()
    with pytest.raises(UserError, match="has private_test_cases of more than 1000 bytes once unpacked"):
        load(LCB_STDIN | {"private_test_cases": packed_tests})


JUNK: tuple[Any, ...] = (
    None,
    "",
    -1.5,
    [[]],
    {"a": 1},
    "x\0y",
    "[[1, 2]]",
    "(" * 300,
    "-" * 30_000,
    "for i in [1]:\n    add(i)",
)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_spoilt_record_is_a_problem_or_a_users_error(load: Load, name: str) -> None:
    record = SAMPLES[name][0]
    for field in record:
        for value in JUNK:
            with contextlib.suppress(UserError):
                assert len(load(record | {field: value})) == 1
        with contextlib.suppress(UserError):
            load({key: value for key, value in record.items() if key != field})


@pytest.mark.jail
def test_the_rows_of_one_assertions_loop_are_tests(load: Load, judge: Judge) -> None:
    table = "    inputs = [[1, 2], [3, 4], [5, 6]]\n    for i, inp in enumerate(inputs):\n"
    check = f"def check(candidate):\n{table}        assert total(*inp, candidate(*inp)) == 0\n"
    record = HUMANEVAL_PLUS | {"test": f"def total(a, b, c):\n    return a + b - c\n{check}"}
    [problem] = load(record)
    public, hidden = judge(problem, ADD)
    assert (public.tests, hidden.tests) == ((True,), (True, True))
    assert judge(problem, "def add(a, b):\n    return 3")[1].tests == (False, False)
    [endless] = load(record | {"test": check.replace("enumerate(inputs)", "enumerate(iter(inputs))")})
    assert endless.shared_test
