"""What is sent into a jail, and the host's end of a running job."""

from __future__ import annotations

import asyncio
import logging
import marshal
import os
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import msgspec

from fastgrpo_sandbox.cell import Cell
from fastgrpo_sandbox.counting import count_tests
from fastgrpo_sandbox.guest.asserts import compile_asserts, compile_setup, special_words
from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.names import solution_imports, unimported_modules, wanted_names
from fastgrpo_sandbox.skipping import line_probes, skip_probes
from fastgrpo_sandbox.stdio import MOST_OUTPUT, SILENT, wants_nothing
from fastgrpo_sandbox.types import (
    AssertTests,
    CallError,
    CheckTests,
    EndSession,
    ErrorBy,
    Limits,
    NoTestError,
    Outcome,
    Status,
    StdioTests,
    Tests,
    UnittestTests,
)
from fastgrpo_sandbox.unittest_source import compile_unittest, given_data, imported_modules, own_names, unittest_names
from fastgrpo_sandbox.verdict import Done, Expected, Result, SessionResult, outcome_of, parse_done
from fastgrpo_sandbox.weight import count_values

log = logging.getLogger("fastgrpo_sandbox")
Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]
MAX_PAYLOAD = 8 << 20
MAX_FILES = 4096
MAX_NAME, MAX_PATH = 255, 1000  # bytes of a file's name and letters of its path
STDIN = "/dev/stdin"  # a link to a file of the job's: in a jail no path leads to a descriptor
PLAIN = b"S"  # begins a payload that is nothing but the source of a script
SECRET = b"U"  # begins one whose secret stays with the native module
SECRET_BYTES = 32
MAX_CALLS = 256  # of one session, unanswered
MAX_SAID = 16 << 20  # bytes of all calls of one session, of which each counts as no less than
LEAST_SAID = 256  # since a call of four bytes, too, takes this process a tenth of a millisecond
MAX_VALUES = 1 << 16  # of one session in this process at once: in its unanswered calls, or in its result
MAX_ANSWER = 16 << 20
NOT_PLAIN = (TypeError, ValueError, OverflowError, RecursionError)  # of msgspec: objects, texts, 2**64, nested values


class Rejected(ValueError):
    """The job was refused before it ran; the text says why."""


class Parcel(msgspec.Struct, frozen=True):
    """One job ready to send: payloads for its process and for its judge, and how to read its end."""

    limits: Limits
    payload: bytes
    stdin: bytes = b""
    judge: bytes = b""
    secret: bytes = b""  # ends the result frame of a same-process verdict
    test_count: int | None = None
    select: tuple[int, ...] | None = None
    session: bool = False
    room: int = 0  # bytes that it may print, where its limits have fewer

    def outcome(self, done: Done) -> Outcome:
        """What became of the job. A frame that is too much to decode, or raises meanwhile, is no frame."""
        form = SessionResult if self.session else Result
        unheard = msgspec.structs.replace(done, results=0, result=b"", verdicts=0, verdict=b"")
        if self.session and count_values(done.result, MAX_VALUES) > MAX_VALUES:
            outcome = outcome_of(unheard, self.limits, None, form)
            said = f"the result has more than {MAX_VALUES} values"
            return msgspec.structs.replace(outcome, error=said, error_by="host")
        try:
            return outcome_of(done, self.limits, self.expected(), form)
        except Exception as error:
            log.warning("result could not be read: error=%r", error)
            return outcome_of(unheard, self.limits, self.expected(), form)

    def expected(self) -> Expected | None:
        """What a verdict must look like; None for a job without tests."""
        if self.test_count is None:
            return None
        return Expected(self.test_count, bool(self.judge), self.secret, self.select)


class Prepared(msgspec.Struct, frozen=True):
    """Tests that were read, once for all the solutions that they judge."""

    count: int = 0
    select: tuple[int, ...] | None = None
    judge: bytes = b""  # its payload; none of unittest tests
    beside: bytes = b""  # what a unittest job has beside the code, marshalled
    refused: str = ""  # why no job can have them


def pack_job(
    code: str, stdin: str, files: Mapping[str, str | bytes], prepared: Prepared | None, limits: Limits
) -> Parcel:
    """A job of any form but StdioTests, which are several. Raises Rejected."""
    code = code.removeprefix("\ufeff")  # as of a file
    if STDIN in code:
        files = {**files, "stdin": stdin}
    job: dict[str, Any] = {"role": "script", "code": _source(code), "files": _files(files)}
    ready, secret = prepared or Prepared(), b""
    if ready.refused:
        raise Rejected(ready.refused)
    if ready.judge:
        job["role"] = "solution"
    elif ready.beside:
        secret = os.urandom(SECRET_BYTES)
        job |= marshal.loads(ready.beside)
    plain = job["role"] == "script" and not files and "\0" not in code
    payload = PLAIN + code.encode() if plain else marshal.dumps(job)
    if secret:
        payload = SECRET + secret + payload
    count, room = (None, 0) if prepared is None else (ready.count, MOST_OUTPUT)  # what is printed decides nothing
    stdin_bytes = _encoded(stdin, "stdin")
    return _checked(Parcel(limits, payload, stdin_bytes, ready.judge, secret, count, ready.select, room=room))


@memo
def prepare(tests: CheckTests | AssertTests | UnittestTests) -> Prepared:
    """The tests, read and compiled; what is wrong with them is in the answer, which is kept, too."""
    try:
        _check_size(tests)
        count = _count(tests)
        if isinstance(tests, UnittestTests):
            return _within(Prepared(count, beside=marshal.dumps(_unittest_job(tests))))
        select = tests.select if isinstance(tests, CheckTests) else None
        return _within(Prepared(count, select, judge=marshal.dumps(_judge_job(tests))))
    except Rejected as error:
        return Prepared(refused=str(error))


def _check_size(tests: CheckTests | AssertTests | UnittestTests) -> None:
    texts = tests.asserts if isinstance(tests, AssertTests) else (tests.source,)
    _check_bytes(sum(map(len, texts)) + len(tests.setup))


def _within(prepared: Prepared) -> Prepared:
    _check_bytes(len(prepared.judge) + len(prepared.beside))
    return prepared


def _check_bytes(size: int) -> None:
    if size > MAX_PAYLOAD:
        raise Rejected(f"the job has {size} bytes of code, tests and input; the limit is {MAX_PAYLOAD}")


def pack_session(code: str, inputs: Mapping[str, Any], limits: Limits) -> Parcel:
    """A session's job. Raises Rejected, also for inputs that are not plain data."""
    try:
        packed = msgspec.msgpack.encode(dict(inputs))
    except NOT_PLAIN as error:
        raise Rejected(f"the session's inputs are not plain data: {error}") from None
    job = {"role": "session", "code": _source(code), "inputs": packed}
    return _checked(Parcel(limits, marshal.dumps(job), session=True))


def pack_check(checker: str, given: str, output: str, expected: str, limits: Limits) -> Parcel:
    """Asks the checker of StdioTests about one output, in a jail without the code that wrote it. Raises Rejected."""
    job = {"role": "checker", "code": _source(checker), "case": [given, output, expected]}
    return _checked(Parcel(limits, marshal.dumps(job), test_count=1))


def refusal(tests: Tests) -> str:
    """Why `tests` tell nothing of a code, in one sentence: none at all could pass them, since they cannot be read or
    are too long, or every silent program would; "" of others.

    What a pool finds at each job, found once and before any.
    """
    cases = tests.cases if isinstance(tests, StdioTests) else (("", ""),)
    try:
        for given, _ in cases:
            pack_job("", given, {}, None if isinstance(tests, StdioTests) else prepare(tests), Limits())
    except Rejected as error:
        return str(error)
    if isinstance(tests, StdioTests) and tests.checker:
        return ""
    if isinstance(tests, StdioTests) and wants_nothing(tests):
        return SILENT
    longest = max((len(wanted) for _, wanted in cases), default=0)
    return f"a case is to print {longest} characters; at most {MOST_OUTPUT} are kept" if longest > MOST_OUTPUT else ""


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except Rejected:
        raise
    except NoTestError as error:
        raise Rejected(str(error)) from None
    except (SyntaxError, ValueError, RecursionError) as error:
        raise Rejected(f"the tests cannot be compiled: {error}") from None


def _judge_job(tests: CheckTests | AssertTests) -> dict[str, Any]:
    """The tests, compiled here once for all the solutions that they judge. Raises Rejected."""
    with _compiling():
        tests = _after_imports(tests)
    job: dict[str, Any] = {"role": "judge", "lines": None, "skips": (), "needed": _needed(tests)}
    job["special"] = special_words(tests.setup, *(tests.asserts if isinstance(tests, AssertTests) else (tests.source,)))
    with _compiling():
        job["setup"], job["modules"] = compile_setup(tests.setup), wanted_names(tests.setup).modules
        if isinstance(tests, AssertTests):
            return job | {"lines": _lines(tests.asserts), "skips": line_probes(tests.setup, tests.asserts)}
        code, wanted = compile_asserts(tests.source), tuple(wanted_names(tests.source))
    return job | {"code": code, "wanted": wanted, "entry_point": tests.entry_point}


def _lines(asserts: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """The assertions as the judge has them; of too many for a job, no more than it takes to see that."""
    lines, size = [], 0
    for line in asserts:
        lines.append((compile_asserts(line), tuple(wanted_names(line))))
        size += len(lines[-1][0][0])
        _check_bytes(size)
    return lines


def _after_imports(tests: CheckTests | AssertTests) -> CheckTests | AssertTests:
    """The tests, each text of which imports the solution as a module where their setup does."""
    imports = solution_imports(tests.setup)
    if not imports:
        return tests
    if isinstance(tests, AssertTests):
        return msgspec.structs.replace(tests, asserts=tuple(imports + line for line in tests.asserts))
    return msgspec.structs.replace(tests, source=imports + tests.source)


def _needed(tests: CheckTests | AssertTests) -> tuple[str, ...]:
    """What the setup takes from the solution: for assertions whatever it reads, for `check` no helper functions. Where
    assertions want no name of it, the builtins that their setup tests are what they test."""
    if not tests.setup:
        return ()
    try:
        names, other = (wanted := wanted_names(tests.setup)).names, wanted.other
        if isinstance(tests, AssertTests):
            if names or not other:
                return names
            own, lines = set(own_names(tests.setup)), map(wanted_names, tests.asserts)
            return () if any(line.other or not own.issuperset(line.names) for line in lines) else other
    except (SyntaxError, ValueError, RecursionError):
        return ()  # compile_setup and compile_asserts say so
    return tuple(name for name in names if name == tests.entry_point or name[:1].isupper())


def _unittest_job(tests: UnittestTests) -> dict[str, Any]:
    """The tests of a unittest job, compiled once like a judge's. Raises Rejected."""
    with _compiling():
        whole, names = f"{tests.setup}\n{tests.source}", unittest_names(tests.source)
        given = dict(given_data(tests.setup, tests.source))
        job: dict[str, Any] = {
            "role": "unittest",
            "names": names,
            "skips": skip_probes(whole, names),
            "tests": compile_unittest(whole, frozenset(given)),
            "given": given,
            "own": tuple(name for name in own_names(whole) if name not in given),
        }
        # The tests themselves may put something for a package that is not there, or read a file of theirs again.
        job["fills"] = "sys.modules" in whole or "reload" in whole
        job["classes"] = frozenset(name for name in wanted_names(whole).names if name[:1].isupper())
        return job | {"lent": unimported_modules(whole), "modules": imported_modules(whole), "mocks": "mock" in whole}


def _count(tests: Tests) -> int:
    try:
        return count_tests(tests)
    except (SyntaxError, IndexError, ValueError, RecursionError) as error:
        raise Rejected(f"the tests cannot be counted: {error}") from None


def _source(code: str) -> str:
    _encoded(code, "the code")
    return code


def _encoded(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Rejected(f"{what} is not valid Unicode: {error.reason}") from None


def _files(files: Mapping[str, str | bytes]) -> dict[str, bytes]:
    if len(files) > MAX_FILES:
        raise Rejected(f"the job has {len(files)} files; the limit is {MAX_FILES}")
    for path in files:
        parts = path.split("/")
        is_named = parts[-1] not in ("", ".") and ".." not in parts and "\0" not in path and not os.path.isabs(path)
        if not is_named or len(path) > MAX_PATH or max(map(len, map(_path_bytes, parts))) > MAX_NAME:
            raise Rejected(f"file {path!r:.80} is not a relative path inside the jail's /tmp")
    places = {os.path.normpath(path).replace("/", "\0"): path for path in files}  # each before what is below it
    for above, below in pairwise(sorted(places)):
        if below.startswith(above + "\0"):
            folder = above.replace("\0", "/")
            raise Rejected(f"file {folder!r:.80} is to be a folder, too, of {places[below]!r:.80}")
    return {path: _encoded(text, f"file {path!r}") if isinstance(text, str) else text for path, text in files.items()}


def _path_bytes(path: str) -> bytes:
    return _encoded(path, f"the path {path!r:.80}")


def _checked(parcel: Parcel) -> Parcel:
    _check_bytes(len(parcel.payload) + len(parcel.stdin) + len(parcel.judge))
    return parcel


class Running:
    """A job that is under way in a cell."""

    def __init__(self, cell: Cell, parcel: Parcel) -> None:
        self.cell = cell
        self.ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.number = cell.begin(self, parcel.limits, parcel.stdin, parcel.payload, parcel.judge, parcel.room)
        self.parcel = msgspec.structs.replace(parcel, payload=b"", stdin=b"", judge=parcel.judge[:1])  # as far as read

    def kill(self) -> None:
        """Ends the job now; `ended` completes when the jail has reaped it."""
        if not self.ended.done() and not self.cell.lost:
            self.cell.kill(self.number)

    def on_call(self, body: bytes) -> None:
        self.kill()

    def on_done(self, body: bytes) -> None:
        try:
            done = parse_done(body)
        except struct.error:
            return self.on_lost("the fork server's report is too short")
        self._end(self.parcel.outcome(done))

    def on_fault(self, error: Exception) -> None:
        """A frame of the job's could not be read, for whatever reason: its own doing, whose neighbours go on."""
        self.kill()
        tests = (False,) * (self.parcel.test_count or 0)
        said = f"a frame of the job's could not be read: {error!r}"
        self._end(Outcome("failed", error=said, tests=tests, error_by="jail"))

    def on_lost(self, reason: str) -> None:
        self._end(Outcome("infrastructure", error=reason, error_by="host"))

    def _end(self, outcome: Outcome) -> None:
        if not self.ended.done():
            self.ended.set_result(outcome)


class _Call(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    number: int
    method: str
    params: dict[str, Any]


class RunningSession(Running):
    """A session under way: its calls are answered by `handler`, each in a task that this object owns."""

    def __init__(self, cell: Cell, parcel: Parcel, handler: Handler) -> None:
        self._handler = handler
        self._tasks: set[asyncio.Task[None]] = set()
        self._fault: Outcome | None = None
        self._said = 0
        self._held = 0  # values of unanswered calls
        super().__init__(cell, parcel)

    def on_call(self, body: bytes) -> None:
        if self._fault is not None:
            return  # what a killed session had still sent
        self._said += max(len(body), LEAST_SAID)
        if self._said > MAX_SAID:
            return self._stop("failed", f"more than {MAX_SAID} bytes of calls", "host")
        values = count_values(body, MAX_VALUES)
        if self._held + values > MAX_VALUES:
            return self._stop("failed", f"more than {MAX_VALUES} values in calls unanswered at once", "host")
        try:
            call = msgspec.msgpack.decode(body, type=_Call)
        except Exception as error:
            return self._stop("failed", f"malformed call: {error}", "jail")
        if len(self._tasks) >= MAX_CALLS:
            return self._stop("failed", f"more than {MAX_CALLS} calls unanswered at once", "host")
        self._held += values
        task = asyncio.get_running_loop().create_task(self._answer(call))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._answered(task, values))

    def _answered(self, task: asyncio.Task[None], values: int) -> None:
        self._held -= values
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):  # such as an error whose text cannot be had
            self._stop("infrastructure", f"no answer to a call: {type(error).__name__}", "host")

    async def _answer(self, call: _Call) -> None:
        try:
            answer = (call.number, True, await self._handler(call.method, call.params))
        except CallError as error:
            answer = (call.number, False, str(error))
        except EndSession as error:
            return self._stop("failed", str(error), "host")
        except asyncio.CancelledError:
            self._stop("infrastructure", f"handler of {call.method!r} was cancelled", "jail")
            raise
        except Exception as error:
            return self._stop("infrastructure", f"handler of {call.method!r}: {error!r}", "jail")
        await self.cell.room()  # answers of 16 MiB to 256 calls would be 4 GiB of this process
        try:
            body = msgspec.msgpack.encode(answer)
        except NOT_PLAIN as error:
            return self._stop("infrastructure", f"answer to {call.method!r} is not plain data: {error}", "jail")
        if len(body) > MAX_ANSWER:
            return self._stop("infrastructure", f"answer to {call.method!r} has {len(body)} bytes", "jail")
        if not self.ended.done() and not self.cell.lost:
            self.cell.send(self.number, body)

    def _stop(self, status: Status, error: str, error_by: ErrorBy) -> None:
        self._fault = self._fault or Outcome(status, error=error, error_by=error_by)
        self.kill()

    def _end(self, outcome: Outcome) -> None:
        for task in self._tasks:
            task.cancel()
        # Its own fault stands, however it ended; one of ours counts only where it was what ended the session.
        if self._fault is not None and (outcome.status == "killed" or self._fault.status == "failed"):
            fault = {name: getattr(self._fault, name) for name in ("status", "error", "error_by")}
            outcome = msgspec.structs.replace(outcome, value=None, **fault)
        super()._end(outcome)
