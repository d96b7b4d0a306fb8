"""unittest in the solution's own process: hardened, and labelled as same-process by the host.

The verdict counts only with a secret that the native module holds outside of Python and adds for the one frame
that ran the tests. `unittest` and the builtins must be the same after the tests as before the solution.
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
    _jail.keep(job.pop("secret"))
    names = unittest_names(job["source"])
    before = _fingerprint()
    passed, errors = _run_tests(job, load, names)
    if _fingerprint() != before:
        passed, errors = set(), "the solution changed unittest or the builtins"
    sys.stdout.flush()
    tests = [name in passed for name in names]
    _jail.verdict(result_body(errors, tests=tests))


def _run_tests(job: dict[str, Any], load: Callable[[str, str], Any], names: tuple[str, ...]) -> tuple[set[str], str]:
    import unittest  # 10 ms that other jobs need not pay for

    class Result(unittest.TestResult):
        def __init__(self) -> None:
            super().__init__()
            self.passed: set[str] = set()

        def addSuccess(self, test: unittest.TestCase) -> None:
            self.passed.add(f"{type(test).__name__}.{test._testMethodName}")

    result = Result()
    module = load(job["code"], "__main__")
    exec(compile(job["setup"] + "\n" + job["source"], "tests.py", "exec"), module.__dict__)
    classes: dict[str, list[str]] = {}
    for name in names:
        class_name, method = name.split(".")
        classes.setdefault(class_name, []).append(method)
    for class_name, methods in classes.items():
        case = getattr(module, class_name)
        unittest.TestSuite(case(method) for method in methods).run(result)
    return result.passed, "\n".join(text for _, text in result.failures + result.errors)


def _fingerprint() -> dict[tuple[str, str], int]:
    """Identity of every builtin and of the code of everything that decides a unittest's result."""
    found = {("builtins", name): id(value) for name, value in vars(builtins).items() if name != "_"}
    for module in map(importlib.import_module, WATCHED):
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {(f"{name}.{key}", module.__name__): _identity(item) for key, item in vars(value).items()}
            elif not name.startswith("_"):
                found[module.__name__, name] = _identity(value)
    return found


def _identity(value: Any) -> int:
    return id(getattr(value, "__code__", value))
