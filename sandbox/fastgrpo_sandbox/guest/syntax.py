"""Someone else's Python into a syntax tree, and into code; and nodes of such trees."""

from __future__ import annotations

import ast
import gc
import types
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

ATTEMPTS = 10


def parse(source: str) -> ast.Module:
    """`ast.parse(source)` without its warnings, also beside other threads. Raises SyntaxError, also for what is nested
    too deeply, and ValueError.

    CPython 3.11 before 3.11.8 counts the recursion of all trees under construction in one place (gh-106905): another
    thread, or a collection of garbage, in the middle of one makes it a SystemError, which says nothing of the source.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(ATTEMPTS):
            try:
                return _tree(source)
            except SystemError:
                continue
            except (RecursionError, MemoryError):  # the latter is the parser's, of its stack
                raise SyntaxError("nested too deeply") from None
        return _tree(source)


def _tree(source: str) -> ast.Module:
    """`ast.parse(source)` with no collection of garbage in the middle: each looks at all nodes that there are so far,
    half of the time of a long source, and no tree has any before it is whole."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if was_on:
            gc.enable()


def parse_expression(source: str) -> ast.expr:
    """The one expression that `source` is. Raises SyntaxError and ValueError."""
    match parse(source.lstrip()).body:
        case [ast.Expr(value=value)]:
            return value
    raise SyntaxError(f"{source!r:.60} is no expression")


def _is_table(node: ast.AST) -> bool:
    """Whether a node is a list or tuple of constants, which in tests are long and hold nothing to look at."""
    return isinstance(node, ast.List | ast.Tuple) and all(map(_is_constant, node.elts))


def _is_constant(node: ast.AST) -> bool:
    """A negative number is one, too."""
    if type(node) is ast.UnaryOp and type(node.op) is ast.USub:
        node = node.operand
    return type(node) is ast.Constant


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk`, but for the constants in tables of nothing else."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        if not _is_table(node):
            waiting.extend(ast.iter_child_nodes(node))
        yield node


class Transformer(ast.NodeTransformer):
    """One that passes over constants and tables of them."""

    def visit_Constant(self, node: ast.Constant) -> Any:
        return node

    def visit_List(self, node: ast.List) -> Any:
        return node if _is_table(node) else self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> Any:
        return node if _is_table(node) else self.generic_visit(node)


def hoisted(tree: ast.Module) -> ast.Module:
    """`tree` with what it imports from __future__ at its beginning, where the language wants it: a program that was put
    together from a preamble and an answer has it in the middle."""
    first = 1 if ast.get_docstring(tree, clean=False) is not None else 0
    futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    rest = [node for node in tree.body if node not in futures]
    return ast.Module([*rest[:first], *futures, *rest[first:]], tree.type_ignores) if futures else tree


def compile_source(source: str, file: str) -> types.CodeType:
    """Code of a program whose imports from __future__ may stand anywhere. Raises SyntaxError and ValueError."""
    try:
        return compile(source, file, "exec", dont_inherit=True)
    except SyntaxError as error:
        if "__future__" not in str(error):
            raise
    return compile(hoisted(parse(source)), file, "exec", dont_inherit=True)


def last_name(node: ast.AST) -> str:
    """`c` of `a.b.c`, and of `c`; or ""."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def load(name: str, *, at: ast.AST) -> ast.Name:
    """A name that is read, in the place of the node `at`."""
    return ast.copy_location(ast.Name(name, ast.Load()), at)


def call(function: str, *args: ast.expr, at: ast.AST) -> ast.Call:
    """`function(*args)`, likewise."""
    return ast.copy_location(ast.Call(load(function, at=at), list(args), []), at)
