"""What the assertions of a line compare, by name: one that asks the solution to agree with itself alone is no test; and
the builtins in whose place a function of the solution's may stand."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable
from typing import NamedTuple

from .syntax import walk

OF_SOLUTION = "__solution__"  # before the name of a builtin that tests import from the solution
# Builtins that decide more than one answer: never taken from the solution.
JUDGING = frozenset({"all", "any", "bool", "callable", "hasattr", "isinstance", "issubclass", "type", "id"})
MIXING = (ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict)


class Pair(NamedTuple):
    """The names behind the left side of a comparison, those that only the right side reads, and whether it is a
    membership, whose right side may be what is tested."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    is_membership: bool


def pairs(nodes: list[ast.AST], names: Iterable[str], modules: Iterable[str]) -> tuple[Pair, ...]:
    """The comparisons of a program's `nodes` both of whose sides read something, so far as `names` are concerned. Of
    `modules` nothing is made: `np.all(wanted == f(1))` leaves numpy as it was."""
    makers = _makers(nodes)
    for module in modules:
        makers.pop(module, None)
    wanted, found = set(names), []
    for node in nodes:
        if isinstance(node, ast.Compare):
            left, right = map(read, _sides(node))
            apart = (right - left) & wanted
            if left and apart:
                behind = _behind(left, makers, _changers(nodes, node)) & wanted
                is_membership = isinstance(node.ops[0], ast.In | ast.NotIn)
                found.append(Pair(tuple(sorted(behind)), tuple(sorted(apart)), is_membership))
    return tuple(found)


def _sides(node: ast.Compare) -> tuple[ast.expr, ast.expr]:
    """The tested side and the wanted one, which comes first where it is a member of a class: `Color.RED is f(1)`."""
    match node:
        case ast.Compare(
            left=ast.Attribute(value=ast.Name(id=name)) as member,
            ops=[ast.Eq() | ast.NotEq() | ast.Is() | ast.IsNot()],
            comparators=[tested],
        ) if name[:1].isupper():
            return tested, member
    return node.left, node.comparators[0]


def read(node: ast.AST) -> set[str]:
    return {each.id for each in walk(node) if isinstance(each, ast.Name) and not hasattr(builtins, each.id)}


def _names(target: ast.AST | str) -> set[str]:
    return {target} if isinstance(target, str) else read(target)


def _makers(nodes: list[ast.AST]) -> dict[str, set[str]]:
    """The names that were read for the value of each name."""
    found: dict[str, set[str]] = {}
    for node in nodes:
        targets, values = _given(node)
        for name in set[str]().union(*map(_names, targets)):
            found.setdefault(name, set()).update(*map(read, values))
    return found


def _changers(nodes: list[ast.AST], apart: ast.Compare) -> dict[str, set[str]]:
    """The functions that each name was given to, and that may have changed it, but for those of one comparison."""
    found: dict[str, set[str]] = {}
    inner = {id(each) for each in walk(apart)}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    same = _fixed(nodes) | called
    for node in nodes:
        if isinstance(node, ast.Call) and id(node) not in inner:
            for name in set[str]().union(*map(read, [*node.args, *node.keywords])) - same:
                found.setdefault(name, set()).update(read(node.func))
    return found


def _fixed(nodes: list[ast.AST]) -> set[str]:
    """Names that stand for numbers and texts alone."""
    fixed, others = set[str](), set[str]()
    for targets, values in map(_given, nodes):
        is_fixed = all(map(_is_fixed, values)) and all(isinstance(target, ast.Name) for target in targets)
        (fixed if is_fixed else others).update(*map(_names, targets))
    return fixed - others


def _is_fixed(value: ast.AST) -> bool:
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "range"
    return isinstance(value, ast.Constant)


def _behind(names: set[str], makers: dict[str, set[str]], changers: dict[str, set[str]]) -> set[str]:
    found, waiting = set(names), list(names)
    while waiting:
        name = waiting.pop()
        more = (makers.get(name, set()) | changers.get(name, set())) - found
        found |= more
        waiting += more
    return found


def _given(node: ast.AST) -> tuple[list[ast.AST | str], list[ast.AST]]:
    """What a statement or expression gives a value, or puts something into, and what that is made of."""
    match node:
        case ast.Assign(targets=targets, value=value):
            return list(targets), [value]
        case ast.AnnAssign(target=target, value=value) | ast.AugAssign(target=target, value=value):
            return [target], [value] if value else []
        case ast.NamedExpr(target=target, value=value):
            return [target], [value]
        case ast.For(target=target, iter=value) | ast.AsyncFor(target=target, iter=value):
            return [target], [value]
        case ast.comprehension(target=target, iter=value):
            return [target], [value]
        case ast.withitem(context_expr=value, optional_vars=target):
            return [target] if target else [], [value]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name], [node]
        case ast.Try(body=body, handlers=handlers):
            return [each.name for each in handlers if each.name], list(body)
        case ast.Match(subject=subject, cases=cases):
            captures = [each for case in cases for each in walk(case.pattern)]
            names = [getattr(each, "name", None) or getattr(each, "rest", None) for each in captures]
            return [name for name in names if name], [subject]
        case ast.Call(func=ast.Attribute(value=ast.Name() as owner), args=args, keywords=named):
            return [owner], [*args, *named]
    return [], []


def plainly_called(nodes: list[ast.AST]) -> list[str]:
    return [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]


def tested_builtins(nodes: list[ast.AST]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The builtins that are called with nothing but data wherever they are read, and those of them whose answers are
    compared for equality and nothing else. In the place of any other a function of the solution's would be shown the
    wanted value, as by `round(Circle(2).area() - 12.57, 2) == 0`, or be the one that makes it."""
    builtin = [name for name in plainly_called(nodes) if hasattr(builtins, name) and name not in JUDGING]
    if not builtin:
        return (), ()
    names = _Names(nodes)
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    calls = [call for call in calls if getattr(call.func, "id", "") in builtin]
    fitting = {id(call.func) for call in calls if all(map(names.is_data, [*call.args, *call.keywords]))}
    compared = [node for node in nodes if isinstance(node, ast.Compare)]
    among = [node for node in compared if any(isinstance(part, ast.Call) for part in walk(node.left))]
    fitting -= {id(part) for node in among for side in node.comparators for part in walk(side)}  # the wanted values
    other = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in fitting}
    found = [name for name in builtin if name not in other]
    left = plainly_called([node.left for node in compared if all(type(op) is ast.Eq for op in node.ops)])
    return tuple(dict.fromkeys(found)), tuple(dict.fromkeys(name for name in left if name in found))


class _Names:
    """What a program's names stand for."""

    def __init__(self, nodes: list[ast.AST]) -> None:
        self._values: dict[str, list[ast.AST]] = {}
        for targets, given in map(_given, nodes):
            for name in set[str]().union(*map(_names, targets)):
                self._values.setdefault(name, []).extend(given)

    def is_data(self, node: ast.AST) -> bool:
        """Whether what `node` gives is no answer of the solution's, mixed with what the tests know of it: calls, but of
        classes for objects, stand alone and are plain ones. Names are followed to all that they stand for."""
        waiting, seen = [node], set[str]()
        while waiting:
            part = waiting.pop()
            if isinstance(part, ast.Attribute) or (isinstance(part, ast.Call) and not isinstance(part.func, ast.Name)):
                return False
            if isinstance(part, MIXING) and any(not name[:1].isupper() for name in plainly_called([*walk(part)])):
                return False
            if isinstance(part, ast.Name) and part.id not in seen:
                seen.add(part.id)
                waiting += self._values.get(part.id, [])
            elif not isinstance(part, ast.Lambda):
                waiting += ast.iter_child_nodes(part)
        return True
