"""The HTTP application: routes, keys, sizes and errors. What a request asks for is decided in fusion, ai2 and e2b."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from aiohttp import BasicAuth, web

from fastgrpo_sandbox.remote import MSGPACK, RunRequest
from fastgrpo_sandbox.serving import ai2, e2b, fusion
from fastgrpo_sandbox.serving.bodies import FORMATS, JSON, read_body
from fastgrpo_sandbox.serving.connections import Connections
from fastgrpo_sandbox.serving.jails import Busy, Jails, Lost, Refused
from fastgrpo_sandbox.serving.metrics import Metrics
from fastgrpo_sandbox.turns import LANE
from fastgrpo_sandbox.types import Outcome, SandboxUnavailable

log = logging.getLogger("fastgrpo_sandbox")
MAX_BODY = 16 << 20  # bytes; a job of 8 MiB in JSON's escapes
MOST_BODIES = 256 << 20  # bytes of all bodies that arrive or are being answered, and of what JSON becomes when decoded
CONTAINER_BYTES, ITEM_BYTES = 64, 32
BODY_S = 60.0  # for a body to arrive
SEND_S, SLOWEST = 30.0, 1 << 18  # for an answer to be read, and bytes a second beyond
OPEN = ("/healthz", "/health")  # without a key
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def run(jails: Jails, request: RunRequest) -> Outcome:
    """The pool's own form, which RemotePool speaks."""
    return await jails.run(request)


# Path, what its body must be, and who answers.
FORMS: tuple[tuple[str, type, Callable[[Jails, Any], Awaitable[Any]]], ...] = (
    ("/run", RunRequest, run),
    ("/run_code", fusion.RunCode, fusion.run_code),
    ("/submit", fusion.Submit, fusion.submit),
    ("/test_program", ai2.TestProgram, ai2.test_program),
    ("/test_program_stdio", ai2.TestProgram, ai2.test_program_stdio),
    ("/execute_batch", e2b.Batch, e2b.execute_batch),
)


class App:
    """The application over `jails`. key: bearer key of every path but /healthz; "" asks for none."""

    def __init__(self, jails: Jails, key: str = "") -> None:
        self._jails = jails
        self._key = key.encode()
        self._metrics = Metrics(jails)
        self._room = _Room()
        self._paths = {path for path, _, _ in FORMS} | {*OPEN, "/metrics"}
        self.draining = False
        self.connections: Connections | None = None  # of the server that has this application

    def application(self) -> web.Application:
        """The routes, as aiohttp's application."""
        app = web.Application(middlewares=[self._counted, self._guarded], client_max_size=MAX_BODY)
        for path in OPEN:
            app.router.add_get(path, self._health)
        app.router.add_get("/metrics", self._show_metrics)
        for path, form, answer in FORMS:
            app.router.add_post(path, self._handler(form, answer))
        return app

    async def drained(self, deadline_s: float) -> bool:
        """From now on every request is turned away. Whether the jobs under way ended within `deadline_s`."""
        self.draining = True
        ends_at = time.monotonic() + deadline_s
        while self._jails.taken and time.monotonic() < ends_at:
            await asyncio.sleep(0.02)
        return not self._jails.taken

    def _handler(self, form: type, answer: Callable[[Jails, Any], Awaitable[Any]]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            if request.content_type not in FORMATS:
                return _error(415, f"send the body as {JSON} or {MSGPACK}, and say so in Content-Type")
            LANE.set(request.remote or "")
            self._jails.admit()
            with self._room.share() as take:
                body = await _body(request, take)
                asked = await read_body(self._jails, form, request.content_type, body)
                response = _encoded(await answer(self._jails, asked), request)
            size = len(response.body) if isinstance(response.body, bytes) else 0
            with self._jails.unread(size):
                await _send(response, request, SEND_S + size / SLOWEST)
            return response

        return handle

    async def _health(self, request: web.Request) -> web.Response:
        if self.draining or not self._jails.pool.stats()["cells"]:
            return _error(503, "stopping" if self.draining else "no jail is alive")
        return _json({"status": "healthy"})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), content_type="text/plain", charset="utf-8")

    @web.middleware
    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.perf_counter()
        if self.connections is not None:
            self.connections.has_asked(request)
        path = request.path if request.path in self._paths else "other"
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            self._metrics.answered(path, 499, time.perf_counter() - began)  # the client went away
            raise
        self._metrics.answered(path, response.status, time.perf_counter() - began)
        return response

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN and not self._allowed(request):
            return _error(401, "send the server's key: `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"})
        if self.draining and request.path not in OPEN:
            return _error(503, "the server is stopping", {"Retry-After": "1"})
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return _error(404, f"{request.path:.200} is not offered; there are {', '.join(sorted(self._paths))}")
        except web.HTTPException as error:
            return _error(error.status, error.reason, {"Allow": error.headers["Allow"]} if error.status == 405 else {})
        except Exception as error:
            return _refusal(error)

    def _allowed(self, request: web.Request) -> bool:
        """Compared in constant time. As the password of Basic, too: so `http://any:KEY@host` carries it for clients
        that know no keys."""
        said = request.headers.get("Authorization", "")
        given = said.removeprefix("Bearer ")
        if said.startswith("Basic "):
            try:
                given = BasicAuth.decode(said).password
            except ValueError:
                return False
        return not self._key or hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._key)


class _Room:
    """Memory that requests take, all together."""

    def __init__(self) -> None:
        self._taken = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A request's function that takes so many bytes, which are given back at its end. It raises Busy where there is
        no room for them beside other requests."""
        own = 0

        def take(size: int) -> None:
            nonlocal own
            if self._taken > own and self._taken + size > MOST_BODIES:
                raise Busy(1)
            own += size
            self._taken += size

        try:
            yield take
        finally:
            self._taken -= own


async def _body(request: web.Request, take: Callable[[int], None]) -> bytes:
    """A request's body, within BODY_S. What has come counts, not what was announced: that costs nobody anything."""
    body = bytearray()
    async with asyncio.timeout(BODY_S):
        async for part in request.content.iter_any():
            take(len(part))
            body += part
            if len(body) > MAX_BODY:
                raise web.HTTPRequestEntityTooLarge(max_size=MAX_BODY, actual_size=len(body))
    if request.content_type == JSON:
        take(CONTAINER_BYTES * (body.count(b"[") + body.count(b"{")) + ITEM_BYTES * body.count(b","))
    return bytes(body)


async def _send(response: web.Response, request: web.Request, deadline_s: float) -> None:
    """Returns once the client has read the answer, but for what is in the kernel's buffers, or is cut off."""
    try:
        async with asyncio.timeout(deadline_s):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        log.warning("an answer was not read: bytes=%s deadline_s=%.0f", response.content_length, deadline_s)
        if request.transport is not None:
            request.transport.abort()


def _refusal(error: Exception) -> web.Response:
    """What went wrong, without anything of this host; the unexpected is logged here and said nowhere else."""
    match error:
        case Busy():
            return _error(429, str(error), {"Retry-After": str(error.retry_after_s)})
        case Refused():
            return _error(422, str(error))
        case msgspec.ValidationError() | msgspec.DecodeError():
            return _error(422, f"the request is malformed: {error}")
        case UnicodeDecodeError() | RecursionError():
            return _error(422, "the request is malformed")
        case Lost():
            return _error(503, str(error), {"Retry-After": "1"})
        case TimeoutError():
            return _error(408, f"the body did not arrive within {BODY_S:.0f} s")
        case SandboxUnavailable():
            log.error("jails unavailable: reason=%r", str(error))
            return _error(503, "no jail can be started here; the server's log says why", {"Retry-After": "5"})
    log.error("request failed", exc_info=error)
    return _error(500, "the server failed; its log says why")


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> web.Response:
    """`error` for our clients and `detail` for those of FastAPI's servers."""
    body = msgspec.json.encode({"error": sentence, "detail": sentence})
    return web.Response(status=status, body=body, content_type=JSON, headers=headers)


def _encoded(answer: Any, request: web.Request) -> web.Response:
    if MSGPACK in request.headers.get("Accept", ""):
        return web.Response(body=msgspec.msgpack.encode(answer), content_type=MSGPACK)
    return _json(answer)


def _json(answer: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), content_type=JSON)
