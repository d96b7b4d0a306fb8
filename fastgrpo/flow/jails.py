"""The jails of a run: opened once, refused in one sentence, shown while they run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastgrpo.errors import UserError
from fastgrpo.record.log import RunLog
from fastgrpo_sandbox import Limits, SandboxPool, SandboxUnavailable


@asynccontextmanager
async def open_pool(cells: int, limits: Limits, log: RunLog | None) -> AsyncIterator[SandboxPool]:
    """A jail pool, whose jails in flight `log` shows. Raises UserError where this machine cannot run jails."""
    async with AsyncExitStack() as stack:
        try:
            pool = await stack.enter_async_context(SandboxPool(cells=cells or None, limits=limits))
        except SandboxUnavailable as error:
            raise UserError(str(error)) from error
        watcher = asyncio.create_task(_watch(pool, log)) if log else None
        try:
            yield pool
        finally:
            if watcher:
                watcher.cancel()


async def _watch(pool: SandboxPool, log: RunLog) -> None:
    while True:
        log.status(jails=pool.stats()["running"])
        await asyncio.sleep(0.25)
