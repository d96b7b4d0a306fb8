"""What an endpoint sent, classified once, before anything is scored, paid or cached: an answer, or why there is none.

`read_answer` is for a body that came with status 200, `failure` for any other. What they raise or return says whose it
is: `RequestRejected` the workflow's, `NoAnswer` and `WorkerError` ours, `Passing` ours and worth another attempt.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct

from fastgrpo.errors import brief
from fastgrpo.flow.types import NoAnswer, RequestRejected, WorkerError

_shown = partial(brief, chars=300)
_PASSING = {408, 409, 425, 429}
_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_FILTERED = re.compile(r"content[ _]?(filter|policy|management)|responsible ?ai|data_inspection_failed", re.IGNORECASE)

# The many ways to say that prompt and answer do not fit: vLLM, SGLang, TGI, TensorRT-LLM, llama.cpp, Ollama, LM Studio
# and the vendors. An endpoint that only names `max_tokens` too large refuses our configuration, and is not matched.
_MORE = r"(more|greater|larger|longer|bigger) than"
_TOO_LONG = re.compile(
    "|".join(
        (
            r"context[ _-]?(length|window|size|limit)|n_ctx|\bmax\w* context|\bcontext\b.{0,40}\b(exceed|overflow)",
            r"context_length_exceeded|exceed_context_size|string_above_max_length|tokens_limit_reached",
            r"\b(prompt|inputs?|messages?|request|sequence|text|string|content)\b.{0,160}?\b"
            rf"(too (long|large|big|many tokens)|longer than|{_MORE} .{{0,40}}?(token|length|max|limit|allowed)"
            r"|exceed\w*.{0,60}?(token|length|context|size|limit|max_))",
            r"exceed\w* (the )?(max\w*|model\w*)[ _](token|input|prompt|model|sequence|seq|content)",
            r"max(imum|imal)?[ _](prompt|input|sequence|seq|model|content)[ _]?len",
            r"reduce (the|your) (length|input|prompt|messages?|size)|too many (\w+ )?tokens",
            r"\binputs?\b.{0,80}must (be|have) (<|less|fewer|at most|below|under|shorter)",
            r"token limit (is |was |has been )?exceeded|range of input length|max_tokens must be at least 1, got -",
            r"超长|长度超",
        )
    ),
    re.IGNORECASE | re.DOTALL,
)
_RATE = re.compile(
    r"rate.?limit|quota|per (second|minute|hour|day|month)|\b[rt]p[smd]\b|too many requests", re.IGNORECASE
)


class Passing(WorkerError):
    """A failure that another attempt may mend, after `wait_s` seconds where the endpoint said so."""

    def __init__(self, text: str, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class Answer(Struct, frozen=True):
    """An endpoint's words and what they cost in tokens."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Part(Struct):
    type: str = ""
    text: Any = None


class _Message(Struct):
    content: str | list[_Part] | None = None
    refusal: str | None = None
    tool_calls: Any = None


class _Choice(Struct):
    message: _Message | None = None
    finish_reason: str | None = None
    error: Any = None


class _Usage(Struct):
    prompt_tokens: float | None = None
    completion_tokens: float | None = None


class _Completion(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


def read_answer(body: bytes) -> Answer:
    """The answer in the body of a chat completion. Raises `NoAnswer`, `RequestRejected`, `WorkerError` or `Passing`."""
    try:
        completion = msgspec.convert(json.loads(body), _Completion)
    except (ValueError, RecursionError, msgspec.ValidationError):
        raise Passing(f"sent what is no chat completion: {_shown(body.decode(errors='replace'))}") from None
    choice = completion.choices[0] if completion.choices else _Choice(error="no choices in it")
    if error := completion.error or choice.error or (choice.finish_reason in ("error", "abort") and "it gave up"):
        raise failure(200, {"error": error}, "")
    usage = completion.usage or _Usage()
    text = _words(choice.message)
    if reason := _absence(choice, text):
        raise NoAnswer(reason)
    # A lone surrogate is text that can be sent nowhere.
    text = text.encode(errors="replace").decode()
    return Answer(text, _count(usage.prompt_tokens), _count(usage.completion_tokens))


def _count(tokens: float | None) -> int:
    return int(tokens) if tokens is not None and 0 < tokens < math.inf else 0


def _words(message: _Message | None) -> str:
    content = message.content if message else None
    if isinstance(content, list):
        return "".join(part.text for part in content if part.type in ("", "text") and isinstance(part.text, str))
    return content or ""


def _absence(choice: _Choice, text: str) -> str:
    """Why there is no answer in `choice`; empty where there is one, be it cut off or without a word."""
    reasoning_alone = text.lstrip().startswith("<think>") and "</think>" not in text
    if text.strip() and not (reasoning_alone and choice.finish_reason == "length"):
        return ""
    if choice.finish_reason == "length":
        return "ended its answer by length before the first word of it; raise workers.max_tokens"
    if choice.finish_reason == "content_filter":
        return "filtered its answer out"
    if choice.message and choice.message.refusal:
        return f"refused: {_shown(choice.message.refusal)}"
    if choice.message and choice.message.tool_calls:
        return "answered with a tool call instead of text; start it without tools"
    if choice.finish_reason == "stop" and choice.message and choice.message.content is not None:
        return ""  # the model ended its turn at once: what it was asked is then answered badly, by nobody's failure
    return f"sent no text (finish_reason {choice.finish_reason})"


def failure(status: int, body: Any, said: str, headers: Mapping[str, str] | None = None) -> Exception:
    """The error to raise for an answer of HTTP `status`, which is 200 too where the body holds an error.

    `body` is the answer's JSON, if any; `said` is shown where that names no reason.
    """
    codes, reason = _details(body)
    reason = reason or said
    words = f"{' '.join(codes)} {reason}"
    if _exceeds_context(status, words):
        return RequestRejected(f"the request is longer than the worker's context ({_shown(reason)})")
    if status in (200, 400, 403, 422) and _FILTERED.search(words):
        return RequestRejected(f"the worker's content filter refuses the request ({_shown(reason)})")
    text = f"answered {status}: {_shown(reason)}" if status != 200 else f"answered with an error: {_shown(reason)}"
    if status == 200 or ((status in _PASSING or status >= 500) and not codes & _QUOTA):
        return Passing(text, retry_after(headers or {}))
    return WorkerError(text)


def _exceeds_context(status: int, words: str) -> bool:
    """A rate limit speaks of tokens that exceed something too, but passes; one that no wait can mend says so."""
    if status in (401, 402, 404, 408, 504):
        return False
    if status == 413 or re.search("request too large", words, re.IGNORECASE):
        return True
    return _TOO_LONG.search(words) is not None and not (status != 400 and _RATE.search(words))


def _details(body: Any) -> tuple[set[str], str]:
    """The codes and the sentence of an error's body, wherever the vendor puts them."""
    if isinstance(body, dict) and body.get("error"):
        body = body["error"]
    if not body or not isinstance(body, dict):
        return set(), str(body) if body else ""
    codes = {str(body[name]) for name in ("code", "type", "status") if body.get(name)}
    reason = next((body[name] for name in ("message", "detail", "msg", "error") if body.get(name)), body)
    raw = body["metadata"].get("raw") if isinstance(body.get("metadata"), dict) else None
    reason = reason if isinstance(reason, str) else json.dumps(reason, ensure_ascii=False)
    return codes, f"{reason}: {raw}" if raw else reason


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait as the header says (seconds, milliseconds or an HTTP date); 0 without one that can be read."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(float(milliseconds) / 1000, 0.0)
        value = headers.get("retry-after", "0")
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0
