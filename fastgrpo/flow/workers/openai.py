"""Workers behind OpenAI-compatible chat endpoints: who is asked by name, what it costs, what is known already."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastgrpo.config import Workers
from fastgrpo.flow.workers.cache import Cache
from fastgrpo.flow.workers.endpoint import Endpoint
from fastgrpo.flow.workers.protocol import Reply, Request, RequestRejected


class OpenAIWorker:
    """Asks the endpoints of `settings`, by their `names`: sends a request's messages and sampling, nothing else.

    `backoff_s` is the longest wait before the first further attempt, in seconds. Raises `UserError` for an address or a
    key that cannot be one, and for a cache folder that cannot be made.
    """

    def __init__(self, settings: Workers, *, backoff_s: float = 0.5) -> None:
        self._cache = Cache(Path(settings.cache_dir)) if settings.cache_dir else None
        self._endpoints = {name: Endpoint(worker, backoff_s=backoff_s) for name, worker in settings.by_name().items()}
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
    answer, seconds = await endpoint.answer(body, request.waiting)
    prices = endpoint.settings
    cost = answer.prompt_tokens * prices.prompt_price + answer.completion_tokens * prices.completion_price
    return Reply(
        text=answer.text,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        cost_usd=cost / 1e6,
        seconds=seconds,
    )
