"""The time that a workflow may take, without what it waits for others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """A deadline of `limit_s` seconds that stands still while any task holds it stopped."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = self._left_s = limit_s
        self._stops, self._counted_to = 0, 0.0
        self._deadline: asyncio.Timeout | None = None

    async def within(self, work: Awaitable[T]) -> T:
        """The result of `work`, after which the clock stands still. Raises `TimeoutError` where it runs out first."""
        try:
            async with asyncio.timeout(self._left_s) as self._deadline:
                return await work
        finally:
            if self._deadline:
                self._hold(self._deadline)
            self._deadline = None

    @property
    def counted_s(self) -> float:
        """Seconds counted so far, while the clock stands still."""
        return self._limit_s - self._left_s

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The clock stands still inside."""
        now = asyncio.get_running_loop().time
        if self._stops == 0:
            self._counted_to = now()
            if self._deadline:
                self._hold(self._deadline)
            self._reschedule(None)
        self._stops += 1
        try:
            yield
        finally:
            self._stops -= 1
            if self._stops == 0:
                self._reschedule(now() + self._left_s)

    def charge(self, seconds: float) -> None:
        """Count the last `seconds` of a stop after all; what several tasks charge at once counts once."""
        now = asyncio.get_running_loop().time()
        self._left_s -= now - max(now - seconds, self._counted_to)
        self._counted_to = now

    def _hold(self, deadline: asyncio.Timeout) -> None:
        if (when := deadline.when()) is not None:
            self._left_s = when - asyncio.get_running_loop().time()

    def _reschedule(self, when: float | None) -> None:
        if self._deadline and not self._deadline.expired():
            self._deadline.reschedule(when)
