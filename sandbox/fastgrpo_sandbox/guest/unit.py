"""unittest in the solution's own process: hardened, and labelled as same-process by the host.

The verdict counts only with a secret that the native module holds outside of Python and adds for the one frame
that ran the tests. `unittest`, the builtins and the comparisons (honest.py) must be the same after the solution's
import, and after the tests, as before (watched.py). So must the functions, methods and constants of the modules that
the tests import, but for what a mock of theirs stands in for at their end; the classes that run the tests are those
from before. All this stops what cheats on the side, not what sets out to deceive this very file: see UnittestTests.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.machinery
import marshal
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import _jail

from . import arrays, honest, mocks
from .known import library_place
from .names import lent_name
from .skips import skipped
from .watched import UNWATCHED, WATCHED, deciding, in_modules, in_tests, is_same
from .wire import result_body

# Python's own, before any solution.
EXCEPTIONS = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}
OWN_NAMES = frozenset({"solution", "__main__", ""})  # by which tests may import the solution


def run(job: dict[str, Any], load: Callable[[str, str], Any]) -> None:
    """Executes the solution, then the tests in its namespace, and sends one verdict for each test of the text."""
    _jail.keep()
    import unittest  # 10 ms that other jobs need not pay for

    tests = marshal.loads(job["tests"])
    honest.guard(unittest.TestCase, job["classes"], tests)
    # As they are now, before the solution can put others in their places.
    send, body, run_tests = _jail.verdict, result_body, _run_tests
    everywhere, modules, own, same = deciding, in_modules, in_tests, is_same
    result, suite, case = _result(unittest.TestResult), unittest.TestSuite, unittest.TestCase
    names, imported = job["names"], _imported(job["modules"])
    imported += () if job["fills"] else _of_files(job["modules"], job["files"])
    left_out = skipped(job["skips"])
    given = _given(job["given"], marshal.dumps)
    bare, absent = modules(imported), _absent(job["modules"], job["files"])
    loaded: dict[str, Any] = sys.modules
    before = everywhere() | bare
    asserted = mocks.asserting(honest.is_lie) if job["mocks"] else mocks.asserted
    module = sys.modules["__main__"] = load(job["code"], "solution")  # what it does as a program is not asked
    hidden = [each for each in loaded if each.partition(".")[0] in absent]
    loaded.update(dict.fromkeys([*hidden, *absent]))  # nothing can import None
    space = vars(module)
    space["__name__"] = "__main__"  # for the tests
    changed = not same(before, everywhere() | modules(imported)) or space.get("__builtins__") is not builtins
    changed = changed or _catches_others(space)
    guards = {"__compare__": honest.compare, "__subtract__": honest.subtract, "__agree__": honest.agree}
    guards |= {"__some__": arrays.some, "__asserted__": asserted, "__given__": given(space)}
    guards |= _lent(space, job["lent"])
    space |= guards
    if not changed:
        exec(tests, space)
        made = own(space, job["own"], case)
        asked = tuple(name for i, name in enumerate(names) if i not in left_out)
        passed = run_tests(space, asked, result, suite, case)
        passed |= set(names).difference(asked) if asked else set()
        changed = not same(before, everywhere() | modules(imported, bare if job["mocks"] else None))
        changed = changed or not same(made, own(space, job["own"], case, made if job["mocks"] else None))
        changed = changed or any(space.get(name) is not each for name, each in guards.items()) or _catches_others(space)
        changed = changed or (not job["fills"] and any(loaded.get(name) is not None for name in absent))
    errors = "\n".join(text for _, text in result.failures + result.errors)
    if changed:
        passed, errors = set(), "the solution changed unittest, the builtins or a module of the tests, or the tests"
    with contextlib.suppress(Exception):  # the tests may have left it closed, or anything in its place
        sys.stdout.flush()
    send(body(errors, tests=[name in passed for name in names]))


def _given(data: dict[str, bytes], dumps: Callable[..., bytes]) -> Callable[..., Callable[[str], Any]]:
    """What tests read by the names of their setup's data, in a solution's namespace: what the solution has there, which
    its functions may change, where that is the same; else the data, whatever the solution has made of the name."""
    values = {name: marshal.loads(each) for name, each in data.items()}

    def bound(space: dict[str, Any]) -> Callable[[str], Any]:
        other = {name: value for name, value in values.items() if not is_data(space.get(name), data[name])}
        for name, value in other.items():
            space.setdefault(name, value)
        return lambda name: other[name] if name in other else space[name]

    def is_data(value: Any, wanted: bytes) -> bool:
        try:
            return dumps(value, 0) == wanted  # of plain data alone, whatever its classes say
        except ValueError:
            return False

    return bound


def _catches_others(space: dict[str, Any]) -> bool:
    """Whether the tests would find another of Python's exceptions by the name of one, or what counts others in."""
    given = {name: value for name, value in space.items() if name in EXCEPTIONS}
    known = set(map(id, EXCEPTIONS.values()))
    return any(
        type(each) is not type or (id(each) in known and each is not EXCEPTIONS[name]) for name, each in given.items()
    )


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
    """The names of the tests that passed."""
    classes: dict[str, list[str]] = {}
    for name in names:
        class_name, _, method = name.partition(".")
        classes.setdefault(class_name, []).extend([method] if method else _made(space[class_name]))
    for class_name, methods in classes.items():
        case: Any = space[class_name]
        if not (isinstance(case, type) and issubclass(case, base)):
            continue
        suite(_finished(case(method), method) for method in methods).run(result)  # type: ignore[call-arg]
        if methods and all(f"{class_name}.{method}" in result.passed for method in methods):
            result.passed.add(class_name)
    return result.passed


def _finished(test: Any, method: str) -> Any:
    """A test that fails where its method only makes a coroutine or generator, which unittest would drop."""
    function = getattr(test, method)
    if hasattr(test, "asyncSetUp"):  # which awaits them
        return test

    def run(*given: Any) -> None:
        made = function(*given)
        if isinstance(made, types.CoroutineType | types.GeneratorType):
            made.close()
            raise AssertionError(f"{method} makes a {type(made).__name__} that nothing runs")

    vars(run).update(vars(function))  # as expectedFailure marks it
    setattr(test, method, run)
    return test


def _made(case: type) -> list[str]:
    return [name for name in dir(case) if name.startswith("test") and callable(getattr(case, name))]


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


def _absent(names: tuple[str, ...], files: Iterable[str]) -> frozenset[str]:
    """The packages of these modules that are not there: the tests may have something in their place, and a solution is
    not to give them what it likes by such a name. Of the job's files the tests or the solution may find any, by a path
    of their own."""
    beside = {part.removesuffix(".py") for path in files for part in path.split("/")}
    tops = {name.partition(".")[0] for name in names} - OWN_NAMES - beside
    known = sys.stdlib_module_names.union(sys.modules)
    return frozenset(top for top in tops - known if importlib.machinery.PathFinder.find_spec(top) is None)


def _of_files(names: tuple[str, ...], files: Iterable[str]) -> tuple[str, ...]:
    """The modules of these names that are the job's own files, and those that they import: they are imported here,
    before the solution can write others there. What cannot be without the solution is left to the tests."""
    before = set(sys.modules)
    places = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files}
    for name in sorted(places.intersection(names) - OWN_NAMES):
        with contextlib.suppress(Exception, SystemExit):
            importlib.import_module(name)
    return tuple(name for name in sys.modules.keys() - before if name in places)


def _imported(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of these names that are modules, of the library or of a package that is there already, without the solution
    and those that are watched or left alone anyway."""
    known = (*WATCHED, *UNWATCHED, *OWN_NAMES)
    for name in names:
        top = name.partition(".")[0]
        if name not in sys.modules and (top in sys.stdlib_module_names or top in sys.modules):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return tuple(name for name in names if name in sys.modules and name not in known)
