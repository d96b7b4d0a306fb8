"""From what the kernel and the fork server report to an Outcome. Runs on the host; trusts no job about itself."""

from __future__ import annotations

import os
import signal
import struct
from typing import Any

import msgspec

from fastgrpo_sandbox.types import ErrorBy, Limits, Outcome, Status

DONE = struct.Struct("<IIIIIIQQIIIIII")
NONE, WALL, CPU, MEMORY, OUTPUT, CANCELLED, PROTOCOL, SPAWN = range(8)
Ending = tuple[Status, str, ErrorBy]  # with the error and whose words it is
POLLED, BY_CGROUP = "rlimit + resident polling", "cgroup"
REASONS: dict[int, Ending] = {
    WALL: ("timeout", "wall clock limit reached", "host"),
    CPU: ("timeout", "CPU limit reached", "host"),
    MEMORY: ("memory", "memory limit reached", "host"),
    OUTPUT: ("output_limit", "output limit reached", "host"),
    CANCELLED: ("killed", "cancelled", "host"),
    PROTOCOL: ("failed", "a malformed frame on the jail's channel, or a second result", "host"),
}


class Result(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The one frame with which a process in the jail may end."""

    error: str
    kind: str
    value: None
    tests: list[bool]


class SessionResult(Result, array_like=True, forbid_unknown_fields=True):
    """A session's, which alone has a value."""

    value: Any


class Done(msgspec.Struct):
    """What the fork server measured of one job, and the bytes it collected."""

    reason: int
    status: int
    judge_status: int
    spawn_errno: int
    results: int
    verdicts: int
    cpu_us: int
    wall_us: int
    memory_kb: int
    by_cgroup: int
    stdout: bytes
    stderr: bytes
    result: bytes
    verdict: bytes


def parse_done(body: bytes) -> Done:
    """Splits the body of a DONE frame. Raises struct.error when it is short."""
    *numbers, out, err, result, verdict = DONE.unpack_from(body)
    parts, position = [], DONE.size
    for length in (out, err, result, verdict):
        parts.append(body[position : position + length])
        position += length
    return Done(*numbers, *parts)


class Expected(msgspec.Struct, frozen=True):
    """What counts as a verdict: how many tests, from whom, ended by which secret, and which of the answers count."""

    count: int
    judged: bool
    secret: bytes
    select: tuple[int, ...] | None


def outcome_of(done: Done, limits: Limits, expected: Expected | None, form: type[Result] = Result) -> Outcome:
    """The Outcome of one finished job; `expected` is None for a job without tests, `form` what its result must be."""
    if done.reason == SPAWN:
        return Outcome("infrastructure", error=_spawn_error(done), error_by="host")
    secret = expected.secret if expected else b""
    result = _decode(done.result, form, secret) if done.results == 1 else None
    status, error, error_by = _ending(done, result or _failure(done, secret), limits)
    tests: tuple[bool, ...] = ()
    if expected is not None:
        answers = result if not expected.judged else _decode(done.verdict) if done.verdicts == 1 else None
        tests = _verdicts(answers, expected)
        status, error, error_by = _with_tests(done, (status, error, error_by), tests, expected)
        if expected.judged and answers is not None and answers.kind:
            error, error_by = f"the tests themselves failed: {answers.error}", "jail"
    return Outcome(
        status,
        value=result.value if result and status == "ok" else None,
        stdout=done.stdout.decode(errors="replace"),
        stderr=done.stderr.decode(errors="replace"),
        error=error,
        tests=tests,
        cpu_s=done.cpu_us / 1e6,
        wall_s=done.wall_us / 1e6,
        memory_mb=done.memory_kb / 1024,
        memory_by=BY_CGROUP if done.by_cgroup else POLLED,
        verdict_by="" if expected is None else "judge" if expected.judged else "same-process",
        error_by=error_by if error else "",
    )


def _spawn_error(done: Done) -> str:
    if done.spawn_errno:
        return f"the fork server could not start the job: {os.strerror(done.spawn_errno)}"
    said = (done.result or done.stderr).decode(errors="replace")
    return f"the job's process ended before it was confined (wait status {done.status}) {said}".strip()


def _decode(frame: bytes, form: type[Result] = Result, secret: bytes = b"") -> Result | None:
    if not frame.endswith(secret):
        return None
    try:
        return msgspec.msgpack.decode(frame[: len(frame) - len(secret)], type=form)
    except (msgspec.DecodeError, ValueError, RecursionError):  # a text that is no UTF-8 is a ValueError
        return None


def _failure(done: Done, secret: bytes) -> Result | None:
    """What a same-process job that came to no verdict said of its own failure: an error in its text, or at import."""
    said = _decode(done.result) if secret and done.results == 1 else None
    return said if said is not None and said.kind else None


def _ending(done: Done, result: Result | None, limits: Limits) -> Ending:
    """Status and error of the job's own process; an exit status and most signals are of its choice."""
    if done.reason != NONE:
        return REASONS[done.reason]
    if done.status & 0x7F:
        return _signalled(done.status & 0x7F, done, limits)
    if result is None:
        return "failed", f"ended without a well-formed result (exit status {done.status >> 8})", "jail"
    if result.kind == "MemoryError":
        return "memory", result.error, "jail"
    if result.kind or done.status:
        return "failed", result.error or f"exit status {done.status >> 8}", "jail"
    return "ok", result.error, "jail"


def _signalled(number: int, done: Done, limits: Limits) -> Ending:
    if number in (signal.SIGKILL, signal.SIGXCPU) and done.cpu_us >= limits.cpu_s * 1e6:
        return REASONS[CPU]
    name = signal.Signals(number).name if number in signal.valid_signals() and number < 32 else str(number)
    if number in (signal.SIGKILL, signal.SIGSYS):
        return "killed", f"killed by {name}", "host"
    return "failed", f"killed by {name}", "jail"


def _verdicts(frame: Result | None, expected: Expected) -> tuple[bool, ...]:
    """A pass needs exactly one well-formed frame that answers every test."""
    none_passed = (False,) * expected.count
    if frame is None:
        return none_passed
    if expected.select is None:
        return tuple(frame.tests) if len(frame.tests) == expected.count else none_passed
    if any(index >= len(frame.tests) for index in expected.select):
        return none_passed
    return tuple(frame.tests[index] for index in expected.select)


def _with_tests(done: Done, alone: Ending, tests: tuple[bool, ...], expected: Expected) -> Ending:
    """A judged solution ends when its judge does, so its own end says nothing unless it came with an error."""
    status, error, _ = alone
    if done.reason != NONE:
        return alone
    if tests and all(tests):
        return "ok", "", ""
    ended_by_judge = expected.judged and done.results == 0 and done.status in (0, signal.SIGKILL)
    if ended_by_judge or (status == "ok" and not error):
        return "failed", f"{tests.count(False)} of {len(tests)} tests failed", "host"
    return ("failed", error, "jail") if status == "ok" else alone
