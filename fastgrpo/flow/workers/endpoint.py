"""One OpenAI-compatible chat endpoint: bounded concurrency, a deadline for each attempt, retries, plain reasons."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import msgspec
import openai

from fastgrpo.config import Workers
from fastgrpo.errors import UserError
from fastgrpo.flow.types import NoAnswer, Request, RequestRejected, WorkerError
from fastgrpo.flow.workers.answers import Answer, Passing, failure, read_answer

log = logging.getLogger(__name__)

PARAMETERS = ("max_tokens", "temperature", "seed")
_LONGEST_WAIT_S = 60.0


class Endpoint:
    """Asks the endpoint that `settings` name. `backoff_s`: the longest wait before the first further attempt, seconds.

    Raises `UserError` for an address or a key that cannot be one.
    """

    def __init__(self, settings: Workers, *, backoff_s: float) -> None:
        self.settings, self._backoff_s = settings, backoff_s
        self._url = _address(settings.base_url)
        # Our own retries and deadlines, so that their number and length are ours to bound and to report.
        self._client = openai.AsyncOpenAI(
            base_url=self._url, api_key=_key(settings.api_key_env), timeout=settings.timeout_s, max_retries=0
        )
        self._extra: dict[str, Any] = msgspec.json.decode(settings.extra_body or "{}")
        self._slots = asyncio.Semaphore(settings.concurrency)
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
        self, body: dict[str, Any], waiting: Callable[[], AbstractContextManager[None]]
    ) -> tuple[Answer, float]:
        """The answer and its seconds, after at most `retries` further attempts, each after twice as long a wait.

        Waits for a turn and between attempts pass inside `waiting()`. Raises `WorkerError` or `RequestRejected`.
        """
        with waiting():
            await self._slots.acquire()
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
        await self._client.close()

    def _pause(self, attempt: int, wanted_s: float) -> float:
        doubled = self._backoff_s * 2**attempt * self._jitter.uniform(0.5, 1.0)
        return min(max(doubled, wanted_s), _LONGEST_WAIT_S)

    async def _attempt(self, body: dict[str, Any]) -> Answer:
        """One answer. Some models take the bound of `max_tokens` only under its newer name, and say so."""
        bound = self._bound
        try:
            return await self._send({bound if name == "max_tokens" else name: value for name, value in body.items()})
        except openai.OpenAIError as error:
            if bound != "max_tokens" or "max_tokens" not in body or not _wants_newer_name(error):
                raise self._failure(error, body) from None
        self._bound = "max_completion_tokens"
        return await self._attempt(body)

    async def _send(self, body: dict[str, Any]) -> Answer:
        settings = self.settings
        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        create = self._client.chat.completions.with_raw_response.create
        try:
            # The client's own limit is for each read: an answer that trickles would never meet it.
            async with asyncio.timeout(settings.timeout_s):
                raw = await create(model=body["model"], messages=body["messages"], extra_body=rest)
            answer = read_answer(raw.content)
        except (TimeoutError, openai.APITimeoutError):
            late = f"did not answer within {settings.timeout_s:g} s; raise workers.timeout_s or lower its load"
            raise Passing(late) from None
        except NoAnswer as error:
            self._warn("silent", f"{error}; where a workflow wrote the question, its call fails")
            raise
        except UnicodeEncodeError:
            raise RequestRejected("the request holds half a character (a lone surrogate)") from None
        if not answer.text.strip():
            self._warn("empty", "answers without a word, which is scored as its answer; if that is the rule, mend it")
        return answer

    def _failure(self, error: openai.OpenAIError, body: dict[str, Any]) -> Exception:
        if isinstance(error, openai.APIConnectionError):
            return Passing(f"cannot be reached ({self._cause(error)}); start it or correct workers.base_url")
        if not isinstance(error, openai.APIStatusError):
            return WorkerError(f"failed: {error}")
        found = failure(error.status_code, error.body, error.response.reason_phrase, error.response.headers)
        chosen = body.get("temperature", self.settings.temperature)
        if chosen != self.settings.temperature and _refused(error, body) == "temperature":
            # Of a workflow's choice: it could end a run that goes badly so.
            return RequestRejected(f"the worker takes no temperature of {chosen:g} ({found})")
        if isinstance(found, RequestRejected):
            advice = "if it refuses most, lower workers.max_tokens or raise its context"
            self._warn("refused", f"refuses a request: {found}; {advice}")
        if isinstance(found, RequestRejected | Passing):
            return found
        return WorkerError(f"{found}{self._advice(error, body)}")

    def _advice(self, error: openai.APIStatusError, body: dict[str, Any]) -> str:
        """What to mend after an answer that no further attempt changes."""
        if error.status_code in (401, 403):
            return f"; set the environment variable {self.settings.api_key_env} to a key that it takes"
        if error.status_code == 404:
            model = self.settings.model
            return f"; correct workers.model ({model!r}) or workers.base_url, which usually ends in /v1"
        refused = _refused(error, body)
        return f"; if it refuses {refused}, name that in workers.drop" if refused else ""

    def _cause(self, error: BaseException) -> str:
        """The first cause of a failed connection, and the proxy that it took."""
        while (earlier := error.__cause__ or error.__context__) is not None:
            error = earlier
        address = urlsplit(self._url)
        proxy = getproxies().get(address.scheme) or getproxies().get("all")
        if not proxy or proxy_bypass(address.netloc):
            return str(error) or type(error).__name__
        return f"{error} through the proxy {proxy} of the environment; NO_PROXY={address.hostname} goes past it"

    def _warn(self, kind: str, said: str) -> None:
        """Once a kind: what costs the workflow alone, and must not pass for its fault unseen where it is the rule."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("worker endpoint %s %s", self._url, said)

    def _named(self, error: WorkerError, attempts: int) -> WorkerError:
        kind = NoAnswer if isinstance(error, NoAnswer) else WorkerError
        return kind(f"worker endpoint {self._url} {error} ({attempts} attempt{'s' * (attempts > 1)})")


def _refused(error: openai.APIStatusError, body: dict[str, Any]) -> str:
    """The parameter that an error names, if any."""
    return next((name for name in PARAMETERS if name in body and re.search(rf"\b{name}\b", str(error.body))), "")


def _wants_newer_name(error: openai.OpenAIError) -> bool:
    return isinstance(error, openai.BadRequestError) and bool(
        re.search(r"max_tokens.*(not supported|unsupported).*max_completion_tokens", str(error.body), re.DOTALL)
    )


def _address(base_url: str) -> str:
    """`base_url` as it was meant: without white space around it and without the path of the chat requests."""
    url = base_url.strip().rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", url):
            return url
    except ValueError:
        pass
    raise UserError(f"workers.base_url {base_url!r} is no address such as http://localhost:8000/v1")


def _key(variable: str) -> str:
    """The key in the environment; a local server needs none."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"the key in {variable} holds a character that no key has: copy it anew")
    return key or "none"
