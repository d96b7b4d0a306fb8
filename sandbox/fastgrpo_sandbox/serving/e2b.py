"""The E2B router's form: `POST /execute_batch`, as open-r1 calls it. Each script is a notebook cell on its own: the
value of its last expression, where it has one, is the execution's main result."""

from __future__ import annotations

import ast
import secrets
from typing import Any

import msgspec

from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.remote import RunRequest
from fastgrpo_sandbox.serving.jails import Jails, Refused, python_only
from fastgrpo_sandbox.types import Outcome

MAX_SCRIPTS = 4096
MOST_OUTPUT = 128 << 20  # bytes that the scripts of a batch may print together, since they are answered together
LEAST_OUTPUT = 1 << 16  # that each may in any case
UNFINISHED = {"timeout": "the script ran out of time", "infrastructure": ""}


class Batch(msgspec.Struct):
    """timeout: seconds for each script. languages: one for each script; `language`: one for all."""

    scripts: list[str]
    languages: list[str] | None = None
    language: str = "python"
    timeout: float = 300.0


class Logs(msgspec.Struct):
    stdout: list[str]
    stderr: list[str]


class ExecutionError(msgspec.Struct):
    name: str
    value: str
    traceback: str


class Execution(msgspec.Struct):
    results: list[dict[str, Any]]
    logs: Logs
    error: ExecutionError | None
    execution_count: int | None = 1


class ScriptResult(msgspec.Struct):
    """An execution, or why there is none: time ran out, or the jail failed."""

    execution: Execution | None
    exception_str: str | None = None


async def execute_batch(jails: Jails, batch: Batch) -> list[ScriptResult]:
    """Results in the order of the scripts, which run side by side. Raises Refused."""
    languages = batch.languages or [batch.language] * len(batch.scripts)
    if len(batch.scripts) > MAX_SCRIPTS or len(languages) != len(batch.scripts):
        raise Refused(f"a batch has at most {MAX_SCRIPTS} scripts and as many languages")
    python_only(*languages)
    mark = "\x1e" + secrets.token_hex(16)
    room = max(LEAST_OUTPUT, MOST_OUTPUT // max(1, len(batch.scripts)))
    limits = jails.limits(batch.timeout, output_bytes=room)
    scripts = await jails.read(_showing_values, batch.scripts, mark)
    jobs = [RunRequest(script, limits=limits) for script in scripts]
    return [_result(outcome, mark) for outcome in await jails.run_all(jobs)]


def _showing_values(scripts: list[str], mark: str) -> list[str]:
    return [showing_value(script, mark) for script in scripts]


def showing_value(script: str, mark: str) -> str:
    """`script`, which at its end prints `mark` and the repr of its last expression's value, unless that is None. Its
    lines keep their numbers. A script that does not parse stays as it is."""
    try:
        last = parse(script).body[-1]
    except (SyntaxError, ValueError, IndexError):
        return script
    if not isinstance(last, ast.Expr):
        return script
    lines = script.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: last.lineno - 1])) + last.col_offset
    end = sum(map(len, lines[: (last.end_lineno or last.lineno) - 1])) + (last.end_col_offset or 0)
    whole = b"".join(lines)
    head, value, tail = (part.decode() for part in (whole[:start], whole[start:end], whole[end:]))
    show = f"if _ is not None: print({mark!r} + repr(_), end='', file=__import__('sys').__stdout__)"
    return f"{head}_ = ({value}\n){tail}\n{show}\n"


def _result(outcome: Outcome, mark: str) -> ScriptResult:
    if outcome.status in UNFINISHED:
        return ScriptResult(None, UNFINISHED[outcome.status] or outcome.error)
    stdout, marked, value = outcome.stdout.rpartition(mark)
    results = [{"text": value, "is_main_result": True}] if marked else []
    logs = Logs(_messages(stdout if marked else outcome.stdout), _messages(outcome.stderr))
    return ScriptResult(Execution(results, logs, None if outcome.status == "ok" else _error(outcome)))


def _messages(text: str) -> list[str]:
    return [text] if text else []


def _error(outcome: Outcome) -> ExecutionError:
    """The exception in a traceback's last line, or the limit that ended the script."""
    last = (outcome.error.strip().splitlines() or [""])[-1]
    name, colon, value = last.partition(": ")
    if name.isidentifier():
        return ExecutionError(name, value if colon else "", outcome.error)
    return ExecutionError(outcome.status, last, outcome.error)
