"""Who goes on next where only so many may: the waiters in their order, equals first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heappop, heappush


class Turns:
    """`free` turns at once. Who waits goes on before those of a higher `order`, and before equals that came later."""

    def __init__(self, free: int) -> None:
        self._free, self._came = free, 0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []

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
            raise

    def release(self) -> None:
        """Hand a turn on."""
        while self._waiting:
            turn = heappop(self._waiting)[2]
            if not turn.done():
                return turn.set_result(None)
        self._free += 1

    @asynccontextmanager
    async def taken(self, order: float = 0) -> AsyncIterator[None]:
        """A turn in the length of the block."""
        await self.acquire(order)
        try:
            yield
        finally:
            self.release()
