"""Contest sets: programs that read and write text, or functions called with JSON: LiveCodeBench, APPS, TACO and others.

A record's `problem(name)` is as in `formats`. Of several known solutions the first that is Python 3 is taken, if any.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from fastgrpo.flow.problems.tested import made
from fastgrpo.flow.types import Problem
from fastgrpo_sandbox import StdioTests, Tests
from fastgrpo_sandbox.calls import arguments_and_results, call_tests, imports_for, json_lines, json_value
from fastgrpo_sandbox.guest.syntax import parse

MOST_UNPACKED = 1 << 30  # bytes of one field
_PYTHON3 = (3, "PYTHON3")
_READS_AND_WRITES = "Read the input from standard input and write the answer to standard output."


class Case(msgspec.Struct, frozen=True):
    """One of LiveCodeBench's tests: `input` is what is read, or one JSON argument a line."""

    input: str
    output: str
    testtype: str = "stdin"


class Pairs(msgspec.Struct, frozen=True):
    """APPS' tests: inputs and outputs in pairs; with `fn_name`, arguments and results."""

    inputs: list[Any]
    outputs: list[Any]
    fn_name: str = ""


class LiveCodeBench(msgspec.Struct, frozen=True):
    """livecodebench/code_generation(_lite): no solutions, public and private tests, of stdin or functional type."""

    question_id: str | int
    question_content: str
    public_test_cases: str | list[Case]
    private_test_cases: str | list[Case] = "[]"
    starter_code: str = ""
    metadata: str | dict[str, Any] = "{}"

    def problem(self, name: str) -> Problem:
        """The problem; private tests are read where they are JSON, compressed or not."""
        public = _decoded(self.public_test_cases, list[Case], "public_test_cases")
        cases = public + _decoded(self.private_test_cases, list[Case], "private_test_cases")
        function = str(_decoded(self.metadata, dict[str, Any], "metadata").get("func_name") or "")
        if any(case.testtype == "functional" for case in cases):
            entry_point = _method(function, self.starter_code)
            given = imports_for(entry_point)
            tests: Tests = call_tests(entry_point, [(json_lines(c.input), [json_value(c.output)]) for c in cases])
        else:
            entry_point, given, tests = "", "", StdioTests(cases=tuple((case.input, case.output) for case in cases))
        prompt = _prompt(self.question_content, self.starter_code, tests)
        problem = made(str(self.question_id), prompt, entry_point, "", tests, _public(len(public), len(cases)))
        return replace(problem, given=given)


class Apps(msgspec.Struct, frozen=True):
    """codeparrot/apps and BAAI/TACO."""

    question: str
    input_output: str | Pairs
    solutions: str | list[str] = "[]"
    starter_code: str = ""
    problem_id: str | int = ""

    def problem(self, name: str) -> Problem:
        """The problem, its first solution that is Python 3, and every third test public."""
        pairs = _decoded(self.input_output or "{}", Pairs, "input_output")
        solution = _python3(_decoded(self.solutions or "[]", list[str], "solutions"))
        id = name if self.problem_id == "" else f"{name.rpartition('/')[0]}/{self.problem_id}"
        return _of_pairs(id, self.question, self.starter_code, solution, pairs)


class DeepCoder(msgspec.Struct, frozen=True):
    """agentica-org/DeepCoder-Preview-Dataset: cases as LiveCodeBench's or pairs as APPS'."""

    problem_: str = msgspec.field(name="problem")
    tests: str | list[Any] | dict[str, Any]
    solutions: list[str] = []
    starter_code: str = ""

    def problem(self, name: str) -> Problem:
        """The problem, its first solution that is Python 3, and every third test public."""
        tests = _decoded(self.tests, Pairs | list[Case], "tests")
        solution = _python3(map(_unfenced, self.solutions))
        if isinstance(tests, Pairs):
            return _of_pairs(name, self.problem_, self.starter_code, solution, tests)
        cases = StdioTests(cases=tuple((case.input, case.output) for case in tests))
        return made(name, _prompt(self.problem_, "", cases), "", solution, cases)


class Texts(msgspec.Struct, frozen=True):
    """One part of CodeContests' tests."""

    input: list[str] = []
    output: list[str] = []


class Programs(msgspec.Struct, frozen=True):
    """CodeContests' solutions, with the numbers (or names) of their languages."""

    language: list[int | str] = []
    solution: list[str] = []


class CodeContests(msgspec.Struct, frozen=True):
    """deepmind/code_contests: tests in three parts, solutions in several languages."""

    name: str
    description: str
    public_tests: Texts
    private_tests: Texts = Texts()
    generated_tests: Texts = Texts()
    solutions: Programs = Programs()

    def problem(self, name: str) -> Problem:
        """The problem; private and generated tests are hidden."""
        parts = (self.public_tests, self.private_tests, self.generated_tests)
        for part in parts:
            _check_pairs(part.input, part.output)
        cases = tuple(case for part in parts for case in zip(part.input, part.output, strict=True))
        known = zip(self.solutions.language, self.solutions.solution, strict=False)
        solution = _python3(text for language, text in known if language in _PYTHON3)
        tests = StdioTests(cases=cases)
        public = _public(len(self.public_tests.input), len(cases))
        return made(self.name, _prompt(self.description, "", tests), "", solution, tests, public)


def _of_pairs(id: str, question: str, starter_code: str, solution: str, pairs: Pairs) -> Problem:
    _check_pairs(pairs.inputs, pairs.outputs)
    if pairs.fn_name:
        entry_point = _method(pairs.fn_name, starter_code or solution)
        given = imports_for(entry_point)
        cases = zip(pairs.inputs, pairs.outputs, strict=True)
        tests: Tests = call_tests(entry_point, [arguments_and_results(*case) for case in cases])
    else:
        entry_point, given = "", ""
        tests = StdioTests(tuple((_text(i), _text(o)) for i, o in zip(pairs.inputs, pairs.outputs, strict=True)))
    return replace(made(id, _prompt(question, starter_code, tests), entry_point, solution, tests), given=given)


def _check_pairs(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    if len(inputs) != len(outputs):
        raise ValueError(f"has {len(inputs)} inputs and {len(outputs)} outputs: they are to be pairs")


def _method(function: str, code: str) -> str:
    """The expression for a function, or for that method of LeetCode's `class Solution`."""
    return f"Solution().{function}" if "class Solution" in code else function


def _prompt(question: str, starter_code: str, tests: Tests) -> str:
    ending = _READS_AND_WRITES if isinstance(tests, StdioTests) else ""
    return "\n\n".join(text.strip("\n") for text in (question, ending, starter_code) if text.strip()) + "\n"


def _public(public: int, count: int) -> range | None:
    """The data set's own public tests, where it has some."""
    return range(public) if 0 < public <= count else None


def _python3(programs: Iterable[str]) -> str:
    for program in programs:
        try:
            parse(program)
        except (SyntaxError, ValueError):
            continue
        return program
    return ""


def _unfenced(text: str) -> str:
    lines = text.strip().splitlines()
    return "\n".join(lines[1:-1]) if len(lines) > 1 and lines[0].startswith("```") else text


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _decoded(value: Any, form: Any, field: str) -> Any:
    """A field that is JSON, or JSON as text, or that text in base64 of zlib; never a pickle, which could run code."""
    try:
        if not isinstance(value, str):
            return msgspec.convert(value, form)
        text = value.strip()
        return msgspec.json.decode(_unpacked(text, field) if text[:1] not in ("[", "{") else text, type=form)
    except msgspec.MsgspecError as error:
        raise ValueError(f"has {field} that cannot be read: {error}") from None


def _unpacked(text: str, field: str) -> bytes:
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(base64.b64decode(text, validate=True), MOST_UNPACKED)
        if not (unpacking.eof or unpacking.unconsumed_tail):
            raise zlib.error("truncated")
    except (binascii.Error, zlib.error, ValueError):
        raise ValueError(f"has {field} that are neither JSON nor base64 of zlib of JSON") from None
    if not unpacking.eof:
        raise ValueError(f"has {field} of more than {MOST_UNPACKED} bytes once unpacked: leave the line out")
    if content[:1] == b"\x80":
        raise ValueError(
            f"has {field} in a pickle, which could run code of its author's when it is opened: where you trust its "
            "source, open it yourself and write the tests as a list of JSON objects"
        )
    return content
