"""OpenAI's own client without sockets: what an agent in this process asks goes straight to the endpoint.

Over HTTP its pool looks at every connection for every request. With hundreds of rollouts under way that costs more than
all the rest, and Python's time is the engine's too.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from typing import Any

import openai
from openai._base_client import get_platform

from fastgrpo.rollouts.openai_form import JSON, Reply, error

PATH = "/v1/chat/completions"
REQUEST_S = 24 * 3600.0  # the endpoint's own deadlines come first
# (the rollout's key, a request's body) -> its answer.
Ask = Callable[[str, bytes], Awaitable[Reply]]
# httpx, or what the installed openai has in its place.
_httpx: Any = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])


class _Direct(_httpx.AsyncBaseTransport):
    """Chat completions by `ask`, in the loop that made it; what else is for `url` over HTTP, and no other host."""

    def __init__(self, ask: Ask, url: str) -> None:
        self._ask, self._loop, self._at = ask, asyncio.get_running_loop(), _httpx.URL(url)
        # The endpoint speaks no TLS: certificates would be read for nothing.
        self._http = _httpx.AsyncHTTPTransport(verify=False)

    async def handle_async_request(self, request: Any) -> Any:
        if _place(request.url) != _place(self._at):
            return _misdirected(request, self._at)
        if request.url.path != PATH or asyncio.get_running_loop() is not self._loop:
            return await self._http.handle_async_request(request)
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        # A task of its own, which the end of the rollout cancels as it closes a connection.
        asked = asyncio.ensure_future(self._ask(key, await request.aread()))
        try:
            async with asyncio.timeout(request.extensions.get("timeout", {}).get("read")):
                reply = await asked
        except TimeoutError:
            raise _httpx.ReadTimeout("no answer within the client's timeout", request=request) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not asked.cancelled() or (task is not None and task.cancelling()):
                raise
            raise _httpx.RemoteProtocolError("the rollout has ended", request=request) from None
        headers = [("Content-Type", reply.content_type), *reply.headers]
        return _httpx.Response(reply.status, headers=headers, content=reply.body)

    async def aclose(self) -> None:
        await self._http.aclose()


def _place(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _misdirected(request: Any, at: Any) -> Any:
    sentence = f"this client speaks to the policy at {at} alone: make another openai.AsyncOpenAI for {request.url.host}"
    return _httpx.Response(421, headers=[("Content-Type", JSON)], content=error(sentence, "misdirected"))


def direct_client(ask: Ask, url: str) -> openai.AsyncOpenAI:
    """A client of the endpoint at `url` whose requests are answered by `ask`: `with_key` gives it a rollout's key.

    It waits as long as the endpoint does, and does not ask twice.
    """
    http = _httpx.AsyncClient(transport=_Direct(ask, url), trust_env=False)
    return openai.AsyncOpenAI(base_url=url, api_key="-", http_client=http, max_retries=0, timeout=REQUEST_S)


def distant_client(url: str, key: str) -> openai.AsyncOpenAI:
    """A rollout's client over HTTP, for another event loop than the endpoint's."""
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=url, api_key=key, http_client=http, max_retries=0, timeout=REQUEST_S)


def in_loop(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this code runs in the event loop `loop`."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def with_key(client: openai.AsyncOpenAI, key: str) -> openai.AsyncOpenAI:
    """A copy for one rollout, which shares the original's connections."""
    made = client.with_options(api_key=key)
    made._platform = get_platform()  # else each copy finds it out in a thread
    return made
