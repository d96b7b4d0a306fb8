"""The jails of a run: opened once, refused in one sentence, shown while they run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from fastgrpo.config import Sandbox
from fastgrpo.errors import UserError
from fastgrpo_sandbox import Limits, SandboxPool, SandboxUnavailable, SpreadPool
from fastgrpo_sandbox.shared import KEY

if TYPE_CHECKING:
    from fastgrpo.record.log import RunLog


@asynccontextmanager
async def open_pool(sandbox: Sandbox, log: RunLog | None) -> AsyncIterator[SandboxPool]:
    """A jail pool, whose jails in flight `log` shows. Raises UserError where jails cannot run, here or on the hosts."""
    async with AsyncExitStack() as stack:
        try:
            pool = await stack.enter_async_context(new_pool(sandbox, sandbox.cells or None))
        except (SandboxUnavailable, ImportError) as error:
            raise UserError(str(error)) from error
        watcher = asyncio.create_task(_watch(pool, log)) if log else None
        try:
            yield pool
        finally:
            if watcher:
                watcher.cancel()


def new_pool(sandbox: Sandbox, cells: int | None) -> SandboxPool:
    """A pool that is not open yet: of this machine, or over `sandbox.hosts`."""
    if not sandbox.servers:
        return SandboxPool(cells=cells, limits=run_limits(sandbox))
    return SpreadPool(sandbox.servers, key=os.environ.get(KEY, ""), cells=cells, limits=run_limits(sandbox))


def run_limits(sandbox: Sandbox) -> Limits:
    """What one run of a solution may use, as configured."""
    return Limits(
        wall_s=sandbox.wall_s,
        cpu_s=sandbox.cpu_s,
        memory_mb=sandbox.memory_mb,
        processes=sandbox.processes,
        output_bytes=sandbox.output_bytes,
    )


async def _watch(pool: SandboxPool, log: RunLog) -> None:
    while True:
        log.status(jails=pool.stats()["running"])
        await asyncio.sleep(0.25)
