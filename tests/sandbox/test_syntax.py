"""Source into trees while garbage that parses is collected in the middle (CPython gh-106905)."""

import ast
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastgrpo_sandbox.guest.asserts import compile_asserts
from fastgrpo_sandbox.guest.syntax import Transformer, parse, parse_expression, walk

SOURCE = "\n".join(f"def f{i}(a, b):\n    return [x for x in range(a) if x % {i + 1} == b]" for i in range(60))


class Parsing:
    """Garbage in a cycle whose finalizer parses."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        ast.parse("a = 1\nb = 2")


def test_a_collection_in_the_middle_is_no_error() -> None:
    thresholds = gc.get_threshold()
    gc.set_threshold(1000, 1, 1)
    try:
        for _ in range(50):
            Parsing()
            assert len(parse(SOURCE).body) == 60
    finally:
        gc.set_threshold(*thresholds)


def test_errors_are_those_of_the_source() -> None:
    with pytest.raises(SyntaxError):
        parse("def f(:")


def test_an_expression_is_one_and_nothing_else() -> None:
    assert ast.unparse(parse_expression(" f(1)[2]")) == "f(1)[2]"
    for source in ("", "x = 1", "f\ng", "import os", "(", "-" * 30_000 + "1"):
        with pytest.raises(SyntaxError):
            parse_expression(source)


def test_tables_of_constants_are_passed_over_and_nothing_else_is() -> None:
    """A host compiles the tests of all: a table of 100,000 numbers took it seconds."""
    table = f"assert f([[{'1, ' * 100_000}], [1, f(2), [x, (3, -4)]]]) == ({'1.5, ' * 1000})"
    seen = []

    class Names(Transformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            seen.append(node.id)
            return node

    tree = parse(table)
    assert ast.dump(Names().visit(tree)) == ast.dump(parse(table))
    assert sorted(seen) == sorted(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    assert sorted(seen) == sorted(node.id for node in walk(tree) if isinstance(node, ast.Name))
    assert len(list(walk(tree))) < 60


def test_negative_numbers_are_constants_of_tables_too() -> None:
    """A megabyte of them took 31 s to read, and a text may have a minute."""
    tree = parse(f"assert f([{'-1, 2.5, ' * 10_000}], [-x, not 0, -f(-1)]) == 1")
    assert len(list(walk(tree))) < 40
    assert len([node for node in walk(tree) if isinstance(node, ast.Name)]) == 3


def test_warnings_of_the_source_are_not_ours(recwarn: pytest.WarningsRecorder) -> None:
    assert parse(r"x = '\.'").body
    assert not [warning for warning in recwarn.list if "escape sequence" in str(warning.message)]


def test_a_long_sum_is_not_too_deep() -> None:
    """A frame more for each node allowed 240 of them where it had been 325. In a thread, whose stack is empty."""
    with ThreadPoolExecutor(1) as thread:
        _, count, _ = thread.submit(compile_asserts, f"assert f(1) == {'+'.join('x' * 300)}").result()
    assert count == 1
