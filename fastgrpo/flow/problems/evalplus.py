"""EvalPlus' own files of HumanEval+ and MBPP+: inputs alone, in JSON; their outputs are the canonical solution's.

JSON has no tuples, sets or complex numbers. The record's own assertions have the first inputs in Python: each argument
is made of the types that it has there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from fastgrpo.flow.problems.tested import made
from fastgrpo.flow.types import Problem
from fastgrpo_sandbox import AssertTests
from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.source_text import preamble

_NUMBERS = frozenset({int, float, complex})


class EvalPlus(msgspec.Struct, frozen=True):
    """A record of either file."""

    task_id: str | int
    prompt: str
    entry_point: str
    canonical_solution: str
    base_input: list[list[Any]]
    plus_input: list[list[Any]] | dict[str, Any] = []  # {} where there are none
    atol: float = 0.0
    assertion: str = ""

    def problem(self, name: str) -> Problem:
        """The problem, tested beside its canonical solution, which only the judge holds."""
        solution = self.prompt + self.canonical_solution
        examples = [call.args for call in _calls(self.assertion or self.prompt, self.entry_point)]
        shapes = [_learnt(arguments) for arguments in zip(*_literal(examples), strict=False)]
        inputs = [
            [_typed(value, *shapes[place : place + 1]) for place, value in enumerate(given)]
            for given in _with_numbers([*self.base_input, *self.plus_input], len(self.base_input), shapes)
        ]
        setup = f"{_SAME}\nexpected = defined({solution!r}, {self.entry_point!r})\n"
        setup += preamble(self.prompt, self.entry_point) if self._asks_for_a_zero else ""
        around = _around(self.prompt, self.entry_point)
        asserts = tuple(self._assertion(", ".join(map(repr, given)), around) for given in inputs)
        return made(str(self.task_id), self.prompt, self.entry_point, solution, AssertTests(asserts, setup))

    @property
    def _asks_for_a_zero(self) -> bool:
        return self.entry_point == "find_zero" and "def poly(" in self.prompt

    def _assertion(self, given: str, around: str) -> str:
        """As EvalPlus compares: any zero of a polynomial, sets where the prompt's example does, or equal values.

        `around`: what both sides of the comparison are in, or nothing.
        """
        call, wanted = f"{self.entry_point}({given})", f"expected({given})"
        if self._asks_for_a_zero:
            return f"assert abs(poly({given}, {call})) <= {self.atol or 1e-4!r}"
        got, wanted = (f"{around}({each})" if around else each for each in (call, wanted))
        return f"assert same({got}, {wanted}, {self.atol!r})"


def _calls(source: str, name: str) -> list[ast.Call]:
    """Calls of a function in the order of the text; none where the text is not Python."""
    try:
        nodes = [node for statement in parse(source).body for node in ast.walk(statement)]
    except SyntaxError:
        return []
    return [node for node in nodes if isinstance(node, ast.Call) and _name(node) == name]


def _name(node: ast.AST | None) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _around(prompt: str, name: str) -> str:
    """What the example in a prompt has around the call of the function: `set`, `bool` for a bare call, or nothing."""
    for line in prompt.splitlines():
        if not line.startswith("assert ") or not _calls(line, name):
            continue
        test = parse(line).body[0].test  # type: ignore[attr-defined]
        if isinstance(test, ast.Compare):
            return "set" if _name(test.left) == "set" else ""
        inner = test.operand if isinstance(test, ast.UnaryOp) else test
        return "bool" if _name(inner) == name else ""
    return ""


def _literal(examples: Iterable[Sequence[ast.expr]]) -> list[list[Any]]:
    found = []
    for arguments in examples:
        try:
            found.append([ast.literal_eval(each) for each in arguments])
        except ValueError:
            continue  # an argument that is computed
    return found


class _Shape(msgspec.Struct):
    """The types of values at one place, and the shape of their items, or of a dict's values."""

    kinds: set[type]
    items: _Shape | None = None


def _learnt(values: Iterable[Any]) -> _Shape:
    shape = _Shape(set())
    inner: list[Any] = []
    for value in values:
        shape.kinds.add(type(value))
        if isinstance(value, dict):
            inner += value.values()
        elif isinstance(value, list | tuple | set):
            inner += value
    if inner:
        shape.items = _learnt(inner)
    return shape


def _typed(value: Any, shape: _Shape | None = None) -> Any:
    """A JSON value as what its place has; deeper than any example, as the place above."""
    if shape is None:
        return value
    items = shape.items or _Shape(set())
    if tuple in shape.kinds and not items.kinds & {list, tuple, set, dict}:
        items = _Shape(items.kinds | {tuple}, items.items)
    if isinstance(value, dict):
        return {key: _typed(each, items) for key, each in value.items()}
    if not isinstance(value, list):
        return value
    made = [_typed(each, items) for each in value]
    if list in shape.kinds:
        return made
    if set in shape.kinds:
        return set(made) if made else {}  # as EvalPlus reads it: no text of a set is an empty one
    return tuple(made) if tuple in shape.kinds else made


def _with_numbers(inputs: list[list[Any]], first: int, shapes: Sequence[_Shape]) -> list[list[Any]]:
    """The inputs, numbers read that are texts: where the assertion has numbers for the texts of the `first` inputs, or
    some text is of a complex one."""
    found = [list(given) for given in inputs]
    for place, shape in enumerate(shapes):
        texts = [given[place] for given in inputs if place < len(given) and isinstance(given[place], str)]
        is_told = any(isinstance(given[place], str) for given in inputs[:first]) or any("j" in text for text in texts)
        if shape.kinds <= _NUMBERS and is_told and all(_number(text) is not None for text in texts):
            for given in found:
                given[place] = _number(given[place]) if isinstance(given[place], str) else given[place]
    return found


def _number(text: str) -> float | complex | None:
    for kind in (float, complex):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


_SAME = """
import cmath, math
from math import inf, nan

def defined(source, name):
    names = {"__name__": "expected"}
    exec(source, names)
    return names[name]

def same(got, wanted, room):
    if got == wanted or wanted != wanted and isinstance(got, type(wanted)) and cmath.isnan(got):
        return True
    each = wanted if isinstance(wanted, (list, tuple)) and wanted else [wanted]
    room = room or all(isinstance(item, float) for item in each) and 1e-6
    return bool(room) and type(got) is type(wanted) and close(got, wanted, room)

def close(got, wanted, room):
    for kind in (list, tuple):
        if isinstance(wanted, kind):
            return isinstance(got, kind) and len(got) == len(wanted) and all(map(close, got, wanted, [room] * len(got)))
    return isinstance(wanted, (int, float)) and math.isclose(got, wanted, rel_tol=1e-7, abs_tol=room)
"""
