"""A pool whose runs go to other hosts; its sessions, which talk to this process, stay in jails of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from fastgrpo_sandbox.pool import SandboxPool
from fastgrpo_sandbox.ray_servers import RAY, ray_servers
from fastgrpo_sandbox.remote import RemotePool
from fastgrpo_sandbox.types import Limits, Outcome, Tests


class SpreadPool(SandboxPool):
    """SandboxPool's interface, with servers behind `run`. Only for sessions must this machine be able to run jails.

    hosts: the servers' addresses, or "ray" for a server on each node of the Ray cluster. key: the servers' bearer key.
    cells: of this machine, for sessions, and of each node of Ray's. Raises as RemotePool and ray_servers do.
    """

    def __init__(
        self, hosts: Sequence[str], key: str = "", cells: int | None = None, limits: Limits | None = None
    ) -> None:
        super().__init__(cells=cells, limits=limits)
        self._urls, self._key, self._cells_asked = hosts, key, cells
        self._remote: RemotePool | None = None
        self._servers = AsyncExitStack()

    async def __aenter__(self) -> SpreadPool:
        try:
            urls, key = self._urls, self._key
            if RAY in urls:
                urls, key = await self._servers.enter_async_context(ray_servers(cells=self._cells_asked))
            self._remote = await self._servers.enter_async_context(RemotePool(urls, key=key))
            await self._begin()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def aclose(self) -> None:
        """Ends sessions and their cells, and drops what the servers run."""
        await super().aclose()
        await self._servers.aclose()

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        files: Mapping[str, str | bytes] | None = None,
        tests: Tests | None = None,
        limits: Limits | None = None,
        order: int = 0,
    ) -> Outcome:
        """RemotePool.run, by default with this pool's limits."""
        assert self._remote is not None, "a SpreadPool runs jobs inside its `async with` block"
        limits = limits or self.limits
        return await self._remote.run(code, stdin=stdin, files=files, tests=tests, limits=limits, order=order)

    def stats(self) -> dict[str, float]:
        """The sessions' counters and the servers'; `running` counts both."""
        here, there = super().stats(), self._remote.stats() if self._remote else {}
        return {**here, **there, "running": here["running"] + there.get("running", 0.0)}
