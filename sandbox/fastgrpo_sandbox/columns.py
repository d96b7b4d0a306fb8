"""Tests in the forms that data sets of code have them, as AssertTests, CheckTests, UnittestTests or StdioTests."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args

import msgspec

from fastgrpo_sandbox.calls import arguments_and_results, call_tests
from fastgrpo_sandbox.counting import count_tests
from fastgrpo_sandbox.extract import DEFINITIONS, defined_names
from fastgrpo_sandbox.guest.guarded import Guarded
from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.paired import Paired
from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.printing import refuse_prints
from fastgrpo_sandbox.scripts import as_run, check_asks
from fastgrpo_sandbox.skipping import check_skips
from fastgrpo_sandbox.source_text import constants, is_empty, preamble, statement_text, with_stand_ins
from fastgrpo_sandbox.stdio import SILENT, wants_nothing
from fastgrpo_sandbox.types import AssertTests, CheckTests, NoTestError, StdioTests, Tests, UnittestTests
from fastgrpo_sandbox.unittest_source import unittest_names
from fastgrpo_sandbox.unrolling import check_tests, script_tests

# Tried in this order; the first that a row fills has its tests.
COLUMNS = (
    *("tests", "asserts", "test_list", "test", "unittest", "check", "stdio", "test_cases"),
    *("input_output", "verification_info", "ground_truth", "reward_model", "assert_case", "functional"),
    "official_tests",
)
SETUPS = ("setup", "test_setup_code", "test_imports")


def read_tests(row: Mapping[str, Any], code: str = "") -> Tests:
    """The tests in a row of a data set.

    Understood are a column of our own Tests (`tests`), assertions as a list or text (`asserts`, MBPP's `test_list`),
    HumanEval's `test` with `entry_point`, unittest classes (`test`, `unittest`), input and output pairs (`stdio`,
    `test_cases`, `official_tests`, `inputs` with `outputs`, also as JSON in `input_output`, `verification_info`,
    `ground_truth` or `reward_model`), and calls (`fn_name` beside `inputs`, `func_name` in `metadata`). `setup`,
    `test_setup_code` and `test_imports` are trusted code for the tests, and so is, for `check(candidate)`, what a
    `prompt` that is a program gives beside its `entry_point`. `code` is the solution, whose `class Solution` decides
    how `fn_name` is called.
    Raises ValueError with one sentence where there are none, or none that can be counted, NoTestError where any program
    would pass.
    """
    try:
        row = _without_arrays(row)
        tests = _read(row, row, code)
        if isinstance(tests, StdioTests) and wants_nothing(tests):
            raise NoTestError(SILENT)
        asserts = tests.asserts if isinstance(tests, AssertTests) else ()
        check_skips(tests)
        if count_tests(tests) > 0 and all(count_tests(CheckTests(text, "")) > 0 for text in asserts):
            return tests
    except (SyntaxError, IndexError, RecursionError) as error:
        raise ValueError(f"the tests cannot be counted: {error}") from None
    raise ValueError("the tests, or one of them, hold no assertion, unittest method or case: no solution could pass")


def _without_arrays(value: Any) -> Any:
    """`value` with lists in the place of numpy's arrays, which pandas makes of a parquet file's lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _without_arrays(item) for key, item in value.items()}
    return [_without_arrays(item) for item in value] if isinstance(value, list | tuple) else value


def _read(value: Any, row: Mapping[str, Any], code: str) -> Tests:
    """Any of the forms, by what it looks like; `row` has the columns beside it."""
    if isinstance(value, get_args(Tests)):
        return value
    if isinstance(value, str):
        return _read_text(value, row, code)
    if isinstance(value, Mapping):
        return _read_mapping(value, row, code)
    if isinstance(value, Sequence) and value:
        return _read_list(value, row, code)
    raise ValueError(f"tests of type {type(value).__name__} are not understood: give assertions, pairs or source")


def _read_text(text: str, row: Mapping[str, Any], code: str) -> Tests:
    text = text.removeprefix("\ufeff")  # as of a file
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _read_source(text, row)
    if isinstance(value, Mapping | list):
        return _read(value, row, code)
    raise ValueError("tests as text must be Python source or JSON of a list or an object")


def _read_mapping(value: Mapping[str, Any], row: Mapping[str, Any], code: str) -> Tests:
    if value is not row and value.get("type") in ("check", "assert", "unittest", "stdio"):
        try:
            return msgspec.convert(value, Tests)
        except msgspec.ValidationError as error:
            raise ValueError(f"the tests are malformed: {error}") from None
    for column in COLUMNS:
        if value.get(column) not in (None, "", [], (), {}):
            return _read(value[column], {**row, **value}, code)
    if "inputs" in value and "outputs" in value:
        return _paired(value["inputs"], value["outputs"], value.get("fn_name") or row.get("fn_name"), code)
    raise ValueError(f"no tests in {', '.join(map(repr, value)) or 'an empty row'}: give one of {', '.join(COLUMNS)}")


def _read_list(values: Sequence[Any], row: Mapping[str, Any], code: str) -> Tests:
    if all(isinstance(value, str) for value in values):
        return AssertTests(asserts=tuple(values), setup=_setup(row))
    if all(isinstance(value, Mapping) and {"input", "output"} <= value.keys() for value in values):
        named = (value.get("fn_name") or _func_name(value) for value in values)
        name = next(filter(None, named), None) or _func_name(row)
        if not name and any(value.get("testtype") == "functional" for value in values):
            raise ValueError("tests that are calls need the function's name, as fn_name or in metadata as func_name")
        return _paired([v["input"] for v in values], [v["output"] for v in values], name, code)
    if all(isinstance(value, Sequence) and len(value) == 2 for value in values):
        return _paired([pair[0] for pair in values], [pair[1] for pair in values], None, "")
    raise ValueError("a list of tests must hold assertions, [input, output] pairs or {input, output} objects")


def _func_name(value: Mapping[str, Any]) -> Any:
    """LiveCodeBench's name of the function, in a case's or a row's metadata, which may be JSON."""
    metadata = value.get("metadata")
    with suppress(ValueError, TypeError, RecursionError):
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    return metadata.get("func_name") if isinstance(metadata, Mapping) else None


def _read_source(source: str, row: Mapping[str, Any]) -> Tests:
    """Tests of one text, by the columns beside it."""
    entry_point, prompt = entry_point_of(row), row.get("prompt")
    return _script(source, _setup(row), entry_point, prompt if entry_point and isinstance(prompt, str) else "")


def entry_point_of(row: Mapping[str, Any]) -> str:
    """The name of the function or class that is tested; "" where the row has none. Raises ValueError."""
    name = row.get("entry_point")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"entry_point {name!r:.40} is not the name of a function")
    return name or ""


@memo
def _script(source: str, setup: str, entry_point: str, prompt: str) -> Tests:
    """unittest classes, `check(candidate)`, assertions, pytest's functions, or a script that must end without an
    error."""
    try:
        tree, names = parse(source), unittest_names(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the tests do not parse: {error}") from None
    refuse_prints(tree)
    if names:
        setup = "\n".join(filter(None, (setup, constants(prompt, source))))
        return UnittestTests(source=with_stand_ins(source, tree) if "pytest" in source else source, setup=setup)
    if entry_point and any(isinstance(node, DEFINITIONS) and node.name == "check" for node in tree.body):
        given = "\n".join(filter(None, (preamble(prompt, entry_point), setup)))
        return _counting(check_tests(source, entry_point, given), tree)
    script = as_run(source)
    if script.tests is not None:
        return msgspec.structs.replace(script.tests, setup="\n".join([setup, script.tests.setup]))
    if script.source != source:
        source, tree = script.source, parse(script.source)
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        check_asks(tree)
        return UnittestTests(source=_as_unittest(with_stand_ins(source, tree)), setup=setup)
    tests = script_tests(source)
    if tests is not None:
        return msgspec.structs.replace(tests, setup="\n".join([setup, tests.setup]))
    kinds = {type(node) for node in tree.body}
    if kinds <= {ast.Assert, ast.Import, ast.ImportFrom}:
        lines = [statement_text(node) for node in tree.body if not isinstance(node, ast.Assert)]
        asserts = tuple(ast.unparse(node) for node in tree.body if isinstance(node, ast.Assert))
        return AssertTests(asserts=asserts, setup="\n".join([setup, *lines]))
    return AssertTests(asserts=(with_stand_ins(source, tree),), setup=setup)


def _counting(tests: CheckTests | AssertTests, tree: ast.Module) -> CheckTests | AssertTests:
    """The `tests` of a `tree` without `assert True` and its like, with which a program that is none would pass some."""
    if isinstance(tests, AssertTests):
        return tests
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    asserts.sort(key=lambda node: (node.lineno, node.col_offset))
    kept = tuple(index for index, node in enumerate(asserts) if not is_empty(node))
    return tests if len(kept) in (0, len(asserts)) else msgspec.structs.replace(tests, select=kept)


def _as_unittest(source: str) -> str:
    """One test of a script without assertions: it runs in the solution's namespace and must not raise or exit."""
    tree = Guarded().visit(Paired(loops=True).visit(parse(source)))
    guarded = ast.unparse(ast.fix_missing_locations(tree))
    body = f"        exec(compile({guarded!r}, 'tests.py', 'exec'), globals())\n"
    return f"import unittest\nclass Script(unittest.TestCase):\n    def test_script(self):\n{body}"


def _paired(inputs: Any, outputs: Any, fn_name: Any, code: str) -> Tests:
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or len(inputs) != len(outputs):
        raise ValueError("inputs and outputs must be lists of one length")
    if fn_name:
        return _calls(fn_name, inputs, outputs, code)
    return StdioTests(
        cases=tuple((_lines(given), _lines(wanted)) for given, wanted in zip(inputs, outputs, strict=True))
    )


def _lines(value: Any) -> str:
    """APPS has some texts as lists of lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "\n".join(map(str, value))
    return str(value)


def _calls(fn_name: Any, inputs: Sequence[Any], outputs: Sequence[Any], code: str) -> AssertTests:
    """APPS' and LiveCodeBench's calls, of a method where the solution is LeetCode's `class Solution`."""
    if not (isinstance(fn_name, str) and fn_name.isidentifier()):
        raise ValueError(f"fn_name {fn_name!r:.40} is not the name of a function")
    names = defined_names(code) if "Solution" in code else ()
    target = f"Solution().{fn_name}" if "Solution" in names and fn_name not in names else fn_name
    try:
        return call_tests(target, [arguments_and_results(*pair) for pair in zip(inputs, outputs, strict=True)])
    except ValueError as error:
        raise ValueError(f"the row {error}") from None


def _setup(row: Mapping[str, Any]) -> str:
    parts = [row.get(column) or "" for column in SETUPS]
    if wrong := [column for column, part in zip(SETUPS, parts, strict=True) if not isinstance(part, str | Sequence)]:
        raise ValueError(f"{wrong[0]} must be source, or a list of lines")
    return "\n".join(part if isinstance(part, str) else "\n".join(map(str, part)) for part in parts if part)
