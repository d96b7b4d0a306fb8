"""The cells of a pool: started, watched, picked for a job, and replaced once they are lost or have had their share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from fastgrpo_sandbox.bwrap import Kind
from fastgrpo_sandbox.cell import Cell
from fastgrpo_sandbox.cgroup import open_base
from fastgrpo_sandbox.types import SandboxUnavailable

log = logging.getLogger("fastgrpo_sandbox")
PAUSE_S, MOST_PAUSE_S = 0.2, 30.0  # before a cell is tried again, doubled with each failure
PATIENCE_S = 120.0  # that jobs wait for a cell where there is none: a shortage of memory passes, a mistake does not
RECYCLE_ATTEMPTS = 5
WATCH_S = 5.0
CLOSED = "the pool is closed: use it inside its `async with`"


class Cells:
    """`wanted` cells for runs, and as many for sessions from the first one on. Owned by one event loop."""

    def __init__(self, wanted: int, preload: tuple[str, ...], armed: int, recycle_after: int) -> None:
        self.all: list[Cell] = []  # one that is lost or retires, too, until another is in its place
        self.started = 0
        self.lost = 0
        self._wanted = wanted
        self._preload = preload
        self._armed = armed
        self._recycle_after = recycle_after
        self._groups: Path | None = None  # where cells may make cgroups
        self._closing = False
        self._upkeep: set[asyncio.Task[None]] = set()
        self._came = asyncio.Event()
        self._for_sessions: asyncio.Task[None] | None = None  # starts them
        self._lost_at: dict[Kind, float] = {}  # when the latest of a kind was
        self._useless: Counter[Kind] = Counter()  # how many in a row were lost before any job of theirs had ended
        self._broken: dict[Kind, str] = {}  # why there is none of a kind, for longer than jobs wait

    async def begin(self) -> None:
        """What there must be before the first cell."""
        self._groups = (await asyncio.to_thread(open_base)).folder
        self._keep(self._watch())

    async def start(self, kind: Kind) -> None:
        """All cells of a kind or none: raises SandboxUnavailable where one does not start."""
        ends = await asyncio.gather(*(self._add(kind) for _ in range(self._wanted)), return_exceptions=True)
        for failure in filter(None, ends):
            await self._stop(self._of(kind))
            raise failure

    async def close(self) -> None:
        """Ends every cell; returns when none is left. Who waits for one hears SandboxUnavailable."""
        self._closing = True
        for task in self._upkeep:
            task.cancel()
        await asyncio.gather(*self._upkeep, return_exceptions=True)
        await self._stop(self.all)
        self._came.set()

    def alive(self) -> int:
        """How many there are."""
        return sum(not cell.lost for cell in self.all)

    async def pick(self, kind: Kind) -> Cell:
        """The least busy cell of a kind; waits PATIENCE_S for one where all were lost. Raises SandboxUnavailable."""
        if kind == "session" and not self._closing:
            await self._begin_sessions()
        while True:
            if self._closing or not self._of(kind):
                raise SandboxUnavailable(CLOSED)
            if usable := self._usable(kind):
                best = min(usable, key=lambda cell: len(cell.occupants))
                if best.started >= self._recycle_after:
                    best.retiring = True
                    self._keep(self._replace(best))
                return best
            if kind in self._broken:
                raise SandboxUnavailable(self._broken[kind])
            self._came.clear()
            await self._came.wait()

    async def _begin_sessions(self) -> None:
        """A pool that opens no session has no cells for them. All sessions wait for one start, which no session's end
        cuts short. Raises SandboxUnavailable where it fails; the next session tries again."""
        start = self._for_sessions
        if start is None or (start.done() and not self._of("session")):
            start = self._for_sessions = asyncio.get_running_loop().create_task(self.start("session"))
            self._upkeep.add(start)
            start.add_done_callback(self._upkeep.discard)
        if not start.done():
            await asyncio.wait({start})
            if not start.cancelled():  # else the pool is closed
                start.result()

    async def _add(self, kind: Kind) -> None:
        self.started += 1
        cell = Cell(self.started, kind, self._preload, self._armed, self._groups, self._cell_lost)
        await cell.start()
        if self._closing:
            return await cell.stop()
        self.all.append(cell)
        self._broken.pop(kind, None)
        self._came.set()

    async def _stop(self, cells: list[Cell]) -> None:
        self.all = [cell for cell in self.all if cell not in cells]
        ends = asyncio.gather(*(cell.stop() for cell in cells), return_exceptions=True)
        try:
            await asyncio.shield(ends)
        except asyncio.CancelledError:  # as by the pool's end, which is to wait for these, too
            await ends
            raise

    def _of(self, kind: Kind) -> list[Cell]:
        return [cell for cell in self.all if cell.kind == kind]

    def _usable(self, kind: Kind) -> list[Cell]:
        return [cell for cell in self._of(kind) if not cell.lost and not cell.retiring]

    def _cell_lost(self, cell: Cell) -> None:
        if self._closing or cell not in self.all:
            return
        self.lost += 1
        self._lost_at[cell.kind] = time.monotonic()
        self._useless[cell.kind] = 0 if cell.ended else self._useless[cell.kind] + 1
        log.warning("cell lost: cell=%d jobs=%d reason=%r", cell.number, cell.started, cell.lost)
        if not cell.retiring:  # else it is being replaced
            self._keep(self._replace(cell))

    async def _watch(self) -> None:
        """Gives up cells that no longer answer. A job must be overdue at two looks: between them this loop, had it
        stood still itself, has read what had come meanwhile."""
        before: set[tuple[int, int]] = set()
        while True:
            await asyncio.sleep(WATCH_S)
            overdue = {(cell.number, job) for cell in self.all if not cell.lost for job in cell.overdue()}
            silent = {number for number, _ in overdue & before}
            for cell in [cell for cell in self.all if cell.number in silent]:
                cell.give_up("the fork server does not answer")
            before = overdue

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._upkeep.add(task)
        task.add_done_callback(self._kept)

    def _kept(self, task: asyncio.Task[None]) -> None:
        self._upkeep.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("upkeep of the pool failed: %r", error, exc_info=error)

    async def _replace(self, cell: Cell) -> None:
        """Starts a new cell, then ends the old one when its last job is done. In the place of one that is lost it tries
        until one starts: the pool is whole again once the reason has passed. One that could be recycled but not
        replaced serves on."""
        attempts = 0
        if cell.lost and (useless := self._useless[cell.kind]):
            await asyncio.sleep(_pause_s(useless))
        while failure := await self._failure(cell.kind):
            attempts += 1
            level = logging.WARNING if attempts <= RECYCLE_ATTEMPTS else logging.DEBUG
            log.log(level, "cell restart failed: attempt=%d reason=%r", attempts, failure)
            if cell.lost:
                self._give_up(cell, failure)
            elif attempts == RECYCLE_ATTEMPTS:
                cell.retiring = False
                return self._came.set()
            await asyncio.sleep(_pause_s(attempts))
        while cell.occupants:
            await asyncio.sleep(0.05)
        await self._stop([cell])

    async def _failure(self, kind: Kind) -> str:
        """Why no new cell would start; nothing when one did."""
        try:
            await self._add(kind)
        except Exception as error:
            return str(error) or repr(error)
        return ""

    def _give_up(self, cell: Cell, failure: str) -> None:
        """Ends the waiting of jobs where there has been no cell for long; that one is tried for goes on."""
        if not self._usable(cell.kind) and time.monotonic() - self._lost_at[cell.kind] > PATIENCE_S:
            said = f"the last jail was lost ({cell.lost}) and could not be restarted: {failure}"
            self._broken[cell.kind] = f"{said}; it is tried again every {MOST_PAUSE_S:.0f} s"
            self._came.set()


def _pause_s(failures: int) -> float:
    return min(PAUSE_S * 2 ** min(failures - 1, 16), MOST_PAUSE_S)
