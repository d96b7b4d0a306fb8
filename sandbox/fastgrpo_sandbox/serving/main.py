"""`python -m fastgrpo_sandbox serve`: jails for other programs and other hosts, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import errno
import importlib.util
import ipaddress
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from msgspec.structs import replace

from fastgrpo_sandbox.pool import SandboxPool
from fastgrpo_sandbox.remote import NEEDS_EXTRA
from fastgrpo_sandbox.types import DAY_S, RANGES, RUNS_PER_CELL, Limits, SandboxUnavailable

if TYPE_CHECKING:
    from fastgrpo_sandbox.serving.app import App

MAX_PORT = 65535
DRAIN_S = 30.0
CLOSE_S = 5.0
CAPS = Limits(wall_s=60, cpu_s=60, memory_mb=1024, processes=64, output_bytes=4 << 20, tmp_mb=64, files=256)
USER_ERROR = 2


class ServeError(Exception):
    """What its starter can mend; one sentence."""


def main(arguments: Sequence[str]) -> int:
    """Runs the server. Returns 0 after a graceful stop and 2 after one sentence on stderr."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        key = _key(options.host, options.key_env)
        _check(options)
        _allow_connections()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(arguments, options.host, key))
    except (ServeError, SandboxUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fastgrpo_sandbox serve", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback needs a key")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one and says which")
    parser.add_argument("--key-env", default="", metavar="NAME", help="environment variable that holds the bearer key")
    parser.add_argument("--cells", type=int, default=None, help="bubblewrap cells, 8 jobs each (default: one a core)")
    parser.add_argument("--queue", type=int, default=1024, help="jobs that may wait; beyond them the answer is 429")
    parser.add_argument("--wall-s", type=float, default=CAPS.wall_s, help="most seconds for one job")
    parser.add_argument("--memory-mb", type=int, default=CAPS.memory_mb, help="most MiB for one job")
    preload = "module imported in every cell, such as numpy; jails can read its package and what that needs"
    parser.add_argument("--preload", action="append", default=[], metavar="MODULE", help=preload)
    return parser


def _key(host: str, name: str) -> str:
    key = os.environ.get(name, "") if name else ""
    if name and not key:
        raise ServeError(f"--key-env names {name}, which is not set or empty: export it, or leave --key-env out")
    if not key and not _is_loopback(host):
        raise ServeError(f"{host} can be reached from other machines: name the variable of a key with --key-env")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _allow_connections() -> None:
    """Raise the soft limit of descriptors, usually 1024: each connection is one. Jobs have a limit of their own."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


@asynccontextmanager
async def serving(arguments: Sequence[str], key: str) -> AsyncIterator[tuple[App, int]]:
    """A server in the running loop within the block, and its port; options as on the command line.

    Raises ServeError and SandboxUnavailable.
    """
    options = _parser().parse_args(arguments)
    try:
        from aiohttp import web

        from fastgrpo_sandbox.serving.app import App
        from fastgrpo_sandbox.serving.connections import Connections
    except ImportError:
        raise ServeError(NEEDS_EXTRA) from None
    from fastgrpo_sandbox.serving.jails import Jails

    async with SandboxPool(cells=options.cells, preload=options.preload) as pool:
        at_once = RUNS_PER_CELL * int(pool.stats()["cells"])
        app = App(Jails(pool, at_once, options.queue, _caps(options)), key)
        runner = web.AppRunner(app.application(), handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_S)
        await runner.setup()
        assert runner.server is not None
        app.connections = Connections(runner.server)
        try:
            async with await _listen(app.connections, options) as listening:
                yield app, listening.sockets[0].getsockname()[1]
        finally:
            await runner.cleanup()


async def _serve(arguments: Sequence[str], host: str, key: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(arguments, key) as (app, port):
        print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await stop.wait()
        if not await app.drained(DRAIN_S):
            logging.warning("stopped with jobs under way: drain_s=%.0f", DRAIN_S)


async def _listen(connections: Callable[[], asyncio.Protocol], options: argparse.Namespace) -> asyncio.Server:
    try:
        loop = asyncio.get_running_loop()
        return await loop.create_server(connections, options.host, options.port, backlog=128, reuse_address=True)
    except OSError as error:
        where = f"port {options.port} of {options.host}"
        if error.errno == errno.EADDRINUSE:
            raise ServeError(f"{where} is taken by another program: stop that, or choose another --port") from None
        raise ServeError(f"{where} cannot be listened on: {error.strerror or error}") from None


def _caps(options: argparse.Namespace) -> Limits:
    return replace(CAPS, wall_s=options.wall_s, cpu_s=options.wall_s, memory_mb=options.memory_mb)


def _check(options: argparse.Namespace) -> None:
    least, most = RANGES["memory_mb"]
    bounds = (
        ("--port", options.port, 0 <= options.port <= MAX_PORT, f"0 to {MAX_PORT}"),
        ("--queue", options.queue, options.queue >= 0, "0 or more"),
        ("--cells", options.cells, options.cells is None or options.cells > 0, "1 or more"),
        ("--wall-s", options.wall_s, 0 < options.wall_s <= DAY_S, "more than 0 and at most a day"),
        ("--memory-mb", options.memory_mb, least <= options.memory_mb <= most, f"{least} to {most}"),
    )
    for option, value, holds, wanted in bounds:
        if not holds:
            raise ServeError(f"{option} must be {wanted}, got {value}")
    for module in options.preload:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise ServeError(f"--preload names {module}, which is not installed here: install it, or leave it out")
