"""From what the kernel and the fork server report to an Outcome. Runs on the host; trusts no word of a job about itself."""

from __future__ import annotations

import signal
import struct
from typing import Any

import msgspec

from fastgrpo_sandbox.types import Limits, Outcome, Status

DONE = struct.Struct("<IIIIIIQQIIIII")
NONE, WALL, CPU, MEMORY, OUTPUT, CANCELLED, PROTOCOL, SPAWN = range(8)
MEMORY_BY = "rlimit + resident polling"
REASONS: dict[int, tuple[Status, str]] = {
    WALL: ("timeout", "wall clock limit reached"),
    CPU: ("timeout", "CPU limit reached"),
    MEMORY: ("memory", "memory limit reached"),
    OUTPUT: ("output_limit", "output limit reached"),
    CANCELLED: ("killed", "cancelled"),
    PROTOCOL: ("failed", "a malformed frame on the jail's channel"),
}


class Result(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The one frame with which a process in the jail may end."""

    error: str
    kind: str
    value: Any
    tests: list[bool]


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


def outcome_of(
    done: Done, limits: Limits, test_count: int | None, judged: bool, select: tuple[int, ...] | None
) -> Outcome:
    """The Outcome of one finished job. `test_count` None: a job without tests; `select` keeps these assertions."""
    if done.reason == SPAWN:
        return Outcome("infrastructure", error=_spawn_error(done))
    result = _decode(done.result) if done.results == 1 else None
    status, error = _ending(done, result, limits)
    tests: tuple[bool, ...] = ()
    if test_count is not None:
        tests = _verdicts(done, result, test_count, judged, select)
        status, error = _with_tests(done, status, error, tests, judged)
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
        memory_by=MEMORY_BY,
        verdict_by="" if test_count is None else "judge" if judged else "same-process",
    )


def _spawn_error(done: Done) -> str:
    if done.spawn_errno:
        import os

        return f"the fork server could not start the job: {os.strerror(done.spawn_errno)}"
    said = (done.result or done.stderr).decode(errors="replace")
    return f"the job's process ended before it was confined (wait status {done.status}) {said}".strip()


def _decode(frame: bytes) -> Result | None:
    try:
        return msgspec.msgpack.decode(frame, type=Result)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError):
        return None


def _ending(done: Done, result: Result | None, limits: Limits) -> tuple[Status, str]:
    """Status and error of the job's own process."""
    if done.reason != NONE:
        return REASONS[done.reason]
    if done.status & 0x7F:
        return _signalled(done.status & 0x7F, done, limits)
    if done.results > 1:
        return "failed", "more than one result frame"
    if result is None:
        return "failed", f"ended without a well-formed result (exit status {done.status >> 8})"
    if result.kind == "MemoryError":
        return "memory", result.error
    if result.kind or done.status:
        return "failed", result.error or f"exit status {done.status >> 8}"
    return "ok", result.error


def _signalled(number: int, done: Done, limits: Limits) -> tuple[Status, str]:
    if number in (signal.SIGKILL, signal.SIGXCPU) and done.cpu_us >= limits.cpu_s * 1e6:
        return REASONS[CPU]
    name = signal.Signals(number).name if number in signal.valid_signals() and number < 32 else str(number)
    if number in (signal.SIGKILL, signal.SIGSYS):
        return "killed", f"killed by {name}"
    return "failed", f"killed by {name}"


def _verdicts(
    done: Done, result: Result | None, count: int, judged: bool, select: tuple[int, ...] | None
) -> tuple[bool, ...]:
    """A pass needs exactly one well-formed frame that answers every test."""
    frame = (_decode(done.verdict) if done.verdicts == 1 else None) if judged else result
    if frame is None:
        return (False,) * count
    answers = frame.tests if select is None else [frame.tests[i] for i in select if i < len(frame.tests)]
    return tuple(answers) if len(answers) == count else (False,) * count


def _with_tests(done: Done, status: Status, error: str, tests: tuple[bool, ...], judged: bool) -> tuple[Status, str]:
    """A judged solution is stopped by its judge, so only the tests and the limits speak."""
    if done.reason != NONE:
        return status, error
    if tests and all(tests):
        return "ok", ""
    if status == "ok" or (judged and done.results == 0 and not done.status):
        return "failed", error or f"{tests.count(False)} of {len(tests)} tests failed"
    return status, error


def compare_stdout(actual: str, expected: str) -> bool:
    """Equal line by line, white space at the ends of lines and of the text ignored."""
    return [line.rstrip() for line in actual.rstrip().splitlines()] == [
        line.rstrip() for line in expected.rstrip().splitlines()
    ]
