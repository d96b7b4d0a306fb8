"""unittest in the solution's own process: hardened, and labelled as same-process by the host.

The verdict counts only with a secret that the native module holds outside of Python and adds for the one frame
that ran the tests. `unittest` and the builtins must be the same after the solution's import, and after the tests, as
before. All this stops what cheats on the side, not what sets out to deceive this very file: see UnittestTests.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable
from typing import Any

import _jail

from .instrument import unittest_names
from .wire import result_body

WATCHED = ("unittest.case", "unittest.result", "unittest.suite")


def run(job: dict[str, Any], load: Callable[[str, str], Any]) -> None:
    """Executes the solution, then the tests in its namespace, and sends one verdict for each test of the text."""
    _jail.keep()
    import unittest  # 10 ms that other jobs need not pay for

    send, body, run_tests, fingerprint = _jail.verdict, result_body, _run_tests, _fingerprint  # as they are now
    names = unittest_names(job["source"])
    before = fingerprint()
    module = load(job["code"], "__main__")
    changed = fingerprint() != before
    passed, errors = run_tests(unittest, module, job["setup"] + "\n" + job["source"], names)
    if changed or fingerprint() != before:
        passed, errors = set(), "the solution changed unittest or the builtins"
    sys.stdout.flush()
    tests = [name in passed for name in names]
    send(body(errors, tests=tests))


def _run_tests(unittest: Any, module: Any, source: str, names: tuple[str, ...]) -> tuple[set[str], str]:
    class Result(unittest.TestResult):
        def __init__(self) -> None:
            super().__init__()
            self.passed: set[str] = set()

        def addSuccess(self, test: Any) -> None:
            self.passed.add(f"{type(test).__name__}.{test._testMethodName}")

    result = Result()
    exec(compile(source, "tests.py", "exec"), module.__dict__)
    classes: dict[str, list[str]] = {}
    for name in names:
        class_name, method = name.split(".")
        classes.setdefault(class_name, []).append(method)
    for class_name, methods in classes.items():
        case = getattr(module, class_name)
        unittest.TestSuite(case(method) for method in methods).run(result)
    return result.passed, "\n".join(text for _, text in result.failures + result.errors)


def _fingerprint() -> dict[tuple[str, str], tuple[int, ...]]:
    """Identity of every builtin and of the code and defaults of everything that decides a unittest's result."""
    found: dict[tuple[str, str], tuple[int, ...]]
    found = {("builtins", name): (id(value),) for name, value in vars(builtins).items() if name != "_"}
    for module in map(importlib.import_module, WATCHED):
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {(f"{name}.{key}", module.__name__): _identity(item) for key, item in vars(value).items()}
            elif not name.startswith("_"):
                found[module.__name__, name] = _identity(value)
    return found


def _identity(value: Any) -> tuple[int, ...]:
    return tuple(id(getattr(value, part, value)) for part in ("__code__", "__defaults__", "__kwdefaults__"))
