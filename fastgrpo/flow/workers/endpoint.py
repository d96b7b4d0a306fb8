"""One OpenAI-compatible chat endpoint: bounded concurrency, a deadline for each attempt, retries, plain reasons."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import certifi
import msgspec

from fastgrpo.config import Workers
from fastgrpo.errors import UserError
from fastgrpo.flow.types import NoAnswer, Request, RequestRejected, WorkerError
from fastgrpo.flow.workers.answers import Answer, Passing, failure, read_answer
from fastgrpo_sandbox.given import without_login
from fastgrpo_sandbox.turns import Turns

log = logging.getLogger(__name__)

PARAMETERS = ("max_tokens", "temperature", "seed")
# The longest wait before the first further attempt, and before any.
BACKOFF_S = 0.5
_LONGEST_WAIT_S = 60.0
# vLLM's server closes a connection that nobody has used for 5 s; one that closes under a request costs an attempt.
_KEEP_ALIVE_S = 4.0


class _Response(NamedTuple):
    """What came over HTTP."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> Any:
        """The body of a refusal: its JSON, or its text."""
        text = self.body.decode(errors="replace").strip()
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text


class Endpoint:
    """Asks the endpoint that `settings` name.

    It asks by aiohttp: the event loop that sends the requests reads the jails' verdicts, too, and with 512 at once
    OpenAI's client takes nine times the time, in a pool that looks through all its connections twice a request and in
    layers over it. Raises `UserError` for an address, a key or a proxy of the environment that cannot be one.
    """

    def __init__(self, settings: Workers) -> None:
        self.settings = settings
        self._url, key = _address(settings.base_url), _key(settings.api_key_env)
        self._proxy = _proxy(self._url)
        self._headers = {"Content-Type": "application/json"}
        if not urlsplit(self._url).username:
            self._headers["Authorization"] = f"Bearer {key}"
        self._session: aiohttp.ClientSession | None = None
        self._extra: dict[str, Any] = msgspec.json.decode(settings.extra_body or "{}")
        self._slots = Turns(settings.concurrency)
        self._jitter = random.Random(os.getpid())
        self._bound = "max_tokens"
        self._warned = set[str]()

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent for `request`, less the name and the key."""
        settings = self.settings
        temperature = settings.temperature if request.temperature is None else request.temperature
        body = {
            "model": settings.model,
            "messages": request.messages,
            "temperature": temperature,
            "max_tokens": settings.max_tokens,
            "seed": request.seed,
        }
        return {name: value for name, value in body.items() if name not in settings.dropped} | self._extra

    async def answer(
        self, body: dict[str, Any], waiting: Callable[[], AbstractContextManager[None]], order: int = 0
    ) -> tuple[Answer, float]:
        """The answer and its seconds, after at most `retries` further attempts, each after twice as long a wait.

        Waits for a turn, which a lower `order` gets first, and between attempts pass inside `waiting()`.
        Raises `WorkerError` or `RequestRejected`.
        """
        with waiting():
            await self._slots.acquire(order)
        try:
            for attempt in range(self.settings.retries + 1):
                try:
                    start = time.perf_counter()
                    return await self._attempt(body), time.perf_counter() - start
                except WorkerError as error:
                    if not isinstance(error, Passing) or attempt == self.settings.retries:
                        raise self._named(error, attempt + 1) from None
                    with waiting():
                        await asyncio.sleep(self._pause(attempt, error.wait_s))
        finally:
            self._slots.release()
        raise AssertionError("unreachable")

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _pause(self, attempt: int, wanted_s: float) -> float:
        doubled = BACKOFF_S * 2**attempt * self._jitter.uniform(0.5, 1.0)
        return min(max(doubled, wanted_s), _LONGEST_WAIT_S)

    async def _attempt(self, body: dict[str, Any]) -> Answer:
        """One answer. Some models take the bound of `max_tokens` only under its newer name, and say so."""
        bound = self._bound
        reply = await self._send({bound if name == "max_tokens" else name: value for name, value in body.items()})
        if reply.status < 300:
            return self._read(reply.body)
        if bound != "max_tokens" or "max_tokens" not in body or not _wants_newer_name(reply):
            raise self._failure(reply, body)
        self._bound = "max_completion_tokens"
        return await self._attempt(body)

    async def _send(self, body: dict[str, Any]) -> _Response:
        url, settings = f"{self._url}/chat/completions", self.settings
        try:
            data = msgspec.json.encode(body)
            # A proxy is told the headers of a session, the key among them: these are the request's own.
            asking = self._connections().post(url, data=data, headers=self._headers, proxy=self._proxy or None)
            async with asyncio.timeout(settings.timeout_s), asking as response:
                return _Response(response.status, response.reason or "", response.headers, await response.read())
        except TimeoutError:
            late = f"did not answer within {settings.timeout_s:g} s; raise workers.timeout_s or lower its load"
            raise Passing(late) from None
        except UnicodeEncodeError:
            raise RequestRejected("the request holds half a character (a lone surrogate)") from None
        except aiohttp.ClientError as error:
            said = f"cannot be reached ({self._cause(error)}); start it or correct workers.base_url"
            raise Passing(said) from None

    def _connections(self) -> aiohttp.ClientSession:
        """Opened in the loop that asks; `concurrency` bounds them, and each attempt has a deadline of its own."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S, ssl=_authorities())
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self._session

    def _read(self, body: bytes) -> Answer:
        try:
            answer = read_answer(body)
        except NoAnswer as error:
            self._warn("silent", f"{error}; where a workflow wrote the question, its call fails")
            raise
        if not answer.text.strip():
            self._warn("empty", "answers without a word, which is scored as its answer; if that is the rule, mend it")
        return answer

    def _failure(self, reply: _Response, body: dict[str, Any]) -> Exception:
        found = failure(reply.status, reply.error, reply.reason, reply.headers)
        chosen = body.get("temperature", self.settings.temperature)
        if chosen != self.settings.temperature and _refused(reply, body) == "temperature":
            # Of a workflow's choice: it could end a run that goes badly so.
            return RequestRejected(f"the worker takes no temperature of {chosen:g} ({found})")
        if isinstance(found, RequestRejected):
            advice = "if it refuses most, lower workers.max_tokens or raise its context"
            self._warn("refused", f"refuses a request: {found}; {advice}")
        if isinstance(found, RequestRejected | Passing):
            return found
        return WorkerError(f"{found}{self._advice(reply, body)}")

    def _advice(self, reply: _Response, body: dict[str, Any]) -> str:
        """What to mend after an answer that no further attempt changes."""
        if reply.status in (401, 403):
            return f"; set the environment variable {self.settings.api_key_env} to a key that it takes"
        if reply.status == 404:
            model = self.settings.model
            return f"; correct workers.model ({model!r}) or workers.base_url, which usually ends in /v1"
        refused = _refused(reply, body)
        return f"; if it refuses {refused}, name that in workers.drop" if refused else ""

    def _cause(self, error: BaseException) -> str:
        """The first cause of a failed connection, and the proxy that it took."""
        while (earlier := error.__cause__ or error.__context__) is not None:
            error = earlier
        if not self._proxy:
            return without_login(str(error)) or type(error).__name__
        host = urlsplit(self._url).hostname
        return without_login(
            f"{error} through the proxy {self._proxy} of the environment; NO_PROXY={host} goes past it"
        )

    def _warn(self, kind: str, said: str) -> None:
        """Once a kind: what costs the workflow alone, and must not pass for its fault unseen where it is the rule."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("worker endpoint %s %s", without_login(self._url), said)

    def _named(self, error: WorkerError, attempts: int) -> WorkerError:
        kind = NoAnswer if isinstance(error, NoAnswer) else WorkerError
        return kind(f"worker endpoint {without_login(self._url)} {error} ({attempts} attempt{'s' * (attempts > 1)})")


def _refused(reply: _Response, body: dict[str, Any]) -> str:
    """The parameter that an error names, if any."""
    return next((name for name in PARAMETERS if name in body and re.search(rf"\b{name}\b", str(reply.error))), "")


def _wants_newer_name(reply: _Response) -> bool:
    return reply.status == 400 and bool(
        re.search(r"max_tokens.*(not supported|unsupported).*max_completion_tokens", str(reply.error), re.DOTALL)
    )


def _authorities() -> ssl.SSLContext:
    """Whom to believe about a server: the environment's SSL_CERT_FILE or SSL_CERT_DIR, else Mozilla's, as OpenAI's
    client does. The system's own are missing in small images."""
    named = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")
    return ssl.create_default_context(cafile=None if named else certifi.where())


def _proxy(url: str) -> str:
    """The environment's proxy that a request to `url` takes; empty where it takes none."""
    address, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all") or ""
    if not proxy or proxy_bypass(address.netloc):
        return ""
    if "://" not in proxy:
        return f"http://{proxy}"
    if urlsplit(proxy).scheme not in ("http", "https"):
        past = f"NO_PROXY={address.hostname} goes past it"
        proxy, url = without_login(proxy), without_login(url)
        raise UserError(
            f"the environment's proxy {proxy} is none for HTTP, and {url} would be asked through it: {past}"
        )
    return proxy


def _address(base_url: str) -> str:
    """`base_url` as it was meant: without white space around it and without the path of the chat requests."""
    url = base_url.strip().rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", url):
            return url
    except ValueError:
        pass
    given = base_url.rpartition("@")[2]  # less a password
    raise UserError(f"workers.base_url {given!r} is no address such as http://localhost:8000/v1")


def _key(variable: str) -> str:
    """The key in the environment; a local server needs none."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"the key in {variable} holds a character that no key has: copy it anew")
    return key or "none"
