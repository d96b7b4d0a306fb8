"""An OpenAI-compatible endpoint over the engine, on loopback: what agents write there is recorded in token ids.

Each rollout has a key of its own, which is how the endpoint knows whose request it is. It lives as long as the engine's
generator, at one address: an agent may keep connections from one batch of rollouts to the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cached_property, partial

import msgspec
from aiohttp import web
from openai import AsyncOpenAI

from fastgrpo.rollouts.direct_client import direct_client, distant_client, in_loop, with_key
from fastgrpo.rollouts.openai_form import JSON, MODEL, Refused, Reply, Request, completion, error, events
from fastgrpo.rollouts.session import Access, Session

log = logging.getLogger(__name__)
# Where verifiers' client, one for all rollouts, says whose a request is.
SESSION_ID = "X-Session-ID"
MAX_BODY = 16 << 20  # bytes
BODY_S = 60.0  # for a body to arrive
CLOSE_S = 2.0  # for connections still open at the end
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Endpoint:
    """The sessions under way, by their keys, and the application that serves them."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._loop = asyncio.get_running_loop()
        self.url = ""

    @asynccontextmanager
    async def serving(self, session: Session) -> AsyncIterator[Access]:
        """A rollout's way to its session; the key opens nothing after the block, and what is under way is dropped."""
        self._sessions[session.key] = session
        try:
            yield Access(self.url, session.key, partial(self._client_of, session.key))
        finally:
            del self._sessions[session.key]
            await session.close()

    def application(self) -> web.Application:
        """The routes, as aiohttp's application."""
        app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        app.router.add_get("/v1/models", self._models)
        return app

    async def ask(self, key: str, body: bytes) -> Reply:
        """The answer to one body of a chat completion, errors too."""
        try:
            return await self._completed(self._session(key), body)
        except Exception as problem:
            return _reply(problem)

    async def close(self) -> None:
        """Close the connections of the clients in this process."""
        if "_client" in self.__dict__:
            await self._client.close()

    @cached_property
    def _client(self) -> AsyncOpenAI:
        return direct_client(self.ask, self.url)

    def _client_of(self, key: str) -> AsyncOpenAI:
        if in_loop(self._loop):
            return with_key(self._client, key)
        # A plain `act` has a loop of its own in its thread, or will: only sockets lead from there.
        return distant_client(self.url, key)

    async def _completed(self, session: Session, body: bytes) -> Reply:
        request = msgspec.json.decode(body, type=Request)
        answer = await session.answer(request)
        if request.stream:
            return Reply(200, events(answer, request), "text/event-stream")
        return Reply(200, msgspec.json.encode(completion(answer, request)))

    async def _chat_completions(self, http: web.Request) -> web.Response:
        session = self._session(_bearer(http), http.headers.get(SESSION_ID, ""))
        async with asyncio.timeout(BODY_S):
            body = await http.read()
        return _response(await self._completed(session, body))

    async def _models(self, http: web.Request) -> web.Response:
        self._session(_bearer(http))
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "fastgrpo"}
        return web.Response(body=msgspec.json.encode({"object": "list", "data": [model]}), content_type=JSON)

    def _session(self, *keys: str) -> Session:
        for key in keys:
            if key in self._sessions:
                return self._sessions[key]
        raise Refused("this key belongs to no rollout under way: send the one it was given", "invalid_api_key")


@asynccontextmanager
async def open_endpoint() -> AsyncIterator[Endpoint]:
    """An `Endpoint` that listens on a free port of loopback within the block."""
    endpoint = Endpoint()
    runner = web.AppRunner(endpoint.application(), handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        host, port = runner.addresses[0][:2]
        endpoint.url = f"http://{host}:{port}/v1"
        yield endpoint
    finally:
        await endpoint.close()
        await runner.cleanup()


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong in OpenAI's form of an error, and nothing of this host in it."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        here = "POST /v1/chat/completions and GET /v1/models are: speak OpenAI's chat completions"
        return _response(_refusal(404, f"{request.path:.200} is not answered by this endpoint, {here}", "http"))
    except Exception as problem:
        return _response(_reply(problem))


def _reply(problem: Exception) -> Reply:
    match problem:
        case Refused(code="invalid_api_key" | "ended"):
            return _refusal(401, str(problem), problem.code, "authentication_error")
        case Refused():
            kind = "server_error" if problem.status >= 500 else "invalid_request_error"
            return _refusal(problem.status, str(problem), problem.code, kind)
        case msgspec.DecodeError() | UnicodeDecodeError() | RecursionError():
            return _refusal(400, f"the request is malformed: {problem}", "invalid_request")
        case TimeoutError():
            return _refusal(408, f"the body did not arrive within {BODY_S:.0f} s", "body_timeout")
        case web.HTTPException():
            return _refusal(problem.status, problem.reason, "http")
    log.error("request failed", exc_info=problem)
    return _refusal(500, "the endpoint failed; the run's log says why", "internal", "server_error")


def _refusal(status: int, sentence: str, code: str, kind: str = "invalid_request_error") -> Reply:
    return Reply(status, error(sentence, code, kind), headers=(("Retry-After", "1"),) if status == 429 else ())


def _response(reply: Reply) -> web.Response:
    return web.Response(status=reply.status, body=reply.body, content_type=reply.content_type, headers=reply.headers)


def _bearer(http: web.Request) -> str:
    return http.headers.get("Authorization", "").removeprefix("Bearer ")
