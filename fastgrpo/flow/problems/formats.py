"""Data sets that are one function or class with its tests: HumanEval(+), MBPP(+), BigCodeBench, ClassEval, your own.

Fields are named as the data sets name them. A record's `problem(name)` raises ValueError (its text goes on from "the
problem ...") or SyntaxError; `name` is its id where it has none of its own.
"""

from __future__ import annotations

import ast
import re

import msgspec
from msgspec.structs import replace

from fastgrpo.flow.problems.tested import bound, made
from fastgrpo.flow.types import NO_TESTS, Problem
from fastgrpo_sandbox import AssertTests, StdioTests, Tests, UnittestTests
from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.source_text import TO_THE_END, constants, preamble
from fastgrpo_sandbox.unrolling import check_tests, one_by_one


class OwnProblem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of your own JSONL: exactly one of `asserts`, `check`, `unittest`, `stdio` carries the tests.

    `asserts`: assert statements that call `entry_point`; `check`: source that defines `check(candidate)`; `unittest`:
    source with TestCase classes; `stdio`: [input, expected output] pairs. `setup`: trusted code that the tests use.
    `judged` true is a problem without tests, which a judge model scores (`reward.judge`).
    `entry_point` is a function, a class or, as in `Solution().add`, a method; a stdio problem needs none. `solution`, a
    complete program, may be left out: the problem is then not tried at load, and is no use to simulated workers.
    """

    id: str | int
    prompt: str
    entry_point: str = ""
    solution: str = ""
    asserts: list[str] = []
    check: str = ""
    unittest: str = ""
    stdio: list[tuple[str, str]] = []
    setup: str = ""
    judged: bool = False

    def problem(self, name: str) -> Problem:
        """The problem in the engine's form."""
        if not self.judged:
            return made(str(self.id), self.prompt, self.entry_point, self.solution, self._tests())
        if any(self._given()):
            raise ValueError("has tests, and is to be judged: leave out either")
        return Problem(
            id=str(self.id),
            prompt=self.prompt,
            entry_point=self.entry_point,
            solution=self.solution or None,
            public_tests=NO_TESTS,
            hidden_tests=NO_TESTS,
        )

    def _given(self) -> tuple[object, ...]:
        return self.asserts, self.check, self.unittest, self.stdio

    def _tests(self) -> Tests:
        if sum(map(bool, self._given())) != 1:
            raise ValueError("has no tests, or of several kinds: give exactly one of asserts, check, unittest or stdio")
        if self.asserts:
            return AssertTests(asserts=tuple(map(_asserting, self.asserts)), setup=self.setup)
        if self.check:
            return checked(self.check, self.entry_point, self.setup)
        if self.unittest:
            return UnittestTests(source=self.unittest, setup=self.setup)
        return StdioTests(cases=tuple(self.stdio))


class HumanEval(msgspec.Struct, frozen=True):
    """openai/human-eval and evalplus/humanevalplus; also other sets of this form."""

    task_id: str | int
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    def problem(self, name: str) -> Problem:
        """The problem; what the prompt gives before the entry point is the tests' too."""
        tests = checked(self.test, self.entry_point, preamble(self.prompt, self.entry_point))
        return made(str(self.task_id), self.prompt, self.entry_point, self.prompt + self.canonical_solution, tests)


class Mbpp(msgspec.Struct, frozen=True):
    """MBPP as Google gives it (`text`), sanitized (`prompt`), and evalplus/mbppplus (`test`, a script)."""

    task_id: str | int
    code: str
    test_list: list[str]
    text: str = ""
    prompt: str = ""
    test_imports: list[str] = []
    test_setup_code: str = ""
    test: str = ""

    def problem(self, name: str) -> Problem:
        """The sentence alone does not say what to call the function: the first (public) test, with the objects that it
        needs, is its example."""
        if not self.test_list:
            raise ValueError("has no tests: its test_list is empty")
        defined = list(bound(parse(self.code)))
        called = {node.id for node in ast.walk(parse(self.test_list[0])) if isinstance(node, ast.Name)}
        entry_point = next((name for name in defined if name in called), defined[-1] if defined else "")
        example = "\n".join([*self.test_setup_code.splitlines(), self.test_list[0]]).strip("\n")
        prompt = f"{self.prompt or self.text}\n\nExample:\n{example}\n"
        return made(f"MBPP/{self.task_id}", prompt, entry_point, self.code, self._tests(entry_point))

    def _tests(self, entry_point: str) -> Tests:
        tree = parse(self.test)
        # Some scripts of MBPP+ compare, and assert nothing of it.
        if re.search(rf"\b{re.escape(entry_point)}\b", self.test) and any(map(_asserts, ast.walk(tree))):
            return one_by_one(self.test, tree, "")
        setup = "\n".join([*self.test_imports, self.test_setup_code])
        return AssertTests(asserts=tuple(self.test_list), setup=setup.strip("\n"))


def _asserts(node: ast.AST) -> bool:
    """Whether something fails here: an assertion, an exception, or what numpy.testing calls so."""
    called = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
    return isinstance(node, ast.Assert | ast.Raise) or called.startswith("assert_")


class BigCodeBench(msgspec.Struct, frozen=True):
    """bigcode/bigcodebench, its complete form."""

    task_id: str
    complete_prompt: str
    canonical_solution: str
    entry_point: str
    test: str

    def problem(self, name: str) -> Problem:
        """The problem in the engine's form."""
        solution = self.complete_prompt + self.canonical_solution
        tests = UnittestTests(source=self.test, setup=constants(self.complete_prompt, self.test))
        return made(self.task_id, self.complete_prompt, self.entry_point, solution, tests)


class ClassEval(msgspec.Struct, frozen=True):
    """FudanSELab/ClassEval: a whole class to write."""

    task_id: str
    skeleton: str
    solution_code: str
    test: str
    class_name: str
    import_statement: list[str] | str = ""

    def problem(self, name: str) -> Problem:
        """The problem in the engine's form."""
        imports = self.import_statement if isinstance(self.import_statement, str) else "\n".join(self.import_statement)
        solution = f"{imports}\n{self.solution_code}"
        return made(self.task_id, self.skeleton, self.class_name, solution, UnittestTests(source=self.test))


class LeetCode(msgspec.Struct, frozen=True):
    """newfacade/LeetCodeDataset: `class Solution`, with `check(candidate)` for one of its methods."""

    task_id: str | int
    entry_point: str
    completion: str
    test: str
    prompt: str = ""
    problem_description: str = ""
    starter_code: str = ""

    def problem(self, name: str) -> Problem:
        """The problem; what LeetCode imports for everyone (`prompt`) is the tests' and every solution's."""
        prompt = f"{self.prompt}\n{self.problem_description}\n\n{self.starter_code}".strip()
        tests = checked(self.test, self.entry_point, self.prompt)
        problem = made(str(self.task_id), prompt, self.entry_point, self.completion, tests)
        return replace(problem, given=self.prompt)


def checked(source: str, entry_point: str, setup: str) -> Tests:
    """Tests of the form `check(candidate)`."""
    if "check" not in bound(parse(source)):
        raise ValueError("has tests that do not define check(candidate)")
    return check_tests(source, entry_point, setup)


def _asserting(text: str) -> str:
    """One entry of `asserts`; one that expects an exception, as `with raises(...)`, is passed by running to its end."""
    nodes = list(ast.walk(parse(text)))
    if any(isinstance(node, ast.Assert) for node in nodes):
        return text
    if any(isinstance(node, ast.With | ast.AsyncWith) for node in nodes):
        return text + TO_THE_END
    raise ValueError("has an entry of asserts without an assert statement: no solution passes it")
