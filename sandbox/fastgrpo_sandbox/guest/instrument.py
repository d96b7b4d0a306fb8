"""Assertions found and rewritten by AST, so that each counts on its own; used by the judge and the host."""

from __future__ import annotations

import ast
import builtins
import marshal
from functools import lru_cache

from .syntax import parse

CACHED = 4096  # programs of tests; one problem's tests judge many solutions
TEST_BASES = ("TestCase", "IsolatedAsyncioTestCase")


@lru_cache(CACHED)
def unittest_names(source: str) -> tuple[str, ...]:
    """`Class.method` of every unittest test in `source`, in the order of the text. Raises SyntaxError."""
    classes = [node for node in parse(source).body if isinstance(node, ast.ClassDef) and _is_test_class(node)]
    return tuple(
        f"{cls.name}.{item.name}"
        for cls in classes
        for item in cls.body
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and item.name.startswith("test")
    )


def _is_test_class(node: ast.ClassDef) -> bool:
    names = [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases]
    return any(name in TEST_BASES for name in names)


class _Split(ast.NodeTransformer):
    """`assert test, message` becomes a try that records its own verdict under its index and goes on; `assert False`,
    which says that nothing may come here, records that something did."""

    def __init__(self) -> None:
        self.count = 0
        self.never: list[int] = []

    def visit_Module(self, node: ast.Module) -> ast.AST:
        self.generic_visit(node)
        node.body += [ast.fix_missing_locations(_call("__never__", index)) for index in self.never]
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        index = self.count
        self.count += 1
        if isinstance(node.test, ast.Constant) and not node.test.value:
            self.never.append(index)
            return ast.fix_missing_locations(ast.copy_location(_call("__failed__", index), node))
        body = _call("__passed__", index, node.test)
        handler = ast.ExceptHandler(type=_name("__Exception__"), name=None, body=[_call("__failed__", index)])
        split = ast.Try(body=[body], handlers=[handler], orelse=[], finalbody=[])
        return ast.fix_missing_locations(ast.copy_location(split, node))


def _name(name: str) -> ast.Name:
    return ast.Name(id=name, ctx=ast.Load())


def _call(function: str, index: int, *arguments: ast.expr) -> ast.Expr:
    return ast.Expr(ast.Call(func=_name(function), args=[ast.Constant(index), *arguments], keywords=[]))


def split_asserts(source: str) -> tuple[ast.Module, int]:
    """`source` with every assert replaced by a call of `__passed__(index, test)` guarded by `__failed__(index)`, and
    the number of asserts. Indices follow the order of the text. At its end `source` calls `__never__(index)` for each
    `assert False`. Raises SyntaxError."""
    splitter = _Split()
    tree = splitter.visit(parse(source))
    return tree, splitter.count


@lru_cache(CACHED)
def compile_asserts(source: str) -> tuple[bytes, int]:
    """`split_asserts(source)` compiled and marshalled for the judge, which is this same interpreter, and the number of
    asserts. Raises SyntaxError."""
    tree, count = split_asserts(source)
    return marshal.dumps(compile(tree, "tests.py", "exec", dont_inherit=True)), count


@lru_cache(CACHED)
def wanted_names(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that `source` reads, neither binds nor finds built in; and the first that it calls, if a plain one."""
    nodes = list(ast.walk(parse(source)))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    read -= {_bound(node) for node in nodes}
    return tuple(sorted(name for name in read if not hasattr(builtins, name))), tuple(called[:1])


def _bound(node: ast.AST) -> str:
    """The name that `node` gives a value: a variable's, also of a comprehension, an argument's, an import's; or ""."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.FunctionDef(name=name):
            return name
        case ast.alias(name=name, asname=alias):
            return alias or name.partition(".")[0]
    return ""
