"""The pool for callers without an event loop: one thread runs the loop, calls block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent import futures
from types import TracebackType
from typing import Any, TypeVar

from uvloop import new_event_loop

from fastgrpo_sandbox.pool import SandboxPool
from fastgrpo_sandbox.remote import RemotePool
from fastgrpo_sandbox.types import Outcome, SandboxUnavailable

T = TypeVar("T")
LOOK_S = 1.0  # how often a caller that waits makes sure that somebody is at work
STOP_DEADLINE_S = 10.0
NOBODY = (
    "the pool's thread has ended, or is another process': use the pool inside its `with` block, where it was opened"
)


class BlockingSandboxPool:
    """`with BlockingSandboxPool() as pool: outcome = pool.run(code)`; the arguments are SandboxPool's, or a pool.
    Thread-safe."""

    def __init__(self, pool: RemotePool | SandboxPool | None = None, **options: Any) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox-pool", daemon=True)
        self.pool = pool or SandboxPool(**options)

    def __enter__(self) -> BlockingSandboxPool:
        if self._thread.ident is not None:
            raise ValueError("a pool is opened once: make another")
        self._thread.start()
        try:
            self.wait(self.pool.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait(self.pool.aclose())
        self._stop()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine run on the pool's loop; raises what it raises. Raises SandboxUnavailable where no
        thread runs the loop: outside of the `with` block, or in a process forked within it."""
        if not self._thread.is_alive():
            work.close()
            raise SandboxUnavailable(NOBODY)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not futures.wait([future], LOOK_S).done:
                if not self._thread.is_alive():
                    raise SandboxUnavailable(NOBODY)
            return future.result()
        finally:
            future.cancel()  # a caller that was interrupted wants no answer

    def run(self, code: str, **options: Any) -> Outcome:
        """SandboxPool.run."""
        return self.wait(self.pool.run(code, **options))

    def run_all(self, jobs: Sequence[dict[str, Any]]) -> list[Outcome]:
        """Outcomes of many jobs, each the keyword arguments of run, in order."""

        async def gather() -> list[Outcome]:
            return await asyncio.gather(*(self.pool.run(**job) for job in jobs))

        return self.wait(gather())

    def _stop(self) -> None:
        try:
            self.wait(_all_ended())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_DEADLINE_S)
            if not self._thread.is_alive():
                self._loop.close()


async def _all_ended() -> None:
    """Waits for what an interrupted call has left, as cells that were about to start, to end."""
    if left := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(left, timeout=STOP_DEADLINE_S)
