"""Workers behind OpenAI-compatible chat endpoints: who is asked by name, what it costs, which answers are cached."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.config import Workers
from fastgrpo.errors import UserError, expanded
from fastgrpo.flow.types import Reply, Request, RequestRejected
from fastgrpo.flow.workers.endpoint import Endpoint

log = logging.getLogger(__name__)


class OpenAIWorker:
    """Asks the endpoints of `settings`, by their `names`: sends a request's messages and sampling, nothing else.

    Raises `UserError` for an address or a key that cannot be one, and for a cache folder that cannot be made.
    """

    def __init__(self, settings: Workers) -> None:
        self._cache = Cache(expanded(settings.cache_dir)) if settings.cache_dir else None
        self._endpoints = {name: Endpoint(worker) for name, worker in settings.by_name().items()}
        self.names = tuple(self._endpoints)

    async def ask(self, request: Request) -> Reply:
        """The answer of the endpoint that the request names, or the cached one (free, in no time).

        Raises `WorkerError` where the endpoint fails or gives no answer (`NoAnswer`), `RequestRejected` where this one
        request exceeds its context or names no worker. Neither is cached.
        """
        endpoint = self._endpoints.get(request.worker or self.names[0])
        if endpoint is None:
            raise RequestRejected(f"there is no worker {request.worker!r}; choose one of: {', '.join(self.names)}")
        body = endpoint.body(request)
        # A seed that is not sent still tells one draw from another.
        asked = [endpoint.settings.base_url, body, request.seed]
        if self._cache and (known := self._cache.read(asked)):
            return known
        reply = await _reply(endpoint, body, request)
        if self._cache:
            self._cache.write(asked, reply)
        return reply

    async def aclose(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(endpoint.aclose() for endpoint in self._endpoints.values()))


async def _reply(endpoint: Endpoint, body: dict[str, Any], request: Request) -> Reply:
    answer, seconds = await endpoint.answer(body, request.waiting, request.order)
    prices = endpoint.settings
    cost = answer.prompt_tokens * prices.prompt_price + answer.completion_tokens * prices.completion_price
    return Reply(
        text=answer.text,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        cost_usd=cost / 1e6,
        seconds=seconds,
    )


class Cache:
    """Workers' answers under `folder`, one file each, named by the hash of what was asked.

    Raises `UserError` where the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create workers.cache_dir {folder}: {error.strerror}; set another folder") from None

    def _path(self, asked: Any) -> Path:
        name = hashlib.sha256(msgspec.json.encode(asked, order="deterministic")).hexdigest()
        return self._folder / name[:2] / f"{name}.json"

    def read(self, asked: Any) -> Reply | None:
        """The answer to what was asked before, its tokens kept, its price and seconds 0; a broken file is absent."""
        try:
            found = msgspec.json.decode(self._path(asked).read_bytes(), type=Reply)
        except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
            return None
        return msgspec.structs.replace(found, cost_usd=0.0, seconds=0.0)

    def write(self, asked: Any, reply: Reply) -> None:
        """Write the answer whole or not at all; a full disk costs the cache, not the run."""
        path = self._path(asked)
        whole = path.with_name(f"{path.name}.{os.getpid()}.{id(reply)}")
        try:
            path.parent.mkdir(exist_ok=True)
            whole.write_bytes(msgspec.json.encode(reply))
            whole.replace(path)
        except OSError as error:
            whole.unlink(missing_ok=True)
            log.warning("cannot cache a worker's answer in %s: %s", path.parent, error.strerror)
