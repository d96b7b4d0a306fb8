"""What the solution's process may do to what the tests lent it.

It may read, set and call what has no leading underscore, and use operators. It may not read what leads to the tests'
own values, nor change how the tests look at what it did.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import Any

from . import remote
from .known import is_library, library_place

TESTS = "tests"  # the module that the tests are
# What may be read of the tests' objects beside names without an underscore: nothing that holds a value of its own.
NAMES = frozenset({"__name__", "__qualname__", "__doc__", "__module__", "__annotations__", "__code__", "__dict__"})
NAMES |= {"__dataclass_fields__", "_field_type", "__members__", "_fields", "_asdict", "_replace", "_make"}
DECORATED = frozenset({*remote.UNARY, "__call__", "__exit__", "__init__"}) - {"__hash__", "__bool__", "__set_name__"}
DECORATED -= {"__get__", "__set__", "__delete__"}
WRAPPED = ("get", "__init__")
CLASSES = (type, types.FunctionType, types.ModuleType)  # whose __dict__ is no object's data
ATTRIBUTES = ("get", "set", "del")
CALLS = (("call", ""), ("special", "__call__"))
FORMATS = ("format", "format_map")  # of a text that the solution chose they read any attribute
MOCK = "unittest.mock"


class Allowed:
    """What the solution may do to the tests' objects, given what it has done itself and what it was handed."""

    def __init__(self) -> None:
        self._set: set[tuple[int, str]] = set()  # by id(), of what is lent and so stays
        self._handed: dict[int, type] = {}  # by id()

    def hand(self, values: Iterable[Any]) -> None:
        """The tests pass these on: a class among them is for the solution to call."""
        self._handed |= {id(value): value for value in values if isinstance(value, type)}

    def may(self, operation: str, found: Any, name: Any) -> bool:
        """Whether the solution may do this to an object of the tests. It changes no class but those that the tests
        define, and gives these, as decorators do, operators that are shown no operand."""
        if not isinstance(name, str) or _tells_all(found, name) or _is_how_tests_look(operation, found, name):
            return False
        if isinstance(found, type):
            if operation in ("set", "del") and found.__module__ != TESTS:
                return False
            if (operation, name) in CALLS and not self._is_for_calling(found):
                return False
            if name in DECORATED if operation == "set" else (operation, name) == WRAPPED:
                return True
        return _is_allowed(operation, name) or self._is_its_own(operation, found, name)

    def _is_for_calling(self, kind: type) -> bool:
        """A class of the library's that was only said to be an object's, as of `operator.attrgetter("x")`, makes what
        reads anything."""
        return library_place(kind) is None or id(kind) in self._handed

    def _is_its_own(self, operation: str, found: Any, name: str) -> bool:
        """Whether a name with an underscore is one that the solution itself gave an object of the tests."""
        if operation not in ATTRIBUTES or name.startswith(("__", "_fastgrpo_")):
            return False
        place = id(found), name
        if (
            operation == "set"
            and place not in self._set
            and not isinstance(found, CLASSES)
            and not hasattr(found, name)
        ):
            self._set.add(place)
        return place in self._set


def _is_allowed(operation: str, name: str) -> bool:
    if operation in ATTRIBUTES:
        return not name.startswith("_") or (operation == "get" and name in NAMES)
    names = {"special": (*remote.SPECIALS, "send"), "copy": ("copy", "deepcopy")}
    return operation in ("call", "await", "cancel", "signature") or name in names.get(operation, ())


def _tells_all(found: Any, name: str) -> bool:
    """What a callback was given beforehand, and formatting by a text of the solution's."""
    if isinstance(found, functools.partial):
        return name in ("args", "keywords")
    kind = found if isinstance(found, type) else type(found)
    return name in FORMATS and remote.holder_of(kind, name) is str


def _is_how_tests_look(operation: str, found: Any, name: str) -> bool:
    """A mock's account of its calls and what asserts about it; and methods of the library's, where they are to be
    replaced."""
    if operation not in ATTRIBUTES or name.startswith("_"):
        return False
    holder = remote.holder_of(type(found), name)
    if holder is None or not is_library(holder.__module__):
        return False
    return holder.__module__ == MOCK or (operation != "get" and callable(remote.space_of(holder)[name]))


def public(found: Any) -> dict[str, Any]:
    """The attributes of an object of the tests that the solution may read, and may set where it may read all."""
    if isinstance(found, CLASSES):
        raise AttributeError("__dict__")
    every = vars(found)
    shown = {name: value for name, value in every.items() if not name.startswith("_")}
    return every if len(shown) == len(every) else shown
