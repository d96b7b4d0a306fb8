"""Ai2 open-instruct's forms: `POST /test_program` and `POST /test_program_stdio`, as its code verifier calls them."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from fastgrpo_sandbox.columns import read_tests
from fastgrpo_sandbox.remote import RunRequest
from fastgrpo_sandbox.serving.jails import Jails, Lost, Refused
from fastgrpo_sandbox.types import MOST_CASES, AssertTests, Outcome, StdioTests, Tests

NOT_RUN = -1.0
KEPT_BYTES = 1 << 16  # of what each test's jail prints, which nobody is told


class TestProgram(msgspec.Struct):
    """max_execution_time: seconds for each test. tests: a list, or JSON of one."""

    program: str
    tests: Any
    max_execution_time: float = 1.0


class TestResults(msgspec.Struct):
    """For each test 1 (passed) or 0, and its seconds; -1 where it did not pass."""

    results: list[int]
    runtimes: list[float]


async def test_program(jails: Jails, request: TestProgram) -> TestResults:
    """Judges every test on its own. They share one jail, and only where that did not end well each gets its own.

    Raises Refused and Lost.
    """
    texts = [_text(test) for test in await _tests(jails, request)]
    seconds = request.max_execution_time
    if texts and all("assert" in text for text in texts):
        together = await _judged(jails, request.program, AssertTests(tuple(texts)), seconds * len(texts))
        if together.status in ("ok", "failed"):
            return _results(together.tests, together.wall_s / len(texts))
    read = await jails.read(_readable, texts)
    jobs = {i: tests for i, tests in enumerate(read) if tests is not None}
    limits = jails.limits(seconds, output_bytes=KEPT_BYTES)
    outcomes = await jails.run_all([RunRequest(request.program, tests=tests, limits=limits) for tests in jobs.values()])
    if any(outcome.status == "infrastructure" for outcome in outcomes):
        raise Lost
    seconds_of = {i: one.wall_s for i, one in zip(jobs, outcomes, strict=True) if one.status == "ok"}
    runtimes = [seconds_of.get(i, NOT_RUN) for i in range(len(texts))]
    return TestResults([int(i in seconds_of) for i in range(len(texts))], runtimes)


async def test_program_stdio(jails: Jails, request: TestProgram) -> TestResults:
    """One fresh jail for each input; outputs are compared as StdioTests compares them. Raises Refused and Lost."""
    tests = await _tests(jails, request)
    if not all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        raise Refused('tests must be objects such as {"input": "1\\n", "output": "2\\n"}')
    cases = StdioTests(tuple((str(test["input"]), str(test["output"])) for test in tests))
    outcome = await _judged(jails, request.program, cases, request.max_execution_time)
    return _results(outcome.tests, outcome.wall_s)


async def _judged(jails: Jails, program: str, tests: Tests, seconds: float) -> Outcome:
    outcome = await jails.run(RunRequest(program, tests=tests, limits=jails.limits(seconds)))
    if outcome.status == "infrastructure":
        raise Lost
    return outcome


def _results(passed: list[bool] | tuple[bool, ...], seconds: float) -> TestResults:
    return TestResults([int(one) for one in passed], [seconds if one else NOT_RUN for one in passed])


async def _tests(jails: Jails, request: TestProgram) -> list[Any]:
    tests = request.tests
    if isinstance(tests, str):
        try:
            tests = await jails.read(json.loads, tests)
        except (ValueError, RecursionError):
            raise Refused("tests must be a list or JSON of one: pickled tests would run outside the jails") from None
    if not isinstance(tests, list) or len(tests) > MOST_CASES:
        raise Refused(f"tests must be a list of at most {MOST_CASES}")
    return tests


def _text(test: Any) -> str:
    if not isinstance(test, str):
        raise Refused("tests must be texts, each an assertion or a few statements")
    return test


def _readable(texts: list[str]) -> list[Tests | None]:
    """The tests; None where one is no Python: it fails, and the others count."""
    found: list[Tests | None] = []
    for text in texts:
        try:
            found.append(read_tests({"test": text}))
        except ValueError:
            found.append(None)
    return found
