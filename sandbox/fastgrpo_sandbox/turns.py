"""Who goes on next where only so many may: the waiters in their order, equals first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from heapq import heapify, heappop, heappush

LANE: ContextVar[str] = ContextVar("lane", default="")  # for whom a task works, as a server's client


class Turns:
    """`free` turns at once. Who waits goes on before those of a higher `order`, and before equals that came later. Of
    several lanes each has its turn: a lane's first waiters go on with the others' first, however many it has."""

    def __init__(self, free: int) -> None:
        self._free, self._came = free, 0
        self._waiting: list[tuple[float, int, int, asyncio.Future[None], str]] = []  # by order, place and coming
        self._gone = 0  # of these, that do not wait any more
        self._now = 0  # the place that went on last
        self._last: dict[str, int] = {}  # place of a lane, where it is yet to come

    async def acquire(self, order: float = 0) -> None:
        """Wait for a turn."""
        if self._free:  # nobody waits then
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._came += 1
        lane = LANE.get()
        place = self._last[lane] = max(self._now, self._last.get(lane, 0)) + 1
        heappush(self._waiting, (order, place, self._came, turn, lane))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            else:
                self._left()
            raise

    def release(self) -> None:
        """Hand a turn on."""
        while self._waiting:
            _, place, _, turn, lane = heappop(self._waiting)
            self._now = max(self._now, place)
            if self._last.get(lane, 0) <= self._now:
                self._last.pop(lane, None)
            if not turn.done():
                return turn.set_result(None)
            self._gone -= 1
        self._free += 1

    def _left(self) -> None:
        """One waits no more. Who comes and goes while no turn is free takes no memory: at most half have gone."""
        self._gone += 1
        if 2 * self._gone > len(self._waiting):
            self._waiting = [each for each in self._waiting if not each[3].done()]
            heapify(self._waiting)
            self._gone = 0
            self._last = {}
            for _, place, _, _, lane in self._waiting:
                self._last[lane] = max(place, self._last.get(lane, 0))

    @asynccontextmanager
    async def taken(self, order: float = 0) -> AsyncIterator[None]:
        """A turn in the length of the block."""
        await self.acquire(order)
        try:
            yield
        finally:
            self.release()
