"""The time that a workflow and each of its questions to a worker may take, without what they wait for others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from msgspec.structs import replace

from fastgrpo.flow.types import Reply, Request, Worker, WorkerError

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


async def reply_within(worker: Worker, request: Request, call_s: float) -> Reply:
    """The worker's reply, each attempt within `call_s` of its own start. Raises `WorkerError` or `RequestRejected`."""
    try:
        async with asyncio.timeout(call_s) as deadline:
            return await worker.ask(replace(request, waiting=partial(_standing, deadline, call_s)))
    except TimeoutError:
        raise WorkerError(f"the worker did not answer within {call_s:g} s") from None


@contextmanager
def _standing(deadline: asyncio.Timeout, seconds: float) -> Iterator[None]:
    """No deadline inside; afterwards it is `seconds` away again."""
    deadline.reschedule(None)
    yield
    deadline.reschedule(asyncio.get_running_loop().time() + seconds)
