"""One pool for a process that has no event loop of its own: opened at the first job, closed at exit, safe to fork."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Sequence
from typing import Any

from fastgrpo_sandbox.blocking import BlockingSandboxPool
from fastgrpo_sandbox.pool import SandboxPool
from fastgrpo_sandbox.remote import RemotePool
from fastgrpo_sandbox.types import RUNS_PER_CELL, Limits, Outcome, SandboxUnavailable

URLS, KEY = "FASTGRPO_SANDBOX_URLS", "FASTGRPO_SANDBOX_KEY"
TRIES = 3  # of a job that the jails lost
GRACE_S = 120.0  # for starting cells and for what other callers have in flight


class SharedPool:
    """Opens a pool at its first job and keeps it for the life of the process; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._options: dict[str, Any] = {}
        self._pool: BlockingSandboxPool | None = None
        self._inherited: list[
            BlockingSandboxPool | None
        ] = []  # the parent's, whose loop and thread are not ours to end

    @property
    def limits(self) -> Limits:
        """What a job may use that brings no limits of its own."""
        return self._options.get("limits") or Limits()

    def configure(self, **options: Any) -> None:
        """What the pool is opened with, from the next job on."""
        self.close()
        self._options = options

    def run_all(self, jobs: Sequence[dict[str, Any]]) -> list[Outcome]:
        """Outcomes of many jobs, each the keyword arguments of SandboxPool.run, in order. A job that the jails lose is
        run again; all end by a deadline. Raises SandboxUnavailable, with the fix, where jails cannot run at all."""
        if not jobs:
            return []
        pool, deadline = self._opened(), self._deadline_s(jobs)

        async def gather() -> list[Outcome]:
            return await asyncio.gather(*(_run(pool.pool, job, deadline) for job in jobs))

        return pool.wait(gather())

    def close(self) -> None:
        """Ends the pool, if one is open; the next job opens another."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.__exit__(None, None, None)

    def forget(self) -> None:
        """Give up the pool in a forked child: its thread is the parent's alone, and its lock may be held for ever."""
        self._inherited.append(self._pool)
        self._lock, self._pool = threading.Lock(), None

    def _opened(self) -> BlockingSandboxPool:
        with self._lock:
            if self._pool is None:
                self._pool = self._new_pool().__enter__()
            return self._pool

    def _new_pool(self) -> BlockingSandboxPool:
        urls = [url for url in os.environ.get(URLS, "").split(",") if url.strip()]
        if urls and not self._options:
            return BlockingSandboxPool(RemotePool(urls, key=os.environ.get(KEY, "")))
        if "urls" in self._options:
            return BlockingSandboxPool(RemotePool(**self._options))
        return BlockingSandboxPool(**self._options)

    def _deadline_s(self, jobs: Sequence[dict[str, Any]]) -> float:
        """Every case of every job may take its whole wall time, as many at once as this machine's cells hold."""
        walls = [(job.get("limits") or self.limits).wall_s for job in jobs]
        cases = [len(getattr(job.get("tests"), "cases", "1")) for job in jobs]
        total = sum(wall * count for wall, count in zip(walls, cases, strict=True))
        at_once = RUNS_PER_CELL * (self._options.get("cells") or os.cpu_count() or 1)
        return TRIES * (max(walls, default=0.0) + total / at_once) + GRACE_S


async def _run(pool: SandboxPool | RemotePool, job: dict[str, Any], deadline_s: float) -> Outcome:
    outcome = Outcome("infrastructure", error=f"no outcome within {deadline_s:.0f} s", error_by="host")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(deadline_s):
            for _ in range(TRIES):
                outcome = await pool.run(**job)
                if outcome.status != "infrastructure":
                    break
    return outcome


def _close_at_exit() -> None:
    with contextlib.suppress(SandboxUnavailable, RuntimeError):
        jails.close()


jails = SharedPool()
os.register_at_fork(after_in_child=jails.forget)
atexit.register(_close_at_exit)
