"""Problems in: formats, splits of tests, difficulty, held-out split, and what a user reads when a file is wrong."""

from __future__ import annotations

import ast
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.errors import UserError
from fastgrpo.flow.problems.files import load
from fastgrpo.flow.problems.splitting import describe_tests, split
from fastgrpo.flow.problems.tested import made
from fastgrpo.flow.types import Problem
from fastgrpo_sandbox import AssertTests, CheckTests, StdioTests, Tests, UnittestTests, count_tests
from fastgrpo_sandbox.source_text import preamble

OWN = {
    "id": "add",
    "prompt": "Add two numbers.",
    "entry_point": "add",
    "solution": "def add(a, b):\n    return a + b\n",
    "asserts": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
}


@pytest.fixture(scope="module")
def humaneval() -> list[Problem]:
    return load("humaneval")


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_humaneval_has_164_problems_with_public_and_hidden_tests(humaneval: list[Problem]) -> None:
    assert len(humaneval) == 164
    for problem in humaneval:
        assert count_tests(problem.public_tests) >= 1
        assert count_tests(problem.hidden_tests) >= 1
        assert problem.entry_point in problem.solution
        assert problem.hidden_tests.entry_point == problem.entry_point


def test_public_tests_reveal_no_hidden_assertion(humaneval: list[Problem]) -> None:
    for problem in humaneval:
        public, hidden = describe_tests(problem.public_tests), describe_tests(problem.hidden_tests)
        assert len(public) == count_tests(problem.public_tests)
        assert len(hidden) == count_tests(problem.hidden_tests)
        if len(hidden) > 1:
            assert not any(text in problem.public_tests.source for text in set(hidden) - set(public))


def split_tests(tests: Tests) -> tuple[Any, Any]:
    problem = made("p", "Write f.", "f", "", tests)
    return problem.public_tests, problem.hidden_tests


def test_assertions_that_test_nothing_are_dropped() -> None:
    source = "def check(candidate):\n    assert True, 'x'\n    for i in range(3):\n        assert candidate(i) == i\n"
    public, hidden = split_tests(CheckTests(source=source, entry_point="f"))
    assert count_tests(public) == count_tests(hidden) == 1
    assert "assert True" not in hidden.source


@settings(deadline=None)
@given(st.integers(1, 40))
def test_every_test_is_public_or_hidden(count: int) -> None:
    asserts = tuple(f"assert f({index})" for index in range(count))
    public, hidden = split_tests(AssertTests(asserts=asserts))
    assert set(public.asserts) | set(hidden.asserts) == set(asserts)
    assert public.asserts
    assert hidden.asserts
    assert not set(public.asserts) & set(hidden.asserts) or count == 1


def test_unittest_methods_are_split_and_helpers_kept() -> None:
    methods = "".join(f"    def test_{name}(self):\n        assert helper()\n" for name in "abc")
    source = f"import unittest\nclass T(unittest.TestCase):\n    def setUp(self):\n        self.x = 1\n{methods}"
    public, hidden = split_tests(UnittestTests(source=source))
    assert (count_tests(public), count_tests(hidden)) == (1, 2)
    assert "setUp" in public.source
    assert "setUp" in hidden.source
    assert "test_b" not in public.source


def test_preamble_is_imports_and_helpers_only(humaneval: list[Problem]) -> None:
    poly = next(problem for problem in humaneval if problem.id == "HumanEval/32")
    given_code = preamble(poly.prompt, poly.entry_point)
    assert "def poly" in given_code
    assert "def find_zero" not in given_code
    assert preamble("Write a function to add numbers.", "add") == ""


def test_difficulty_is_a_rank_that_prompts_foretell(humaneval: list[Problem]) -> None:
    difficulty = np.array([problem.difficulty for problem in humaneval])
    words = np.array([len(problem.prompt.split()) for problem in humaneval])
    nodes = np.array([sum(1 for _ in ast.walk(ast.parse(problem.solution))) for problem in humaneval])
    assert difficulty.min() == 0.0
    assert difficulty.max() == 1.0
    assert spearman(difficulty, words) > 0.85
    assert spearman(difficulty, nodes) > 0.7


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_one_problem_alone_is_of_middle_difficulty(tmp_path: Path) -> None:
    [problem] = load(str(write(tmp_path / "own.jsonl", OWN)))
    assert problem.difficulty == 0.5


@pytest.mark.parametrize("held_out", [0, 1, 44, 120])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_a_stratified_partition(humaneval: list[Problem], held_out: int, seed: int) -> None:
    train, test = split(humaneval, held_out, seed)
    assert len(test) == held_out
    assert sorted(problem.id for problem in train + test) == sorted(problem.id for problem in humaneval)
    assert (train, test) == split(humaneval, held_out, seed)
    if held_out >= 44:
        assert abs(np.mean([problem.difficulty for problem in test]) - 0.5) < 0.05
        assert test != split(humaneval, held_out, seed + 7)[1]


def test_split_needs_something_to_train_on(humaneval: list[Problem]) -> None:
    with pytest.raises(UserError, match=r"data\.held_out = 164 leaves none"):
        split(humaneval, 164, 0)


def test_mbpp_names_its_function_by_a_public_example(tmp_path: Path) -> None:
    record = {
        "task_id": 2,
        "prompt": "Write a function to add.",
        "code": "def helper():\n    pass\ndef add(a, b):\n    return a + b",
        "test_imports": ["import math"],
        "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"],
    }
    path = tmp_path / "mbpp.json"
    path.write_text(json.dumps([record]))
    [problem] = load(str(path))
    assert problem.id == "MBPP/2"
    assert problem.entry_point == "add"
    assert "assert add(1, 2) == 3" in problem.prompt
    assert "assert add(2, 2) == 4" not in problem.prompt
    assert problem.hidden_tests == AssertTests(asserts=("assert add(2, 2) == 4",), setup="import math")


def test_bigcodebench_line(tmp_path: Path) -> None:
    record = {
        "task_id": "BigCodeBench/0",
        "complete_prompt": 'def f():\n    """One."""\n',
        "canonical_solution": "    return 1",
        "entry_point": "f",
        "test": "import unittest\nclass T(unittest.TestCase):\n  def test_a(self):\n    self.assertEqual(f(), 1)\n",
        "libs": [],
    }
    path = tmp_path / "bcb.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    [problem] = load(str(path))
    assert problem.solution.endswith("return 1")
    assert isinstance(problem.hidden_tests, UnittestTests)


def test_own_problems_of_every_kind(tmp_path: Path) -> None:
    base = {key: value for key, value in OWN.items() if key not in ("asserts", "id")}
    records = [
        OWN,
        base | {"id": "b", "check": "def check(candidate):\n    assert candidate(1, 1) == 2\n"},
        base | {"id": "c", "stdio": [["1 2", "3"], ["3 4", "7"]]},
    ]
    problems = load(str(write(tmp_path / "own.jsonl", *records)))
    assert [type(problem.hidden_tests) for problem in problems] == [AssertTests, CheckTests, StdioTests]
    assert problems[2].hidden_tests == StdioTests(cases=(("3 4", "7"),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no problems"),
        ("{", r"own.jsonl:1: not a problem: .*truncated"),
        (json.dumps(OWN) + "\n\nnonsense", r"own.jsonl:3: not a problem"),
        (json.dumps(OWN) + "\n" + json.dumps(OWN), r"own.jsonl:2: id 'add' is that of line 1"),
        (json.dumps(OWN | {"asserts": []}), r"own.jsonl:1: the problem has no tests"),
        (
            json.dumps(OWN | {"check": "x"}),
            r"own.jsonl:1: the problem has no tests, or of several kinds: give exactly one",
        ),
        (json.dumps(OWN | {"solution": "def"}), r"own.jsonl:1: its code is not Python"),
        (json.dumps(OWN | {"asserts": ["assert add("]}), r"own.jsonl:1: its code is not Python"),
        (json.dumps(OWN | {"entry_point": "plus"}), r"own.jsonl:1: .*entry_point 'plus', which its solution does not"),
        (json.dumps(OWN | {"asserts": [], "check": "assert add(1, 1)"}), r"own.jsonl:1: .*do not define check"),
        (json.dumps(OWN | {"asserts": ["add(1, 2) == 3"]}), r"own.jsonl:1: .*entry of asserts without an assert"),
        (
            json.dumps(OWN | {"asserts": [], "stdio": [["1", "1"]], "solution": "def"}),
            r"own.jsonl:1: its code is not P",
        ),
        (json.dumps(OWN | {"colour": 1}), r"own.jsonl:1: .*unknown field `colour`"),
        (json.dumps(OWN | {"prompt": 3}), r"own.jsonl:1: .*Expected `str`.*prompt"),
        (json.dumps(OWN | {"solution": "-" * 30_000 + "1"}), r"own.jsonl:1: its code is not Python: nested too deeply"),
        (
            json.dumps(OWN | {"solution": "x" + ".a" * 30_000}),
            r"own.jsonl:1: its code is not Python: nested too deeply",
        ),
        (
            json.dumps(OWN | {"entry_point": "-" * 30_000}),
            r"own.jsonl:1: the problem has entry_point '-{370,400} \.\.\.$",
        ),
        (json.dumps({"a\n\nb": 1}), r"own.jsonl:1: the problem has the fields a b, which"),
        (json.dumps(OWN | {"prompt": "\ud800", "id": float("nan")}), r"own.jsonl:1: .*half a character"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_sentence() -> None:
    with pytest.raises(UserError, match=r"cannot read problems from /nowhere\.jsonl: No such file"):
        load("/nowhere.jsonl")


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.sampled_from([".json", ".jsonl", ".jsonl.gz"]))
def test_any_file_is_problems_or_a_users_error(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") and len(content) % 2 else content)
        with pytest.raises(UserError) as caught:
            load(str(path))
    assert str(path) in str(caught.value)
