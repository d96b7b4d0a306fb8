"""Tests with calls of this package's in the place of comparisons and of `type`, which a solution's object could answer
as it likes. What is called: arrays.py, honest.py, looks.py."""

from __future__ import annotations

import ast
from typing import Any

from .arrays import OPERATORS, ORDERING
from .mocks import ASSERTED
from .syntax import Transformer, call, last_name, load, walk

CLOSE = (
    "equal",
    "string_equal",
    "almost_equal",
    "array_equal",
    "array_almost_equal",
    "array_almost_equal_nulp",
    "array_max_ulp",
)
# Functions of numpy that say whether two arrays agree.
AGREEING = frozenset({"allclose", "isclose", "array_equal", "array_equiv", "equal"}) | ORDERING
AGREEING |= {f"assert_{each}" for each in ("allclose", "approx_equal", *CLOSE)}

SIZES = frozenset({"abs", "absolute", "fabs", "round"})  # which make a number of a difference
# The methods of comparisons, and the functions of `operator` that are named like them.
METHODS = {"__eq__": ast.Eq, "__ne__": ast.NotEq, "__lt__": ast.Lt, "__le__": ast.LtE, "__gt__": ast.Gt}
METHODS |= {"__ge__": ast.GtE, "__contains__": ast.In}


class Guarded(Transformer):
    """`a == b` becomes `__compare__("Eq", a, b)`, likewise order and membership, and functions of `operator` that are
    called or mapped; of a chain, `a < b < c`, where what is
    behind the second may be looked at whatever came before. `a - b` becomes `__subtract__(a, b)`, and
    `np.allclose(a, b)` `__agree__(np.allclose, a, b)`. `a is "yes"` becomes `a == "yes"`: Python has one such text
    in all of a program, and another in another process. `m.assert_called_with(a)` becomes
    `__asserted__("assert_called_with", m, a)`."""

    def __init__(self) -> None:
        self._selects = False  # within `[...]`, where a comparison picks items
        self._modules, self._functions = {"operator"}, dict[str, str]()
        self._sized: ast.AST | None = None  # the argument of `abs` and the like
        self._made: frozenset[str] = frozenset()  # names and attributes that are objects of classes, made here

    def visit_Module(self, node: ast.Module) -> ast.AST:
        nodes = list(walk(node))
        bound = {each.id for each in nodes if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}
        bound |= {each.arg for each in nodes if isinstance(each, ast.arg)}
        bound |= {each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.ClassDef)}
        for each in nodes:
            if isinstance(each, ast.Import):
                self._modules |= {name.asname for name in each.names if name.name == "operator" and name.asname}
            elif isinstance(each, ast.ImportFrom) and each.module == "operator":
                self._functions |= {name.asname or name.name: f"__{name.name}__" for name in each.names}
        self._functions = {name: each for name, each in self._functions.items() if name not in bound}
        self._made = _made_by_calls(nodes)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        before = self._made
        self._made |= {each for each in _made_by_calls(list(walk(node))) if "." not in each}  # its own variables
        self.generic_visit(node)
        self._made = before
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self.visit_FunctionDef(node)

    def _method(self, function: ast.expr) -> str:
        """The method of a comparison that a function of `operator` is, or ""."""
        match function:
            case ast.Attribute(value=ast.Name(id=module), attr=attr) if module in self._modules:
                found = f"__{attr}__"
            case ast.Name(id=name):
                found = self._functions.get(name, "")
            case _:
                return ""
        return found if found in METHODS else ""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        node.value = self.visit(node.value)
        before, self._selects = self._selects, True
        node.slice = self.visit(node.slice)
        self._selects = before
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        sides = zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True)
        node.ops = [_by_value(op) if _is_text(left) or _is_text(right) else op for left, op, right in sides]
        operators = [type(each).__name__ for each in node.ops]
        if not OPERATORS.keys() >= set(operators):
            return node
        if not all(map(_is_at_hand, node.comparators[1:])):
            return self._parted(node)
        compared = call("__compare__", ast.Constant(" ".join(operators)), node.left, *node.comparators, at=node)
        if self._selects:
            compared.keywords.append(ast.keyword("selects", ast.Constant(True)))
        return compared

    def _parted(self, node: ast.Compare) -> ast.AST:
        """A chain as its comparisons, where what stands between two may be looked at twice."""
        between = node.comparators[:-1]
        if not all(map(_is_at_hand, between)):
            return node
        sides = zip([node.left, *between], node.ops, node.comparators, strict=True)
        parts = [ast.copy_location(ast.Compare(left, [op], [right]), node) for left, op, right in sides]
        return ast.copy_location(ast.BoolOp(ast.And(), [self.visit(part) for part in parts]), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if not isinstance(node.op, ast.Sub):
            return self.generic_visit(node)
        said: dict[str, Any] = {"sized": True} if self._sized is node else {}
        if any(made := (self._is_made(node.left), self._is_made(node.right))):
            said["made"] = made
        self.generic_visit(node)
        subtracted = call("__subtract__", node.left, node.right, at=node)
        subtracted.keywords = [ast.keyword(name, ast.Constant(value)) for name, value in said.items()]
        return subtracted

    def _is_made(self, node: ast.expr) -> bool:
        return _calls_class(node) or (isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in self._made)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.test = by_operator(node.test)
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        match node:
            case ast.Call(func=function, args=[left, right], keywords=[]) if method := self._method(function):
                return self.visit(_compared(method, left, right, at=node))
            case ast.Call(func=ast.Name(id="map"), args=[function, _, _]) if method := self._method(function):
                node.args[0] = _comparing(method, at=function)
            case ast.Call(func=ast.Attribute(attr="assertTrue" | "assertFalse"), args=[answer, *_]):
                node.args[0] = by_operator(answer)
            case ast.Call(args=[difference, *_]) if last_name(node.func) in SIZES:
                self._sized = difference
        self.generic_visit(node)
        if last_name(node.func) in AGREEING:
            node.func, node.args = load("__agree__", at=node.func), [node.func, *node.args]
        elif isinstance(node.func, ast.Attribute) and node.func.attr in ASSERTED:
            node.args = [ast.Constant(node.func.attr), node.func.value, *node.args]
            node.func = load("__asserted__", at=node.func)
        return node


def by_operator(node: ast.expr) -> ast.expr:
    """What is asked to hold, where it is a comparison by a method: `a.__eq__(b)` is NotImplemented for most, which is
    true. Elsewhere a test may look at just that."""
    match node:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ast.copy_location(ast.UnaryOp(ast.Not(), by_operator(operand)), node)
        case ast.BoolOp(op=op, values=values):
            return ast.copy_location(ast.BoolOp(op, [*map(by_operator, values)]), node)
        case ast.Call(func=ast.Name(id="bool"), args=[asked], keywords=[]):
            return by_operator(asked)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return ast.copy_location(ast.IfExp(test, by_operator(body), by_operator(orelse)), node)
        case ast.Call(func=ast.Attribute(value=left, attr=name), args=[right], keywords=[]) if name in METHODS:
            return _compared(name, left, right, at=node)
    return node


def _compared(method: str, left: ast.expr, right: ast.expr, *, at: ast.AST) -> ast.expr:
    sides = (right, left) if method == "__contains__" else (left, right)
    return ast.copy_location(ast.Compare(sides[0], [METHODS[method]()], [sides[1]]), at)


def _made_by_calls(nodes: list[ast.AST]) -> frozenset[str]:
    """The names and attributes, as text, that are given nothing but what a call of a class makes; it may be changed in
    place, as by `account += 5`."""
    calls = [node for node in nodes if isinstance(node, ast.Assign) and _calls_class(node.value)]
    made = [target for node in calls for target in node.targets]
    known = {id(each.target) for each in nodes if isinstance(each, ast.AugAssign)}.union(map(id, made))
    stored = [each for each in nodes if isinstance(getattr(each, "ctx", None), ast.Store)] if made else []
    other = [each for each in stored if id(each) not in known]
    arguments = {each.arg for each in nodes if isinstance(each, ast.arg)}
    return frozenset(map(ast.unparse, made)).difference(map(ast.unparse, other), arguments)


def _calls_class(node: ast.AST) -> bool:
    """Whether a node calls what is named like a class."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id[:1].isupper()


def _comparing(method: str, *, at: ast.expr) -> ast.expr:
    """A function that compares as `method` does."""
    names = ("one", "other")
    given = ast.arguments([], [*map(ast.arg, names)], None, [], [], None, [])
    return ast.copy_location(ast.Lambda(given, _compared(method, *(load(each, at=at) for each in names), at=at)), at)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _by_value(op: ast.cmpop) -> ast.cmpop:
    return ast.Eq() if isinstance(op, ast.Is) else ast.NotEq() if isinstance(op, ast.IsNot) else op


def _is_at_hand(node: ast.expr) -> bool:
    """Whether a value is there without any code that runs."""
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant | ast.Name)


class AskedTypes(Transformer):
    """`type(a)` becomes `__type__(a)`, and `super(a, b)` `__super__(a, b)`."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func.id if isinstance(node.func, ast.Name) and not node.keywords else ""
        if (called, len(node.args)) in (("type", 1), ("super", 2)):
            node.func = load(f"__{called}__", at=node.func)
        return node
