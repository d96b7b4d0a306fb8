"""Connections to the server: so many at once, and none that never asks. Whoever opens them need have no key."""

from __future__ import annotations

import asyncio
import os
import resource
from typing import Any

from aiohttp import web

MOST = 8192  # each takes some 10 KB
KEPT_BACK = 64  # descriptors for readers, and what else is opened now and then
ASK_S = 60.0  # for the first request of a connection, once it is open, to begin


class Connections:
    """Makes aiohttp's protocol for each, as its `web.Server` does, or one that closes where there are too many."""

    def __init__(self, server: web.Server) -> None:
        self._server = server
        self._silent: dict[Any, asyncio.TimerHandle] = {}  # that have not asked yet, with their ends
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened = len(os.listdir("/proc/self/fd"))  # mostly by cells, which are all started anew before the old ones end
        free = MOST if descriptors == resource.RLIM_INFINITY else descriptors - 2 * opened - KEPT_BACK
        self._most = max(1, min(MOST, free))

    def __call__(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        if len(self._server.connections) >= self._most:
            return _Closed()
        if len(self._silent) > 2 * self._most:
            for closed in [each for each in self._silent if each.transport is None]:
                self._silent.pop(closed).cancel()
        made: Any = self._server()
        self._silent[made] = asyncio.get_running_loop().call_later(ASK_S, self._end_silent, made)
        return made

    def has_asked(self, request: web.Request) -> None:
        """A connection has sent a request: from then on aiohttp ends it where it falls silent."""
        if (end := self._silent.pop(request.protocol, None)) is not None:
            end.cancel()

    def _end_silent(self, made: Any) -> None:
        del self._silent[made]
        if made.transport is not None:
            made.transport.abort()


class _Closed(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
