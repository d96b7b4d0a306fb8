"""Broken variants of a canonical solution, as a worker that errs would write them: one small change each."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from fastgrpo_sandbox.guest.syntax import parse


class Mutation(NamedTuple):
    """A changed program, and a hint that names the defect as a good reviewer would."""

    source: str
    hint: str


_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Add,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "sum": "max", "len": "max"}


def mutations(source: str, count: int, seed: str) -> list[Mutation]:
    """At most `count` different single mutations of `source`, drawn with `seed`.

    Loops by `while` are left as they are, because most changed ones never end.
    """
    tree = parse(source)
    sites = [(site, change) for site, node in enumerate(_mutable(tree)) for change in range(len(_changes(node)))]
    random.Random(seed).shuffle(sites)
    found = {ast.unparse(tree): Mutation(source, "")}
    for site, change in sites:
        if len(found) > count:
            break
        copy = parse(source)
        node = _mutable(copy)[site]
        hint = f"line {getattr(node, 'lineno', '?')}: {_changes(node)[change]()}"
        text = ast.unparse(ast.fix_missing_locations(copy))
        found.setdefault(text, Mutation(text, hint))
    return list(found.values())[1:]


def _mutable(tree: ast.AST) -> list[ast.AST]:
    return [node for node in _outside_while(tree) if _changes(node)]


def _outside_while(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.While):
            yield from _outside_while(child)


def _changes(node: ast.AST) -> list[Callable[[], str]]:
    """What can be done to `node` in place; each returns the words for it."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _OPERATORS:
            return [lambda: _set(node, "ops", [_OPERATORS[type(operator)]()], "the comparison is wrong")]
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in _OPERATORS:
            return [lambda: _replace_operator(node)]
        case ast.Constant(value=bool() as value):
            return [lambda: _set(node, "value", not value, "the truth value is wrong")]
        case ast.Constant(value=int() as value):
            return [
                lambda: _set(node, "value", value + 1, "off by one"),
                lambda: _set(node, "value", value - 1, "off by one"),
            ]
        case ast.Constant(value=str() as value) if len(value) < 20:
            return [lambda: _set(node, "value", value[1:] or "x", "the text is wrong")]
        case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS:
            return [lambda: _set(node.func, "id", _FUNCTIONS[name], f"{name}() is not what is called")]
        case ast.If(test=test) | ast.IfExp(test=test):
            return [lambda: _set(node, "test", ast.UnaryOp(ast.Not(), test), "the condition is the wrong way round")]
        case ast.comprehension(ifs=[_, *_]):
            return [lambda: _set(node, "ifs", [], "the filter is missing")]
        case ast.Call(func=ast.Attribute(attr="lower" | "upper" | "strip")):
            return [lambda: _set(node.func, "attr", "title", "the text is not brought into one form")]
        case ast.Slice(step=None, lower=ast.expr()):
            return [lambda: _set(node, "lower", None, "the slice starts too early")]
        case ast.Return(value=ast.expr()):
            values = (ast.Constant(None), ast.Constant(0), ast.Constant(""), ast.List([], ast.Load()))
            return [partial(_set, node, "value", value, "the result is not returned") for value in values]
    return []


def _replace_operator(node: ast.BinOp | ast.BoolOp | ast.AugAssign) -> str:
    return _set(node, "op", _OPERATORS[type(node.op)](), "the operator is wrong")


def _set(node: ast.AST, field: str, value: object, words: str) -> str:
    setattr(node, field, value)
    return words
