"""One cell: a bubblewrap jail in which a fork server waits, and the socket between it and the host."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from fastgrpo_sandbox import cgroup
from fastgrpo_sandbox.beside import end, started
from fastgrpo_sandbox.bwrap import HERE, Kind, bwrap_spec
from fastgrpo_sandbox.types import Limits, SandboxUnavailable

log = logging.getLogger("fastgrpo_sandbox")
HEADER = struct.Struct("<IIB")
START = struct.Struct("<8I3I")
READY, DATA, DONE, GONE = 1, 2, 3, 4  # frames from the server
HOST_START, HOST_DATA, HOST_KILL = 1, 2, 3  # frames to the server
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 5.0
MAX_FRAME = 16 << 20  # from the server: a job's captured output, its result and its verdict
# A fork server gives a job 30 s to begin on a busy machine and 30 s of its waits back, and its judge 2 s after the end.
ANSWER_GRACE_S = 90.0


class Occupant(Protocol):
    """Who a job's frames are for."""

    def on_call(self, body: bytes) -> None: ...

    def on_done(self, body: bytes) -> None: ...

    def on_fault(self, error: Exception) -> None: ...

    def on_lost(self, reason: str) -> None: ...


class Cell(asyncio.Protocol):
    """Starts jobs, routes their frames, and tells every occupant when the jail is lost. Owned by one event loop."""

    def __init__(
        self,
        number: int,
        kind: Kind,
        preload: tuple[str, ...],
        armed: int,
        groups: Path | None,
        on_lost: Callable[[Cell], None],
    ) -> None:
        self.number = number
        self.kind = kind
        self.started = 0
        self.ended = 0  # jobs, of those that were started
        self.lost = ""
        self.retiring = False
        self.occupants: dict[int, Occupant] = {}
        self._due: dict[int, float] = {}  # when each job's end should long have been heard
        self._free: list[int] = []
        self._next = 0
        self._spec = bwrap_spec(kind, preload, armed)
        self._groups = groups  # where this cell may make a cgroup
        self._group: Path | None = None
        self._on_lost = on_lost
        self._received = bytearray()
        self._has_room = asyncio.Event()  # in what the fork server has not read yet
        self._has_room.set()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last_words = ""

    async def start(self) -> None:
        """Returns when the fork server is ready. Raises SandboxUnavailable with what the jail said otherwise."""
        self._make_group()
        try:
            ours = self._launch()
        except OSError as error:
            if self._group is not None:
                cgroup.remove(self._group)
            raise SandboxUnavailable(f"the jail did not start: {error}") from None
        loop = asyncio.get_running_loop()
        connected = loop.create_task(loop.create_unix_connection(lambda: self, sock=ours))
        try:
            self._transport, _ = await asyncio.shield(connected)
            await asyncio.wait_for(asyncio.shield(self._ready), START_DEADLINE_S)
            if self.lost:  # in the same turn of the loop, as where it is ready and cannot fork
                raise ConnectionError(self.lost)
        except (TimeoutError, ConnectionError) as error:
            await self.stop()
            said = str(error) or self._last_words or f"no answer within {START_DEADLINE_S:.0f} s"
            raise SandboxUnavailable(f"the jail did not start: {said}") from None
        except asyncio.CancelledError:
            self._transport, _ = await connected  # one turn of the loop: what is half connected cannot be stopped
            await self.stop()
            raise

    def _launch(self) -> socket.socket:
        """Starts bubblewrap; returns our end of its socket. Raises OSError, with nothing left open."""
        spec = json.dumps(self._spec | {"cgroup": str(self._group or "")})
        command = [sys.executable, "-I", "-S", str(HERE / "launch.py"), spec]
        with ExitStack() as opened:
            self._stderr = os.memfd_create("cell-stderr")
            opened.callback(os.close, self._stderr)
            ours, theirs = socket.socketpair()
            opened.enter_context(ours)
            with theirs:
                self._process = started(command, theirs.fileno(), stderr=self._stderr)
            opened.pop_all()
        return ours

    async def stop(self) -> None:
        """Ends the jail and everything in it; returns when it is gone, or logs that it is not after STOP_DEADLINE_S."""
        self._transport.close()
        end(self._process)
        try:
            async with asyncio.timeout(STOP_DEADLINE_S):
                while self._process.poll() is None:
                    await asyncio.sleep(0.01)
                await asyncio.shield(self._closed)
        except TimeoutError:
            log.warning("cell did not end: cell=%d pid=%d", self.number, self._process.pid)
        finally:
            if self._group is not None:
                await asyncio.to_thread(cgroup.remove, self._group)

    def _make_group(self) -> None:
        """Make the cell's cgroup, if it can be made: without it the cell's outcomes say that memory was polled."""
        if self._groups is None:
            return
        try:
            self._group = cgroup.make_cell(self._groups)
        except OSError as error:
            log.warning("no cgroup for a cell: cell=%d reason=%r", self.number, str(error))

    def begin(
        self, occupant: Occupant, limits: Limits, stdin: bytes, payload: bytes, judge: bytes, room: int = 0
    ) -> int:
        """Starts a job; returns its number in this cell. With a `judge` payload two processes are paired. It may print
        `room` bytes, of which no more come back than its limits have."""
        start = START.pack(
            *(round(limits.wall_s * 1000), round(limits.cpu_s * 1000), limits.memory_mb, limits.processes),
            *(max(limits.output_bytes, room), limits.tmp_mb, limits.files, limits.output_bytes),
            *(len(stdin), len(payload), len(judge)),
        )
        if self._free:
            job = self._free.pop()
        else:
            job, self._next = self._next, self._next + 1
        self.started += 1
        self.occupants[job] = occupant
        self._due[job] = time.monotonic() + limits.wall_s + ANSWER_GRACE_S
        self._send(job, HOST_START, start + stdin + payload + judge)
        return job

    def send(self, job: int, body: bytes) -> None:
        """One frame to a running session."""
        self._send(job, HOST_DATA, body)

    async def room(self) -> None:
        """Returns once the fork server has read nearly all that was sent, or ends the session that does not read it."""
        while not self._has_room.is_set():
            await self._has_room.wait()

    def pause_writing(self) -> None:
        self._has_room.clear()

    def resume_writing(self) -> None:
        self._has_room.set()

    def overdue(self) -> set[int]:
        """Jobs whose fork server should have ended them by now."""
        now = time.monotonic()
        return {job for job in self.occupants if self._due[job] < now}

    def give_up(self, reason: str) -> None:
        """Counts the jail as lost: every occupant hears on_lost, and the owner may replace it."""
        self._fail(reason)

    def kill(self, job: int) -> None:
        """Ends a job now; its occupant still hears on_done."""
        self._due[job] = min(self._due[job], time.monotonic() + ANSWER_GRACE_S)
        self._send(job, HOST_KILL, b"")

    def _send(self, job: int, kind: int, body: bytes) -> None:
        self._transport.write(HEADER.pack(len(body), job, kind) + body)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        position, end = 0, len(received)
        while end - position >= HEADER.size:
            length, job, kind = HEADER.unpack_from(received, position)
            if length > MAX_FRAME:
                return self._transport.abort()
            if end - position < HEADER.size + length:
                break
            position += HEADER.size
            self._frame(job, kind, bytes(received[position : position + length]))
            position += length
        del received[:position]

    def _frame(self, job: int, kind: int, body: bytes) -> None:
        if kind == READY and not self._ready.done():
            self._ready.set_result(None)
        elif kind == GONE:
            self._fail(f"the cell cannot fork: {body.decode(errors='replace')}")
        elif kind in (DATA, DONE) and job in self.occupants:
            self._deliver(job, kind, body)

    def _deliver(self, job: int, kind: int, body: bytes) -> None:
        """Whatever an occupant raises ends its own job: neither the transport nor a neighbour hears of it."""
        occupant = self.occupants[job]
        if kind == DONE:
            self.ended += 1
            self._free.append(job)
            del self.occupants[job]
        try:
            (occupant.on_done if kind == DONE else occupant.on_call)(body)
        except Exception as error:
            log.warning("frame could not be read: cell=%d job=%d", self.number, job, exc_info=error)
            occupant.on_fault(error)

    def connection_lost(self, error: Exception | None) -> None:
        said = os.pread(self._stderr, 4000, 0).decode(errors="replace").strip()
        os.close(self._stderr)
        self._last_words = said.splitlines()[-1] if said else "the fork server ended"
        self._fail(self._last_words)
        if not self._closed.done():
            self._closed.set_result(None)

    def _fail(self, reason: str) -> None:
        if self.lost:
            return
        self.lost = reason
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(reason))
            self._ready.exception()
        occupants, self.occupants = list(self.occupants.values()), {}
        for occupant in occupants:
            occupant.on_lost(reason)
        self._on_lost(self)
