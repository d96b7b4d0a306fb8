"""Identities of what decides a unittest's verdict, taken before and after the solution and the tests: whatever was put
in the place of something else, or changed within it, is another then."""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

from . import arrays, honest

Identities = dict[tuple[str, ...], Any]  # by module, name and part
HEAP = 1 << 9  # of a class' flags: what it has can be changed
CONSTANTS = frozenset({int, float, complex, str, bytes, tuple, frozenset})
METHODS = frozenset({types.FunctionType, types.WrapperDescriptorType, property, classmethod, staticmethod})
UNWATCHED = ("sys",)  # whose hooks and streams are there to be replaced
FOLDER = "/tmp"  # where a job's files lie and its script would
CHANGING = ("time", "tempfile")  # whose texts and numbers follow the time zone and the first use
WATCHED = (
    *("unittest", "unittest.case", "unittest.result", "unittest.suite", "contextlib"),
    *(honest.__name__, arrays.__name__),
)


def deciding() -> Identities:
    """Identity of every builtin, of the modules that decide a unittest's result, and of the code and defaults of all
    that is in them."""
    found: Identities = {("builtins", name): id(value) for name, value in vars(builtins).items()}
    found.pop(("builtins", "_"), None)
    for name in WATCHED:
        module = sys.modules[name]
        found["sys.modules", name] = id(module)
        for key, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == name:
                found[name, key] = (id(value), [(part, _identity(item)) for part, item in vars(value).items()])
            elif not key.startswith("__"):
                found[name, key] = _identity(value)
    return found


def in_modules(modules: tuple[str, ...], mocked: Identities | None = None) -> Identities:
    """Identity of the modules, of the functions, classes and constants in them and of what these classes have; of a
    mock, what `mocked` has there. Those of the job's files may count in a constant."""
    found: Identities = {}
    changing = {*CHANGING, *(name for name in modules if _is_of_file(sys.modules.get(name)))}
    for name in modules:
        module = sys.modules.get(name)
        found["sys.modules", name] = id(module)
        for key, value in getattr(module, "__dict__", {}).items():
            if type(value) is types.FunctionType:
                found[name, key] = (id(value.__code__), id(value.__defaults__))
            elif mocked is not None and _is_mock(value):
                found[name, key] = mocked.get((name, key))
            elif callable(value) or (type(value) in CONSTANTS and not key.startswith("_") and name not in changing):
                found[name, key] = id(value)
            if isinstance(value, type) and value.__flags__ & HEAP:
                own = vars(value)
                found |= {(name, key, part): id(own[part]) for part in own if type(own[part]) in METHODS}
                if mocked is not None:
                    places = [(name, key, part) for part in own if _is_mock(own[part])]
                    found |= {place: mocked.get(place) for place in places}
    return found


def in_tests(space: dict[str, Any], names: tuple[str, ...], base: type, mocked: Identities | None = None) -> Identities:
    """Identity of what the tests have made by these names, of the methods of their classes, and what a class of tests
    has in the place of unittest's; of a mock, what `mocked` has there."""
    found: Identities = {}
    for name in names:
        value = space.get(name)
        if mocked is not None and _is_mock(value):
            found |= {place: mocked[place] for place in mocked if place[0] == name}
        elif isinstance(value, type) and value.__module__ == space["__name__"]:
            found |= {(name, part): _identity(item) for part, item in vars(value).items() if type(item) in METHODS}
            if issubclass(value, base):
                found[name,] = id(value), [part for part in vars(value) if _is_unittests(part, base)]
        elif not isinstance(value, types.ModuleType):
            found[name,] = _identity(value)
    return found


def _is_unittests(name: str, base: type) -> bool:
    return name == "__unittest_skip__" or callable(getattr(base, name, None))


def _is_mock(value: Any) -> bool:
    return type(type(value)) is type and type(value).__module__ == "unittest.mock"


def _is_of_file(module: Any) -> bool:
    return str(getattr(module, "__file__", "")).startswith(f"{FOLDER}/")


def is_same(before: Identities, after: Identities) -> bool:
    """Whether all is there as it was; modules that were imported since are no change."""
    return all(after.get(key) == value for key, value in before.items())


def _identity(value: Any) -> tuple[int, ...]:
    return tuple(id(getattr(value, part, value)) for part in ("__code__", "__defaults__", "__kwdefaults__"))
