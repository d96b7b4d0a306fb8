"""The operators in a workflow's code: their names, what other names may stand for, the retries that a test asks for."""

from __future__ import annotations

import ast
from collections.abc import Iterator

OPERATORS = ("generate", "custom", "review", "revise", "ensemble", "test")
DEFAULT_RETRIES = 2
MOST_RETRIES = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def meanings(tree: ast.AST) -> list[tuple[str, list[ast.AST]]]:
    """(name, code) for each name that is read and each code that it may stand for.

    That is a function's body, or an expression that can be called (a name, a lambda, a partial): assigned, also by
    parts of a tuple, kept in a list or a dict, or given as a default.
    """
    nodes = list(ast.walk(tree))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return [(name, code) for node in nodes for name, code in _bound(node) if name in read]


def _bound(node: ast.AST) -> Iterator[tuple[str, list[ast.AST]]]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield node.name, list(node.body)
        case ast.Assign():
            for target in node.targets:
                yield from _assigned(target, node.value)
        case ast.AnnAssign(value=ast.expr()) | ast.NamedExpr():
            yield from _assigned(node.target, node.value)
        case ast.arguments():
            positional = [*node.posonlyargs, *node.args]
            given = [*zip(reversed(positional), reversed(node.defaults), strict=False)]
            for argument, default in [*given, *zip(node.kwonlyargs, node.kw_defaults, strict=True)]:
                yield from ((argument.arg, [code]) for code in _callable_parts(default))


def _assigned(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, list[ast.AST]]]:
    if isinstance(target, ast.Name):
        yield from ((target.id, [code]) for code in _callable_parts(value))
    elif isinstance(target, ast.Tuple | ast.List):
        parts = value.elts if isinstance(value, ast.Tuple | ast.List) else []
        matched = len(parts) == len(target.elts) and not any(isinstance(part, ast.Starred) for part in target.elts)
        for index, name in enumerate(target.elts):
            yield from _assigned(
                name.value if isinstance(name, ast.Starred) else name, parts[index] if matched else value
            )


def _callable_parts(value: ast.expr | None) -> list[ast.AST]:
    """The parts of `value` that can be called: itself, or what it keeps or chooses from."""
    match value:
        case ast.Name() | ast.Lambda() | ast.Call(func=ast.Name(id="partial") | ast.Attribute(attr="partial")):
            return [value]
        case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts) | ast.BoolOp(values=parts):
            return [code for part in parts for code in _callable_parts(part)]
        case ast.Dict(values=parts):
            return [code for part in parts for code in _callable_parts(part)]
        case ast.IfExp(body=one, orelse=other) | ast.BinOp(left=one, right=other):
            return [*_callable_parts(one), *_callable_parts(other)]
        case ast.Starred(value=inner):
            return _callable_parts(inner)
    return []


def written_retries(call: ast.Call) -> int:
    """The retries of a `test` call as written; the default where they are not a literal."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "retries"] + call.args[2:3]
    value = given[0].value if given and isinstance(given[0], ast.Constant) else DEFAULT_RETRIES
    return max(0, min(value, MOST_RETRIES)) if type(value) is int else DEFAULT_RETRIES
