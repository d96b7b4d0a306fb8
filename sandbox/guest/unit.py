"""unittest in the solution's own process: hardened, and labelled as same-process by the host."""

from __future__ import annotations

import sys
import unittest
from collections.abc import Callable
from typing import Any

from .instrument import unittest_names
from .wire import send_result


class _Result(unittest.TestResult):
    """Names of the tests that ended well."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: set[str] = set()

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.passed.add(f"{type(test).__name__}.{test._testMethodName}")


def run(job: dict[str, Any], load: Callable[[str], Any]) -> None:
    """Executes the solution, then the tests in its namespace, and sends one verdict for each test of the text."""
    names = unittest_names(job["source"])
    result = _Result()
    module = load(job["code"])
    exec(compile(job["setup"] + "\n" + job["source"], "tests.py", "exec"), module.__dict__)
    loader = unittest.TestLoader()
    for name in names:
        class_name, method = name.split(".")
        case = getattr(module, class_name)
        unittest.TestSuite([case(method)]).run(result)
    sys.stdout.flush()
    errors = "\n".join(text for _, text in result.failures + result.errors)
    send_result(error=errors, tests=[name in result.passed for name in names])
    del loader
