"""Long texts read beside the event loop: tests, replies, outputs, in processes of their own that can be ended.

Compiling the tests of a job takes up to a minute, a few nested `finally` for ever, and no thread can be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastgrpo_sandbox.beside import end, end_with, started
from fastgrpo_sandbox.guest import memo
from fastgrpo_sandbox.turns import Turns

T = TypeVar("T")
CPU_S = 60  # of one reading
WALL_S = 600.0  # until a reader that does not get so much of a processor is given up
# Bytes that a reader may take on for a text: so many, and for each of its own, but no more. Tests take 700 for each.
LEAST_MEMORY, MEMORY_PER_BYTE, MOST_MEMORY = 256 << 20, 1024, 3 << 30
KEPT = 16 << 20  # bytes of what a reader remembers: the parts of what it reads
LONG = 1 << 16  # bytes: the readings of longer texts never take all readers
READERS = min(4, max(2, os.cpu_count() or 1))
LENGTH = struct.Struct("<Q")
PROGRAM = "import json, sys; sys.path[:], host = json.loads(sys.argv[1]); from fastgrpo_sandbox.reading import serve; "
PROGRAM += "serve(host)"


class Unreadable(ValueError):
    """A text took more time or memory than there is for one: its own fault. The message says which."""


class ReaderLost(RuntimeError):
    """A process that reads has ended or does not answer, for no reason of the text's."""


class Readers:
    """At most READERS processes, each started when none is free. Owned by one event loop."""

    def __init__(self) -> None:
        self._turns, self._long = Turns(READERS), Turns(READERS - 1)
        self._free: list[_Reader] = []
        self._busy: set[_Reader] = set()
        self._closed = False

    async def ask(self, function: Callable[..., T], *given: Any) -> T:
        """`function(*given)`, of this package and without side effects; raises what it raises. Cancelling ends it.
        Raises Unreadable and ReaderLost."""
        is_long = len(_pickled(function, given)) > LONG
        async with self._long.taken() if is_long else contextlib.nullcontext(), self._turns.taken():
            return await self._asked(_pickled(function, given))  # what waits takes no memory of its own

    async def _asked(self, request: bytes) -> Any:
        if self._closed:
            raise ReaderLost("the pool is closed")
        reader = self._begun()
        self._busy.add(reader)
        try:
            async with asyncio.timeout(WALL_S):
                fine, answer = await reader.answer(request)
        except TimeoutError:
            reader.end()
            raise ReaderLost(f"no answer within {WALL_S:.0f} s") from None
        except BaseException:
            reader.end()
            raise
        finally:
            self._busy.discard(reader)
        self._free.append(reader)
        if fine:
            return answer
        raise answer

    def _begun(self) -> _Reader:
        """One that waits, unless it was killed meanwhile, or a new one."""
        while self._free:
            if (reader := self._free.pop()).is_alive():
                return reader
            reader.end()
        return _Reader()

    def close(self) -> None:
        """Ends all processes; who still asks hears a ReaderLost."""
        self._closed = True
        for reader in (*self._free, *self._busy):
            reader.end()
        self._free.clear()


class _Pickler(pickle.Pickler):
    """Texts of a class of the caller's are plain ones: a reader may not have that class."""

    def reducer_override(self, value: Any) -> Any:
        return (str, (str.__str__(value),)) if isinstance(value, str) else NotImplemented


def _pickled(*asked: Any) -> bytes:
    into = io.BytesIO()
    _Pickler(into).dump(asked)
    return into.getvalue()


class _Reader:
    """This side of one process."""

    def __init__(self) -> None:
        """Raises ReaderLost where no process can be started."""
        # This package's own folder too: an editable install may be found by a hook, which needs `site`. It comes last:
        # of a plain install it has all packages, and some are named like modules of the library, as `dataclasses` is.
        path = [*map(os.path.abspath, sys.path), str(Path(__file__).parents[1])]
        command = [sys.executable, "-I", "-S", "-c", PROGRAM, json.dumps((path, os.getpid()))]
        try:
            with contextlib.ExitStack() as opened:
                ours, theirs = socket.socketpair()
                opened.enter_context(ours)
                with theirs:
                    self._process = started(command, theirs.fileno())
                opened.pop_all()
        except OSError as error:
            raise ReaderLost(f"no process can be started: {error}") from None
        self._socket = ours
        self._ends: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def answer(self, request: bytes) -> tuple[bool, Any]:
        """Whether the function returned, and what, or what it raised."""
        try:
            if self._ends is None:
                self._ends = await asyncio.open_unix_connection(sock=self._socket)
            heard, said = self._ends
            said.write(LENGTH.pack(len(request)) + request)
            (length,) = LENGTH.unpack(await heard.readexactly(LENGTH.size))
            found: tuple[bool, Any] = pickle.loads(await heard.readexactly(length))
            return found
        except (asyncio.IncompleteReadError, ConnectionError):
            status = await asyncio.to_thread(self._process.wait)
            if status == -signal.SIGPROF:
                raise Unreadable(f"it takes more than {CPU_S} s to read") from None
            raise ReaderLost(f"the process that reads texts ended (status {status})") from None

    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def end(self) -> None:
        """Ends the process, whatever it does."""
        if self._ends is None:
            self._socket.close()
        else:
            self._ends[1].transport.abort()
        end(self._process)
        asyncio.get_running_loop().run_in_executor(None, self._process.wait)


def serve(host: int) -> None:
    """Program of a reader: answers its other end, descriptor 0, until that closes or `host`, the process that started
    it, has ended."""
    end_with(host)
    memo.MOST_BYTES = KEPT
    with socket.socket(fileno=0) as asker, asker.makefile("rb") as heard:
        while len(header := heard.read(LENGTH.size)) == LENGTH.size:
            request = heard.read(LENGTH.unpack(header)[0])
            _bound_memory(len(request))
            signal.setitimer(signal.ITIMER_PROF, CPU_S)  # whose signal ends this process, wherever it is
            answer = _answer(request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            with contextlib.suppress(ConnectionError):
                asker.sendall(LENGTH.pack(len(answer)) + answer)


def _bound_memory(length: int) -> None:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    room = min(MOST_MEMORY, LEAST_MEMORY + MEMORY_PER_BYTE * length)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    soft = taken + room if most == resource.RLIM_INFINITY else min(taken + room, most)
    resource.setrlimit(resource.RLIMIT_AS, (soft, most))


def _answer(request: bytes) -> bytes:
    try:
        function, given = pickle.loads(request)
        return pickle.dumps((True, function(*given)))
    except MemoryError:
        return pickle.dumps((False, Unreadable("it takes more memory to read than a text of its length may")))
    except Exception as error:
        return pickle.dumps((False, error))
