"""Workers behind any OpenAI-compatible chat endpoint: bounded concurrency, deadlines, retries, accounts, a cache."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import time
from pathlib import Path

import msgspec
import openai
from openai.types.chat import ChatCompletion

from fastgrpo.config import Workers
from fastgrpo.errors import UserError
from fastgrpo.flow.workers.protocol import Reply, Request, RequestRejected, WorkerError

log = logging.getLogger(__name__)

_RETRIED = (openai.APIConnectionError, openai.APITimeoutError, openai.RateLimitError, openai.InternalServerError)
_LONGEST_WAIT_S = 20.0


class OpenAIWorker:
    """Asks `endpoint`; sends a request's messages and seed, nothing else of it. A local server needs no key.

    `backoff_s` is the longest wait before the first further attempt, in seconds. Raises `UserError` for a cache folder
    that cannot be made.
    """

    def __init__(self, endpoint: Workers, *, backoff_s: float = 0.5) -> None:
        self._endpoint, self._backoff_s = endpoint, backoff_s
        self._cache = Path(endpoint.cache_dir) if endpoint.cache_dir else None
        if self._cache is not None:
            _writable(self._cache)
        # Our own retries, so that their number and waiting are ours to bound and to report.
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=os.environ.get(endpoint.api_key_env) or "none",
            timeout=endpoint.timeout_s,
            max_retries=0,
        )
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._jitter = random.Random(os.getpid())

    async def ask(self, request: Request) -> Reply:
        """The endpoint's answer, or the cached one (free, in no time).

        Raises `WorkerError` where the endpoint cannot be reached or refuses us, `RequestRejected` where this one
        request exceeds its context.
        """
        body = self._body(request)
        cached = self._read_cache(body)
        if cached is not None:
            return cached
        start = time.perf_counter()
        async with self._slots:
            completion = await self._complete(body)
        reply = self._reply(completion, time.perf_counter() - start)
        self._write_cache(body, reply)
        return reply

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _body(self, request: Request) -> dict[str, object]:
        return {
            "model": self._endpoint.model,
            "messages": request.messages,
            "temperature": self._endpoint.temperature if request.temperature is None else request.temperature,
            "max_tokens": self._endpoint.max_tokens,
            "seed": request.seed,
        }

    async def _complete(self, body: dict[str, object]) -> ChatCompletion:
        """One answer after at most `retries` further attempts, waiting twice as long before each."""
        endpoint = self._endpoint
        for attempt in range(endpoint.retries + 1):
            try:
                return await self._client.chat.completions.create(**body)  # type: ignore[call-overload, no-any-return]
            except _RETRIED as error:
                if attempt == endpoint.retries:
                    raise WorkerError(self._failure(error, attempt + 1)) from None
                pause = min(self._backoff_s * 2**attempt, _LONGEST_WAIT_S)
                await asyncio.sleep(pause * self._jitter.uniform(0.5, 1.0))
            except openai.APIStatusError as error:
                if _exceeds_context(error):
                    raise RequestRejected("the request is longer than the worker's context") from None
                raise WorkerError(self._failure(error, attempt + 1)) from None
            except openai.OpenAIError as error:
                raise WorkerError(self._failure(error, attempt + 1)) from None
        raise AssertionError("unreachable")

    def _failure(self, error: openai.OpenAIError, attempts: int) -> str:
        endpoint = self._endpoint
        match error:
            case openai.APITimeoutError():
                what = f"did not answer within {endpoint.timeout_s:g} s; raise workers.timeout_s or lower its load"
            case openai.APIConnectionError():
                what = "cannot be reached; start it or correct workers.base_url"
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                what = f"refuses the key; set the environment variable {endpoint.api_key_env}"
            case openai.NotFoundError():
                what = f"does not know the model {endpoint.model!r}; correct workers.model or workers.base_url"
            case openai.APIStatusError():
                what = f"answered {error.status_code}: {error.message[:200]}"
            case _:
                what = f"failed: {error}"
        return f"worker endpoint {endpoint.base_url} {what} ({attempts} attempt{'s' * (attempts > 1)})"

    def _reply(self, completion: ChatCompletion, seconds: float) -> Reply:
        if not completion.choices:
            raise WorkerError(f"worker endpoint {self._endpoint.base_url} sent an answer without choices")
        usage = completion.usage
        prompt_tokens, completion_tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        endpoint = self._endpoint
        cost = (prompt_tokens * endpoint.prompt_price + completion_tokens * endpoint.completion_price) / 1e6
        return Reply(
            text=completion.choices[0].message.content or "",
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_usd=cost,
            seconds=seconds,
        )

    def _cached_path(self, body: dict[str, object]) -> Path | None:
        if self._cache is None:
            return None
        key = msgspec.json.encode([self._endpoint.base_url, body], order="deterministic")
        name = hashlib.sha256(key).hexdigest()
        return self._cache / name[:2] / f"{name}.json"

    def _read_cache(self, body: dict[str, object]) -> Reply | None:
        """The answer on disk, its tokens kept and its price 0; a broken file counts as absent."""
        path = self._cached_path(body)
        try:
            found = msgspec.json.decode(path.read_bytes(), type=Reply) if path else None
        except (OSError, msgspec.MsgspecError):
            return None
        return found and msgspec.structs.replace(found, cost_usd=0.0, seconds=0.0)

    def _write_cache(self, body: dict[str, object], reply: Reply) -> None:
        """Whole or not at all; a full disk costs the cache, not the run."""
        path = self._cached_path(body)
        if path is None:
            return
        whole = path.with_name(f"{path.name}.{os.getpid()}.{id(reply)}")
        try:
            path.parent.mkdir(exist_ok=True)
            whole.write_bytes(msgspec.json.encode(reply))
            whole.replace(path)
        except OSError as error:
            whole.unlink(missing_ok=True)
            log.warning("cannot cache a worker's answer in %s: %s", path.parent, error.strerror)


def _exceeds_context(error: openai.APIStatusError) -> bool:
    text = f"{error.code or ''} {error.message}".lower()
    return error.status_code in (400, 413, 422) and ("context" in text and ("length" in text or "maximum" in text))


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create workers.cache_dir {folder}: {error.strerror}; set another folder") from None
