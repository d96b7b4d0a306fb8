"""The operators in a workflow's code: their names, what other names may stand for, the retries that a test asks for."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

OPERATORS = ("generate", "custom", "review", "revise", "ensemble", "test")
DEFAULT_RETRIES = 2
MOST_RETRIES = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def meanings(tree: ast.AST) -> list[tuple[list[str], list[list[ast.AST]]]]:
    """(names, codes): names that are read somewhere, and the codes each of which every one of them may stand for.

    A code is a function's body, or an expression that can be called (a name, a lambda, a partial): assigned, also by
    parts of a tuple, kept in a list or a dict, or given as a default. Names and codes are not paired off: a hostile
    text binds a thousand names to a thousand codes at once.
    """
    nodes = list(ast.walk(tree))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = [(read.intersection(names), codes) for node in nodes for names, codes in _bound(node)]
    return [(sorted(names), codes) for names, codes in bound if names and codes]


def _bound(node: ast.AST) -> Iterator[tuple[list[str], list[list[ast.AST]]]]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield [node.name], [list(node.body)]
        case ast.Assign():
            yield from _assigned(node.targets, node.value)
        case ast.AnnAssign(value=ast.expr() as value) | ast.NamedExpr(value=value):
            yield from _assigned([node.target], value)
        case ast.arguments():
            positional = [*node.posonlyargs, *node.args]
            given = [*zip(reversed(positional), reversed(node.defaults), strict=False)]
            for argument, default in [*given, *zip(node.kwonlyargs, node.kw_defaults, strict=True)]:
                yield [argument.arg], _codes(default)


def _assigned(targets: Sequence[ast.expr], value: ast.expr) -> Iterator[tuple[list[str], list[list[ast.AST]]]]:
    names_of: dict[ast.expr, list[str]] = {}
    for target in targets:
        for name, given in _given(target, value):
            names_of.setdefault(given, []).append(name)
    return ((names, _codes(given)) for given, names in names_of.items())


def _given(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Each name in `target` with what it is given: its part of `value`, or all of it where the parts do not match."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple | ast.List):
        parts = value.elts if isinstance(value, ast.Tuple | ast.List) else []
        matched = len(parts) == len(target.elts) and not any(isinstance(part, ast.Starred) for part in target.elts)
        for index, name in enumerate(target.elts):
            yield from _given(name.value if isinstance(name, ast.Starred) else name, parts[index] if matched else value)


def _codes(value: ast.expr | None) -> list[list[ast.AST]]:
    return [[part] for part in _callable_parts(value)]


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
