"""What a test's class has, as functions and names of its module, so that a condition of `self.X`, or a method that
skips, is read as one without a class is (skipping.py)."""

from __future__ import annotations

import ast
import copy
import unittest
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from fastgrpo_sandbox.guest.syntax import Transformer, last_name, load, parse
from fastgrpo_sandbox.source_text import SET_UP

SELF = "__self__"  # the test's object, and what begins the names of what it has
CHANGED = "__changed__"  # begins those of what tests may change; nothing gives them
FIRST = ("setUpClass", "setUp")  # of what unittest runs
SET_UPS = (*FIRST, *SET_UP)
# Methods by which lists, dictionaries and sets are changed.
CHANGING = frozenset(name for kind in (list, dict, set) for name in vars(kind) if not name.startswith("__"))
CHANGING -= {"copy", "count", "fromkeys", "get", "index", "items", "keys", "values", "isdisjoint", "issubset"}
CHANGING -= {"difference", "intersection", "issuperset", "symmetric_difference", "union"}
_PROPERTIES = ("property", "cached_property")
_MEANING = ("classmethod", "staticmethod", *_PROPERTIES)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def as_names(stored: Mapping[str, int], classes: Sequence[ast.ClassDef]) -> tuple[list[ast.stmt], dict[str, _Function]]:
    """The statements that give what an object of the first of `classes` has, which are in the order in which they are
    looked through; and its methods, as functions without the object, by the methods' names. `stored` is what all the
    tests store in attributes (`stored_in`)."""
    methods = [(i, each) for i, cls in enumerate(classes) for each in cls.body if isinstance(each, _FUNCTIONS)]
    set_ups = [each for _, each in methods if each.name in SET_UPS]
    made = stored_in(set_ups)
    changed = set(Counter(stored) - made)  # by anything else
    given = list(parse(f"{SELF} = __import__('unittest').TestCase()").body)
    found: dict[str, _Function] = {}
    for number, cls in reversed([*enumerate(classes)]):
        values = dict(pair for node in cls.body for pair in _values(node))
        within = _Names(classes, methods, changed, values.keys())
        known = [name for name in values if "" not in changed and name not in changed and name not in made]
        given += [ast.Assign([ast.Name(SELF + name, ast.Store())], within.value(values[name])) for name in known]
        own = {method.name: within.function(number, method) for i, method in methods if i == number}
        given += own.values()
        found |= own
    return [ast.fix_missing_locations(node) for node in given], found


def _values(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield name, value


def stored_in(nodes: Sequence[ast.AST]) -> Counter[str]:
    """The attributes that any object is given, or has changed, with how often; "" for any."""
    return Counter(name for node in nodes for part in ast.walk(node) for name in _stored(part))


def _stored(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Attribute(attr=name) if not isinstance(node.ctx, ast.Load):
            yield name
        case ast.Subscript(value=ast.Attribute(attr=name)) if not isinstance(node.ctx, ast.Load):
            yield name
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr=name), attr=method)) if method in CHANGING:
            yield name
        case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[_, name, *_]):
            yield str(name.value) if isinstance(name, ast.Constant) else ""


def given_in(nodes: Iterable[ast.AST]) -> Iterator[ast.Name]:
    """Where the test's object is given what it has, once that has a name."""
    parts = (part for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name))
    return (part for part in parts if isinstance(part.ctx, ast.Store) and part.id.startswith(SELF))


class _Names(Transformer):
    """`self.X` and `T.X` become names; what unittest gives every test stays a member of its object. In a class, `X` is
    such a name, too, where it is one of `own`."""

    def __init__(
        self,
        classes: Sequence[ast.ClassDef],
        methods: Sequence[tuple[int, _Function]],
        changed: Set[str],
        own: Set[str],
    ) -> None:
        self._classes, self._methods, self._changed = {cls.name for cls in classes}, methods, changed
        self._in_class, self._own = own, own
        self._object, self._number = "", 0

    def value(self, node: ast.expr) -> ast.expr:
        """What stands in the class itself."""
        self._object, self._own = "", self._in_class
        made: ast.expr = self.visit(copy.deepcopy(node))
        return made

    def function(self, number: int, method: _Function) -> _Function:
        """A method of the class of this number."""
        made, kinds = copy.deepcopy(method), [last_name(each) for each in method.decorator_list]
        made.name = f"{SELF}{number}{method.name}"
        made.decorator_list = [self.value(each) for each in made.decorator_list if last_name(each) not in _MEANING]
        first = (*made.args.posonlyargs, *made.args.args)[:1]
        self._object, self._number, self._own = "", number, frozenset()
        if first and "staticmethod" not in kinds:
            self._object = first[0].arg
            (made.args.posonlyargs or made.args.args).pop(0)
        body = [self.visit(node) for node in made.body]
        stored = {node.id for node in given_in(body)}
        made.body = [*([ast.Global(sorted(stored))] if stored else []), *body]
        return made

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id == self._object:
            return load(SELF, at=node)
        return load(SELF + node.id, at=node) if node.id in self._own else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        match node.value:
            case ast.Name(id=name) if name == self._object or name in self._classes:
                return self._member(node, 0)
            case ast.Call(func=ast.Name(id="super"), args=[]):
                return self._member(node, self._number + 1)
        self.generic_visit(node)
        return node

    def _member(self, node: ast.Attribute, least: int) -> ast.AST:
        for number, method in self._methods:
            if number >= least and method.name == node.attr:
                name = load(f"{SELF}{number}{method.name}", at=node)
                is_value = any(last_name(each) in _PROPERTIES for each in method.decorator_list)
                return ast.copy_location(ast.Call(name, [], []), node) if is_value else name
        if hasattr(unittest.TestCase, node.attr):
            return ast.copy_location(ast.Attribute(load(SELF, at=node), node.attr, node.ctx), node)
        is_changed = not self._changed.isdisjoint(("", node.attr))
        return ast.copy_location(ast.Name((CHANGED if is_changed else SELF) + node.attr, node.ctx), node)
