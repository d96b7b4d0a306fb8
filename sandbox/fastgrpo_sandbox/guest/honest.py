"""Comparisons of unittest tests that share a process with the solution: an object whose class answers for its own
equality or order in code that is neither the library's nor the tests' is not compared with what has none such.

`Y() == 2`, where Y equals everything, is the cheapest of forged passes. Two objects of that sort are compared as they
wish: the tests mean the class that they construct. This module cannot hold against code that sets out to deceive it.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from . import arrays

TESTS = "tests.py"
LIBRARY = (os.path.dirname(os.__file__) + "/", "/jail/")
DECIDING: tuple[str, ...] = (
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__sub__",
    "__rsub__",
    "__abs__",
    "__round__",
)
DECIDING += ("__array_function__", "__array_ufunc__")  # which numpy asks
COMPARING: tuple[str, ...] = (
    "Equal",
    "Equals",
    "AlmostEqual",
    "AlmostEquals",
    "CountEqual",
    "ListEqual",
    "TupleEqual",
    "DictEqual",
)
COMPARING += (
    "SetEqual",
    "SequenceEqual",
    "MultiLineEqual",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "In",
    "NotIn",
)
HOLDING = ("__contains__", "__iter__", "__getitem__", "__len__")
LOOKED_THROUGH = ("CountEqual", "SequenceEqual")
CONTAINERS = (list, tuple, dict, set, frozenset)
_meant: frozenset[str] = frozenset()


def guard(case: type, classes: frozenset[str]) -> None:
    """Makes the comparing assertions of unittest.TestCase fail on such objects, and unittest's own `_ShouldStop`, which
    passes the test that raises it, an exception like any other. `classes` are those of the solution's that the tests
    name, and so mean as they are."""
    global _meant  # noqa: PLW0603 - set once a job, and watched like what else is here
    _meant = classes
    sys.modules[case.__module__]._ShouldStop = ()  # type: ignore[attr-defined]  # `except ()` catches nothing
    for name in COMPARING:
        method = getattr(case, f"assert{name}", None)
        if method is not None:
            setattr(case, f"assert{name}", _guarded(method, name))


def _guarded(method: Callable[..., None], name: str) -> Callable[..., None]:
    @functools.wraps(method)
    def assertion(self: Any, *args: Any, **named: Any) -> None:
        if len(args) > 1 and name in ("In", "NotIn"):
            args = (args[0], among(args[0], args[1]), *args[2:])
        elif name in LOOKED_THROUGH:
            args = (*map(_looked_through, args[:2]), *args[2:])
        if len(args) > 1 and name != "NotIn" and lies(args[0], args[1], name == "In"):
            self.fail(
                f"{type(args[0]).__name__} and {type(args[1]).__name__}: an object cannot answer for its equality"
            )
        method(self, *args, **named)

    return assertion


def compare(names: str, left: Any, *rights: Any, selects: bool = False) -> Any:
    """`arrays.compare`, where one side that decides alone lies."""
    if names in ("In", "NotIn"):
        rights = (among(left, *rights),)
    return arrays.compare(names, left, *rights, selects=selects, lies=lies)


def subtract(left: Any, right: Any) -> Any:
    """`arrays.subtract`. Raises TypeError where an object of one side's would make a number of the wanted one."""
    own = [_has_own(kind, ("__sub__", "__rsub__")) and not _is_meant(kind) for kind in map(type, (left, right))]
    if own[0] != own[1]:
        raise TypeError(f"{type(left).__name__} - {type(right).__name__}: an object cannot answer for its difference")
    return arrays.subtract(left, right)


def agree(function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    """`arrays.agree`, likewise."""
    return arrays.agree(function, *args, lies=lies, **named)


def among(item: Any, container: Any) -> Any:
    """What `item` is looked for in: of a container that answers for itself, or holds what does, the items with which
    it may be compared."""
    looked = _looked_through(container)
    if not isinstance(looked, list | tuple) or not _answers(looked):  # a set's item has to know the hash
        return looked
    return [each for each in looked if not lies(item, each)]


def _looked_through(container: Any) -> Any:
    """The items of a container of the solution's, or its text, whatever it says that it holds. Raises TypeError for one
    that cannot be iterated over."""
    kind = type(container)
    if not _has_own(kind, HOLDING) or _is_meant(kind):  # type: ignore[arg-type]
        return container
    if isinstance(container, str):
        return str.__str__(container)
    base = next((each for each in (*CONTAINERS, bytes) if isinstance(container, each)), None)
    return list(container if base is None else base.__iter__(container))


def _is_meant(kind: type) -> bool:
    return any(each.__name__ in _meant for each in kind.__mro__)


def lies(left: Any, right: Any, membership: bool = False) -> bool:
    """Whether one side alone has, or holds, an object that answers for itself; of a membership, the member alone."""
    if left is right:
        return False
    return (_answers(left) and not _answers(right)) or (not membership and _answers(right) and not _answers(left))


def _answers(value: Any) -> bool:
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if _is_own(type(item)):
            return True
        if isinstance(item, CONTAINERS) and id(item) not in seen:
            seen.add(id(item))
            parts = [*item, *item.values()] if isinstance(item, dict) else list(item)
            kinds = set(map(type, parts))
            if any(map(_is_own, kinds)):
                return True
            waiting += [part for part in parts if isinstance(part, CONTAINERS)]
    return False


def _is_own(kind: type) -> bool:
    return _is_mock(kind) or _has_own(kind, DECIDING)


@functools.cache
def _has_own(kind: Any, names: tuple[str, ...]) -> bool:
    """Whether a class has some of these methods from the solution."""
    found = {name: _defined(kind, name) for name in names}
    return not all(_is_library(kind, name, each) for name, each in found.items() if each)


def _is_mock(kind: type) -> bool:
    """Whether a class can be told what its objects equal; ANY equals everything."""
    return any(each.__module__ == "unittest.mock" for each in kind.__mro__) and kind.__name__ not in (
        "_Call",
        "_CallList",
    )


def _defined(kind: type, name: str) -> Any:
    return next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), None)


def _is_library(kind: type, name: str, function: Any) -> bool:
    if type(function) in (types.WrapperDescriptorType, types.MethodDescriptorType):
        return function.__name__ == name
    if isinstance(function, types.FunctionType):
        return function.__code__.co_filename.startswith(LIBRARY) or function.__code__.co_filename == TESTS
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return file.startswith(LIBRARY)
