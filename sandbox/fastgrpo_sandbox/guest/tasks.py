"""What the other side awaits: tasks on this process' event loop, which goes on for a slice each time it is asked."""

from __future__ import annotations

from typing import Any

SLICE_S = 0.002


class Tasks:
    """A task for each awaitable that the other side waits for: on the loop that runs, or else on one of its own."""

    def __init__(self) -> None:
        self._tasks: dict[int, Any] = {}
        self._loop: Any = None

    def advance(self, awaitable: Any, cancel: bool) -> list[Any]:
        """Whether it has ended, and what it gave. Raises what it raised."""
        import asyncio  # 20 ms that most jobs need not pay for

        running = asyncio._get_running_loop()
        loop = running or self._loop
        if loop is None:
            loop = self._loop = asyncio.new_event_loop()
        task = self._tasks.get(id(awaitable))
        is_new = task is None  # what begins with it begins before any has a slice
        if task is None:
            task = self._tasks[id(awaitable)] = asyncio.ensure_future(_wait(awaitable), loop=loop)
        if cancel:
            task.cancel()
        if running is None and not task.done():
            task.get_loop().run_until_complete(asyncio.wait([task], timeout=0 if is_new else SLICE_S))
        if not task.done():
            return [False, None]
        del self._tasks[id(awaitable)]
        return [True, task.result()]


async def _wait(awaitable: Any) -> Any:
    return await awaitable
