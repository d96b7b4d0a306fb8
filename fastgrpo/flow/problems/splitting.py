"""Tests into a public and a hidden part, problems into a training and a held-out one."""

from __future__ import annotations

import ast
import random
from collections.abc import Collection, Sequence
from itertools import pairwise

from msgspec.structs import replace

from fastgrpo.errors import UserError
from fastgrpo.flow.types import Problem
from fastgrpo_sandbox import AssertTests, CheckTests, StdioTests, Tests
from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.source_text import TO_THE_END, is_empty
from fastgrpo_sandbox.unittest_source import TEST_BASES


def part(tests: Tests, keep: Collection[int]) -> Tests:
    """The tests with the given indices, and what they share."""
    if isinstance(tests, AssertTests):
        return replace(tests, asserts=tuple(tests.asserts[index] for index in sorted(keep)))
    if isinstance(tests, StdioTests):
        return replace(tests, cases=tuple(tests.cases[index] for index in sorted(keep)))
    tree = parse(tests.source)
    counted = _asserts(tree) if isinstance(tests, CheckTests) else _methods(tree)
    unwanted = [node for index, node in enumerate(counted) if index not in keep]
    if isinstance(tests, CheckTests):
        unwanted += [node for node in ast.walk(tree) if isinstance(node, ast.Assert) and is_empty(node)]
    return replace(tests, source=ast.unparse(_Without(unwanted).visit(tree)))


class _Without(ast.NodeTransformer):
    """Puts `pass` in the place of the given statements."""

    def __init__(self, unwanted: Sequence[ast.AST]) -> None:
        self._unwanted = {id(node) for node in unwanted}

    def visit(self, node: ast.AST) -> ast.AST:
        """The node, its children without the unwanted ones."""
        return ast.Pass() if id(node) in self._unwanted else self.generic_visit(node)


def _asserts(tree: ast.Module) -> list[ast.stmt]:
    """Assertions that test something, in the order of the text."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Assert) and not is_empty(node)]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _methods(tree: ast.Module) -> list[ast.stmt]:
    """Test methods of unittest classes, in the order of the text."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    cases = [node for node in classes if any(ast.unparse(base).split(".")[-1] in TEST_BASES for base in node.bases)]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [item for case in cases for item in case.body if isinstance(item, kinds) and item.name.startswith("test")]


@memo
def describe_tests(tests: Tests) -> tuple[str, ...]:
    """One text for each test, in the order of `Outcome.tests`: what feedback shows of a failed public test.

    Raises SyntaxError for tests that are not Python.
    """
    if isinstance(tests, AssertTests):
        for text in tests.asserts:
            parse(text)
        return tuple(text.removesuffix(TO_THE_END) for text in tests.asserts)
    if isinstance(tests, StdioTests):
        return tuple(f"input {given!r} must print {wanted!r}" for given, wanted in tests.cases)
    tree = parse(tests.source)
    return tuple(ast.unparse(node) for node in (_asserts(tree) if isinstance(tests, CheckTests) else _methods(tree)))


def split(problems: Sequence[Problem], held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
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
