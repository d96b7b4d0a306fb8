"""Who goes on next where only so many may: the waiters in their order, equals first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heapify, heappop, heappush


class Turns:
    """`free` turns at once. Who waits goes on before those of a higher `order`, and before equals that came later."""

    def __init__(self, free: int) -> None:
        self._free, self._came = free, 0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._gone = 0  # of these, that do not wait any more

    async def acquire(self, order: float = 0) -> None:
        """Wait for a turn."""
        if self._free:  # nobody waits then
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._came += 1
        heappush(self._waiting, (order, self._came, turn))
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
            turn = heappop(self._waiting)[2]
            if not turn.done():
                return turn.set_result(None)
            self._gone -= 1
        self._free += 1

    def _left(self) -> None:
        """One waits no more. Who comes and goes while no turn is free takes no memory: at most half have gone."""
        self._gone += 1
        if 2 * self._gone > len(self._waiting):
            self._waiting = [each for each in self._waiting if not each[2].done()]
            heapify(self._waiting)
            self._gone = 0

    @asynccontextmanager
    async def taken(self, order: float = 0) -> AsyncIterator[None]:
        """A turn in the length of the block."""
        await self.acquire(order)
        try:
            yield
        finally:
            self.release()
