"""Servers of jails on the nodes of a Ray cluster: one actor a node holds a pool and serves it.

Jobs reach them over HTTP, as any server: Ray places the pools, starts them again when they die, and ends them with the
process that asked for them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastgrpo_sandbox.types import SandboxUnavailable

log = logging.getLogger("fastgrpo_sandbox")
RAY = "ray"  # in the place of servers' addresses
NEEDS_RAY = "jails on a Ray cluster need ray: install it on every node with `pip install 'fastgrpo[ray]'`"
START_S = 120.0  # for an actor's process, its imports and its cells
LOOK_S = 10.0  # how often a node is asked whether it still serves


class NodeServer:
    """The actor: a node's pool behind a port, from the first `serve` to the actor's end."""

    def __init__(self, host: str, key: str, cells: int) -> None:
        self._host, self._key, self._cells = host, key, cells
        self._open, self._starting = AsyncExitStack(), asyncio.Lock()
        self._port = 0

    async def serve(self, port: int) -> int:
        """The port that is served: `port`, or a free one for 0. Raises ServeError and SandboxUnavailable."""
        from fastgrpo_sandbox.serving.main import ServeError, serving

        async with self._starting:
            if not self._port:
                arguments = ["--host", self._host, "--port", str(port), "--cells", str(self._cells)]
                try:
                    _, self._port = await self._open.enter_async_context(serving(arguments, self._key))
                except ServeError as error:
                    raise SandboxUnavailable(str(error)) from None
            return self._port


@asynccontextmanager
async def ray_servers(address: str = "auto", cells: int | None = None) -> AsyncIterator[tuple[list[str], str]]:
    """(addresses, key) of a server on each node of a Ray cluster, for a RemotePool, until the block ends.

    address: the cluster's, as `ray.init` has it; not read where this process is connected already. cells: of each node
    (default: one for each CPU that Ray counts there). A node that can run no jails is left out with a warning, one that
    comes later is not used. Raises ImportError without the extra `ray`, SandboxUnavailable without cluster or server.
    """
    key = secrets.token_urlsafe(24)
    nodes, is_ours = await asyncio.to_thread(_connect, address)
    import ray

    actors = [_actor(node, key, cells) for node in nodes]
    upkeep: list[asyncio.Task[None]] = []
    try:
        ports = await asyncio.gather(*(_port(actor, 0, logging.WARNING) for actor in actors))
        at = [f"{node['NodeManagerAddress']}:{port}" for node, port in zip(nodes, ports, strict=True) if port]
        if not at:
            raise SandboxUnavailable(f"none of the Ray cluster's nodes ({len(nodes)}) can run jails: the log says why")
        upkeep += [asyncio.create_task(_keep(*each)) for each in zip(actors, ports, strict=True) if each[1]]
        yield [f"http://{each}" for each in at], key
    finally:
        for task in upkeep:
            task.cancel()
        for actor in actors:
            ray.kill(actor)
        if is_ours:
            await asyncio.to_thread(ray.shutdown)


def _connect(address: str) -> tuple[list[dict[str, Any]], bool]:
    """The cluster's nodes that are alive, and whether it was joined just now."""
    try:
        import ray
    except ImportError:
        raise ImportError(NEEDS_RAY) from None
    joined = not ray.is_initialized()
    if joined:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            said = str(error).partition("\n")[0]
            fix = "start one with `ray start --head`, or name its address in RAY_ADDRESS"
            raise SandboxUnavailable(f"no Ray cluster at {address!r}: {fix} ({said})") from None
    return [node for node in ray.nodes() if node["Alive"]], joined


def _actor(node: dict[str, Any], key: str, cells: int | None) -> Any:
    """An actor that stays on its node. It takes none of Ray's CPUs: what runs in it is bounded by its cells."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cells = cells or max(1, int(node["Resources"].get("CPU", 1)))
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor = ray.remote(NodeServer).options(num_cpus=0, max_restarts=-1, scheduling_strategy=there)
    return actor.remote(node["NodeManagerAddress"], key, cells)


async def _port(actor: Any, port: int, level: int) -> int:
    """The port that the actor serves; 0, and a line at `level`, where it does not."""
    from ray.exceptions import RayError

    try:
        return int(await asyncio.wait_for(actor.serve.remote(port), START_S))
    except (RayError, TimeoutError) as error:
        reason = str(getattr(error, "cause", None) or error or type(error).__name__).strip()
        log.log(level, "a node of the Ray cluster serves no jails: reason=%r", reason.partition("\n")[0])
        return 0


async def _keep(actor: Any, port: int) -> None:
    """Ask the actor to serve `port` every LOOK_S, as Ray may have started it anew. Warns once of a failure."""
    level = logging.WARNING
    while True:
        await asyncio.sleep(LOOK_S)
        level = logging.WARNING if await _port(actor, port, level) else logging.DEBUG
