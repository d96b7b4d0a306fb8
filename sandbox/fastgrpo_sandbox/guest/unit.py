"""unittest in the solution's own process: hardened, and labelled as same-process by the host.

The verdict counts only with a secret that the native module holds outside of Python and adds for the one frame
that ran the tests. `unittest`, the builtins and the comparisons (honest.py) must be the same after the solution's
import, and after the tests, as before, and likewise the functions, methods and constants of the modules that the tests
import, but for what a mock of theirs stands in for at their end; the classes that run the tests are those from before.
All this stops what cheats on the side, not what sets out to deceive this very file: see UnittestTests.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import marshal
import sys
import types
from collections.abc import Callable
from typing import Any

import _jail

from . import arrays, honest
from .known import library_place
from .names import lent_name
from .wire import result_body

HEAP = 1 << 9  # of a class' flags: what it has can be changed
CONSTANTS = frozenset({int, float, complex, str, bytes, tuple, frozenset})
METHODS = frozenset({types.FunctionType, types.WrapperDescriptorType, property, classmethod, staticmethod})
UNWATCHED = ("sys",)  # whose hooks and streams are there to be replaced
CHANGING = ("time", "tempfile")  # whose texts and numbers follow the time zone and the first use
WATCHED: tuple[str, ...] = ("unittest", "unittest.case", "unittest.result", "unittest.suite", "contextlib")
WATCHED += (honest.__name__, arrays.__name__)


def run(job: dict[str, Any], load: Callable[[str, str], Any]) -> None:
    """Executes the solution, then the tests in its namespace, and sends one verdict for each test of the text."""
    _jail.keep()
    import unittest  # 10 ms that other jobs need not pay for

    tests = marshal.loads(job["tests"])
    honest.guard(unittest.TestCase, job["classes"], tests)
    send, body, run_tests, fingerprint, is_same = _jail.verdict, result_body, _run_tests, _fingerprint, _is_same
    result, suite, case = _result(unittest.TestResult), unittest.TestSuite, unittest.TestCase  # as they are now
    names, lent = job["names"], _imported(job["modules"])
    before, functions, own = fingerprint(), _functions, _own
    bare = functions(lent)
    module = sys.modules["__main__"] = load(job["code"], "solution")  # what it does as a program is not asked
    space = vars(module)
    space["__name__"] = "__main__"  # for the tests
    changed = not is_same(before | bare, fingerprint() | functions(lent)) or space.get("__builtins__") is not builtins
    guards = {"__compare__": honest.compare, "__subtract__": honest.subtract, "__agree__": honest.agree}
    guards |= {"__some__": arrays.some, **_lent(space, job["lent"])}
    space |= guards
    if not changed:
        exec(tests, space)
        made = own(space, job["own"], case)
        passed = run_tests(space, names, result, suite, case)
        changed = not is_same(before | bare, fingerprint() | functions(lent, bare if job["mocks"] else None))
        changed = changed or not is_same(made, own(space, job["own"], case, made if job["mocks"] else None))
        changed = changed or any(space.get(name) is not each for name, each in guards.items())
    errors = "\n".join(text for _, text in result.failures + result.errors)
    if changed:
        passed, errors = set(), "the solution changed unittest, the builtins or a module of the tests, or the tests"
    with contextlib.suppress(Exception):  # the tests may have left it closed, or anything in its place
        sys.stdout.flush()
    send(body(errors, tests=[name in passed for name in names]))


def _result(base: Any) -> Any:
    class Result(base):
        def __init__(self) -> None:
            super().__init__()
            self.passed: set[str] = set()

        def addSuccess(self, test: Any) -> None:
            self.passed.add(f"{type(test).__name__}.{test._testMethodName}")

        def addExpectedFailure(self, test: Any, error: Any) -> None:
            self.addSuccess(test)

    return Result()


def _run_tests(space: dict[str, Any], names: tuple[str, ...], result: Any, suite: Any, base: type) -> set[str]:
    """The names of the tests that passed. What a decorator of the tests skips here passes: nothing is asked."""
    classes: dict[str, list[str]] = {}
    for name in names:
        class_name, _, method = name.partition(".")
        classes.setdefault(class_name, []).extend([method] if method else _made(space[class_name]))
    for class_name, methods in classes.items():
        case: Any = space[class_name]
        if not (isinstance(case, type) and issubclass(case, base)):
            continue
        result.passed |= {f"{class_name}.{method}" for method in methods if _is_skipped(case, method)}
        suite(case(method) for method in methods).run(result)  # type: ignore[call-arg]
        if methods and all(f"{class_name}.{method}" in result.passed for method in methods):
            result.passed.add(class_name)
    return result.passed


def _made(case: type) -> list[str]:
    return [name for name in dir(case) if name.startswith("test") and callable(getattr(case, name))]


def _is_skipped(case: Any, method: str) -> bool:
    return any(getattr(each, "__unittest_skip__", False) for each in (case, getattr(case, method)))


def _fingerprint() -> dict[tuple[str, ...], Any]:
    """Identity of every builtin, of the modules that decide a unittest's result, and of the code and defaults of all
    that is in them."""
    found: dict[tuple[str, ...], Any] = {("builtins", name): id(value) for name, value in vars(builtins).items()}
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


def _lent(space: dict[str, Any], modules: dict[str, str]) -> dict[str, Any]:
    """The modules that the tests use without an import, by the names that they have there (names.py): what the
    solution has imported by its name, or else the module, since a class `np` of its own would answer for numpy."""
    found: dict[str, Any] = {}
    for name, module in modules.items():
        value = space.get(name)
        is_imported = isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value
        if is_imported or library_place(value) is not None:  # as by `from datetime import datetime`
            found[lent_name(name)] = value
        else:
            with contextlib.suppress(ImportError):
                found[lent_name(name)] = importlib.import_module(module)
    return found


def _imported(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of these names that are modules, of the library or of a package that is there already, without those that
    are watched or left alone anyway."""
    for name in names:
        top = name.partition(".")[0]
        if name not in sys.modules and (top in sys.stdlib_module_names or top in sys.modules):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return tuple(name for name in names if name in sys.modules and name not in (*WATCHED, *UNWATCHED))


def _functions(
    modules: tuple[str, ...], mocked: dict[tuple[str, ...], Any] | None = None
) -> dict[tuple[str, ...], Any]:
    """Identity of the modules, of the functions, classes and constants in them and of what these classes have; of a
    mock, what `mocked` has there."""
    found: dict[tuple[str, ...], Any] = {}
    for name in modules:
        module = sys.modules.get(name)
        found["sys.modules", name] = id(module)
        for key, value in getattr(module, "__dict__", {}).items():
            if type(value) is types.FunctionType:
                found[name, key] = (id(value.__code__), id(value.__defaults__))
            elif mocked is not None and _is_mock(value):
                found[name, key] = mocked.get((name, key))
            elif callable(value) or (type(value) in CONSTANTS and not key.startswith("_") and name not in CHANGING):
                found[name, key] = id(value)
            if isinstance(value, type) and value.__flags__ & HEAP:
                own = vars(value)
                found |= {(name, key, part): id(own[part]) for part in own if type(own[part]) in METHODS}
                if mocked is not None:
                    places = [(name, key, part) for part in own if _is_mock(own[part])]
                    found |= {place: mocked.get(place) for place in places}
    return found


def _own(
    space: dict[str, Any], names: tuple[str, ...], base: type, mocked: dict[tuple[str, ...], Any] | None = None
) -> dict[tuple[str, ...], Any]:
    """Identity of what the tests have made by these names, of the methods of their classes, and what a class of tests
    has in the place of unittest's; of a mock, what `mocked` has there."""
    found: dict[tuple[str, ...], Any] = {}
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


def _is_same(before: dict[tuple[str, ...], Any], after: dict[tuple[str, ...], Any]) -> bool:
    """Whether all is there as it was; modules that were imported since are no change."""
    return all(after.get(key) == value for key, value in before.items())


def _identity(value: Any) -> tuple[int, ...]:
    return tuple(id(getattr(value, part, value)) for part in ("__code__", "__defaults__", "__kwdefaults__"))
