"""SandboxFusion's forms: `POST /run_code` and `POST /submit`, as its own client, verl and Tinker's recipes call them.

Python is the one language. Files that a run leaves behind are not collected, and there are no data sets on the server:
a submission brings its row in `config.provided_data`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from fastgrpo_sandbox.calls import with_imports
from fastgrpo_sandbox.columns import read_tests
from fastgrpo_sandbox.extract import extract_code
from fastgrpo_sandbox.remote import RunRequest
from fastgrpo_sandbox.serving.jails import Jails, Lost, Refused, python_only
from fastgrpo_sandbox.types import Outcome, StdioTests, Tests

SUBMIT_S = 20.0
KILLED = -9


class RunCode(msgspec.Struct):
    """Seconds for times; memory_limit_MB in MiB, -1 for the server's own; files by relative path, base64."""

    code: str
    language: str
    run_timeout: float = 10.0
    memory_limit_MB: int = -1
    stdin: str | None = None
    files: dict[str, bytes | None] = {}
    fetch_files: list[str] = []


class CommandResult(msgspec.Struct):
    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    execution_time: float
    return_code: int | None
    stdout: str
    stderr: str


class RunCodeAnswer(msgspec.Struct):
    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    compile_result: CommandResult | None = None
    run_result: CommandResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = {}


class SubmitConfig(msgspec.Struct):
    language: str | None = None
    run_timeout: float | None = None
    custom_extract_logic: str | None = None
    provided_data: dict[str, Any] | list[dict[str, Any]] | None = None


class Submit(msgspec.Struct):
    dataset: str
    id: int | str
    completion: str
    config: SubmitConfig


class TestCase(msgspec.Struct):
    passed: bool
    exec_info: RunCodeAnswer
    test_info: dict[str, Any] | None = None


class SubmitAnswer(msgspec.Struct):
    id: int | str
    accepted: bool
    extracted_code: str
    tests: list[TestCase]
    full_code: str | None = None
    test_code: str | None = None
    extracted_type: Literal["fenced", "heuristic", "empty"] = "fenced"
    extra: dict[str, Any] | None = None


async def run_code(jails: Jails, request: RunCode) -> RunCodeAnswer:
    """Runs one script; "Success" is on its own word, as an exit status is. Raises Refused."""
    python_only(request.language)
    if request.fetch_files:
        raise Refused("fetch_files is not offered: print what you need")
    files = {path: content for path, content in request.files.items() if content is not None}
    limits = jails.limits(request.run_timeout, request.memory_limit_MB)
    return run_answer(await jails.run(RunRequest(request.code, request.stdin or "", files, limits=limits)))


async def submit(jails: Jails, request: Submit) -> SubmitAnswer:
    """Judges a chat answer by its row's tests: accepted when all pass. Raises Refused and Lost."""
    python_only(request.config.language or "python")
    if request.config.custom_extract_logic:
        raise Refused("custom_extract_logic is not offered: send the extracted code as the completion")
    limits = jails.limits(request.config.run_timeout or SUBMIT_S)
    code, program, tests, files = await jails.read(_submission, request)
    outcome = await jails.run(RunRequest(program, files=files, tests=tests, limits=limits))
    if outcome.status == "infrastructure":
        raise Lost
    if outcome.status == "rejected":
        raise Refused(outcome.error)
    return SubmitAnswer(
        id=request.id,
        accepted=outcome.status == "ok",
        extracted_code=code,
        tests=[TestCase(passed, _test_info(passed, outcome)) for passed in outcome.tests],
        extracted_type="empty" if not code else "fenced" if "```" in request.completion else "heuristic",
    )


def _submission(request: Submit) -> tuple[str, str, Tests, dict[str, bytes]]:
    """The answer's code, the program to run, and its tests and files. Raises Refused."""
    code = extract_code(request.completion)
    tests, files = _row_tests(_row(request), code)
    return code, with_imports(code, tests), tests, files


def run_answer(outcome: Outcome) -> RunCodeAnswer:
    """An outcome in SandboxFusion's words."""
    if outcome.status == "infrastructure":
        return RunCodeAnswer("SandboxError", message=outcome.error)
    late = outcome.status == "timeout"
    code = {"ok": 0, "timeout": None, "killed": KILLED, "memory": KILLED}.get(outcome.status, 1)
    code, error = _exited(outcome.error) if code == 1 else (code, outcome.error)
    said = outcome.stderr if error in outcome.stderr else outcome.stderr + error
    result = CommandResult("TimeLimitExceeded" if late else "Finished", outcome.wall_s, code, outcome.stdout, said)
    return RunCodeAnswer("Success" if outcome.status == "ok" else "Failed", run_result=result)


def _exited(error: str) -> tuple[int, str]:
    """(exit status, what stands on stderr) of a script that ended by `error`: Python shows no traceback of sys.exit."""
    _, exited, code = error.rpartition("\nSystemExit: ")
    if not exited or "\nTraceback (most recent call last)" in code:
        return 1, error  # another exception came after it
    try:
        return int(code) & 0xFF, ""
    except ValueError:
        return 1, code


def _test_info(passed: bool, outcome: Outcome) -> RunCodeAnswer:
    """One test's; what was printed belongs to all of them and is left out."""
    shown = Outcome("ok") if passed else outcome
    return run_answer(msgspec.structs.replace(shown, stdout="", wall_s=outcome.wall_s))


def _row(request: Submit) -> Mapping[str, Any]:
    rows = request.config.provided_data
    if isinstance(rows, dict):
        return rows
    for row in rows or ():
        if str(row.get("id")) == str(request.id):
            return row
    raise Refused("this server holds no data sets: send the row, with its id and test, in config.provided_data")


def _row_tests(row: Mapping[str, Any], code: str) -> tuple[Tests, dict[str, bytes]]:
    """Tests and files of a row: CommonOJ's input and output, AutoEval's code, MBPP's list or HumanEval's text."""
    test, labels = _plain(row.get("test")), _plain(row.get("labels")) or {}
    if not isinstance(labels, dict):
        raise Refused("labels must be an object, or JSON of one")
    try:
        if isinstance(test, list) and test and all(isinstance(case, dict) for case in test):
            cases = [(_stream(case, "input", "stdin"), _stream(case, "output", "stdout")) for case in test]
            return StdioTests(tuple(cases)), {}
        if isinstance(test, dict) and "code" in test:
            files = msgspec.convert(test.get("asset") or {}, dict[str, bytes])
            return read_tests({**labels, "test": test["code"]}, code), files
        return read_tests({**labels, "test": test}, code), {}
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"the row's test is not understood: {error}") from None


def _stream(case: dict[str, Any], side: str, name: str) -> str:
    value = case[side]
    return str(value[name] if isinstance(value, dict) else value)


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
