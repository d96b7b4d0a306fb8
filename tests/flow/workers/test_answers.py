"""One classification of what endpoints send: answers, absences, and whose failure each refusal is."""

from __future__ import annotations

import contextlib
import json
import time
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.flow.types import NoAnswer, RequestRejected, WorkerError
from fastgrpo.flow.workers.answers import Answer, Passing, failure, read_answer, retry_after


def body(content: Any = "fine", finish: str | None = "stop", **message: Any) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}).encode()


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (body(), "fine"),
        (body("cut of", "length"), "cut of"),
        (
            body([{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            "ab",
        ),
        (body("fine", refusal="", tool_calls=[]), "fine"),
        (body("ok \ud83d"), "ok ?"),
        (body("<think>one</think>two", "length"), "<think>one</think>two"),
        # A model that ends its turn at once has answered.
        (body(""), ""),
        (body(" \n"), " \n"),
    ],
)
def test_words_are_an_answer(sent: bytes, text: str) -> None:
    assert read_answer(sent) == Answer(text, 3, 2)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"prompt_tokens": float("nan")}])
def test_an_answer_without_an_account_costs_nothing(usage: Any) -> None:
    assert read_answer(json.dumps(json.loads(body()) | {"usage": usage}).encode()) == Answer("fine")


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (body(None, "length", reasoning_content="I think"), "by length before the first word"),
        (body("<think>on and on", "length"), "by length before the first word"),
        (body(None, "content_filter"), "filtered"),
        (body(None, "tool_calls", tool_calls=[{"id": "1"}]), "tool call"),
        (body(None, refusal="I cannot"), "refused: I cannot"),
        (body("", "length"), "by length before the first word"),
        (body("", refusal="I cannot"), "refused: I cannot"),
        (body(None), "no text"),
        (body("", None), "no text"),
        (b'{"choices": [{"message": null, "finish_reason": null}]}', "no text"),
    ],
)
def test_no_word_is_no_answer(sent: bytes, said: str) -> None:
    with pytest.raises(NoAnswer, match=said):
        read_answer(sent)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"<html>log in</html>",
        b'{"choices": [',
        b"[" * 100_000,
        b"\xff",
        b"[]",
        b'{"choices": [{"message": "text"}]}',
        b'{"error": {"message": "Provider returned error", "code": 524}}',
        b'{"choices": null, "error": "upstream"}',
        b'{"choices": []}',
        b'{"choices": [{"finish_reason": "error", "error": {"message": "x"}, "message": {"content": "half"}}]}',
    ],
)
def test_an_error_under_status_200_passes(sent: bytes) -> None:
    with pytest.raises(Passing):
        read_answer(sent)


@given(st.binary())
def test_any_body_is_an_answer_or_a_typed_failure(sent: bytes) -> None:
    with contextlib.suppress(WorkerError, RequestRejected):
        assert isinstance(read_answer(sent).text, str)


TOO_LONG = """\
This model's maximum context length is 4097 tokens. However, your messages resulted in 5000 tokens.
This model's maximum context length is 2048 tokens. However, you requested 3000 tokens (952 in the \
messages, 2048 in the completion).
'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context length is 4096 \
tokens and your request has 20 input tokens
The decoder prompt (length 5000) is longer than the maximum model length of 4096. Make sure that \
`max_model_len` is no smaller
max_tokens must be at least 1, got -952.
Input length (5000 tokens) exceeds the maximum allowed length (4096 tokens). Use a shorter input or enable \
--allow-auto-truncate.
The input (5000 tokens) is longer than the model's context length (4096 tokens).
Requested token count exceeds the model's maximum context length of 4096 tokens.
Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens and \
20 `max_new_tokens`
Input validation error: `inputs` must have less than 1024 tokens. Given: 5000
the request exceeds the available context size. try increasing the context size or enable context shift
request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it
input length exceeds maximum context length
Trying to keep the first 5000 tokens when context the overflows. However, the model is loaded with context \
length of only 4096 tokens
prompt is too long: 200251 tokens > 199999 maximum
input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length or \
`max_tokens` and try again
The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).
Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length
Please reduce the length of the messages or completion.
Please reduce the length of the messages or completion. Current length is 9000 while limit is 8192
The prompt is too long: 40000, model maximum context length: 32768
too many tokens: total number of tokens in the prompt cannot exceed 4081
Input is too long for requested model.
This model's maximum prompt length is 131072 but the request contains 537812 tokens.
Range of input length should be [1, 30720]
Invalid request: Your request exceeded model token limit: 8192
context window exceeds limit (2013)
Your input exceeds the context window of this model. Please adjust your input and try again.
The sum of prompt length (5000), query length (1) and max_tokens (20) should not exceed max_num_tokens (4096)
Prompt length (5000) exceeds maximum input length (4096).
Requested input length 40000 exceeds maximum input length 32768
Request body too large for gpt-4o model. Max size: 8000 tokens.
prompt token count of 100000 exceeds the limit of 64000
Request too large for model `llama` on tokens per minute (TPM): Limit 6000, Requested 8000
The prompt (total length 5000) is too long to fit into the model (context length 4096).
String too long. Expected a string with maximum length 1048576, but got a string with length 2000000 instead.
The total number of tokens in the request exceeds the model's limit of 8192 tokens
Prompt exceeds max length
Messages have 9000 tokens, which exceeds the max limit of 8192 tokens
Token limit exceeded: your input has 9000 tokens
Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 300000 tokens.
The engine prompt length 5000 exceeds the max_model_len 4096.
The prompt has 5000 tokens, which is more than the maximum of 4096 tokens.
Number of tokens (5000) in the prompt exceeded maximum context of 4096
Requested tokens (5000) exceed context window of 4096
the prompt exceeds n_ctx
Context overflow: the conversation no longer fits
输入长度超限
""".splitlines()


@pytest.mark.parametrize("text", TOO_LONG)
@pytest.mark.parametrize("status", [200, 400, 413, 422, 500])
def test_a_request_beyond_the_context_is_the_workflows_fault(text: str, status: int) -> None:
    assert isinstance(failure(status, {"error": {"message": text}}, ""), RequestRejected)
    assert isinstance(failure(status, {"object": "error", "message": text, "code": 400}, ""), RequestRejected)
    assert isinstance(failure(status, text, ""), RequestRejected)


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (400, "max_tokens", "max_tokens is too large: 100000. This model supports at most 16384 completion tokens"),
        (400, "unsupported_parameter", "Unsupported parameter: 'max_tokens' is not supported with this model."),
        (400, "invalid", "temperature must be at most 2"),
        (400, "invalid", "Input should be a valid list: messages must be an array"),
        (400, "invalid", "Conversation roles must alternate user/assistant/user/assistant"),
        (401, "", "Incorrect API key provided"),
        (402, "", "This request requires more credits, or fewer max_tokens. You requested up to 2048 tokens"),
        (403, "", "Your request exceeded the token limit of your plan per month"),
        (404, "model_not_found", "The model does not exist"),
        (429, "insufficient_quota", "You exceeded your current quota, please check your plan"),
    ],
)
def test_a_refusal_that_lasts_is_ours(status: int, code: str, text: str) -> None:
    found = failure(status, {"message": text, "code": code}, "")
    assert type(found) is WorkerError
    assert text in str(found)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (408, "request timed out: it exceeded the time limit"),
        (409, "conflict"),
        (425, "loading"),
        (429, "This request would exceed your organization's rate limit of 50,000 input tokens per minute"),
        (429, "Rate limit reached for gpt-4 on tokens per min (TPM): Limit 10000, Used 9000, Requested 2000"),
        (429, "Too many requests: input tokens per minute exceed the limit"),
        (500, "internal error"),
        (503, "The model is overloaded"),
        (504, "the request exceeded the time limit, its length"),
        (520, "<html>cloudflare</html>"),
        (529, "overloaded"),
        (200, "Provider returned error"),
    ],
)
def test_load_and_outages_pass(status: int, text: str) -> None:
    assert isinstance(failure(status, {"error": {"message": text}}, ""), Passing)


def test_a_prompt_that_a_filter_stops_is_the_workflows_fault() -> None:
    azure = {"message": "The response was filtered", "code": "content_filter", "innererror": {}}
    assert isinstance(failure(400, azure, ""), RequestRejected)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ({"error": {"message": "no", "metadata": {"raw": "upstream says why"}}}, "no: upstream says why"),
        ({"detail": [{"loc": ["body", "seed"]}]}, "seed"),
        ({"error": "plain"}, "plain"),
        ("text", "text"),
        (None, "Bad Gateway"),
        ({}, "Bad Gateway"),
        ([], "Bad Gateway"),
    ],
)
def test_the_vendors_reason_is_shown(sent: Any, reason: str) -> None:
    assert reason in str(failure(502, sent, "Bad Gateway"))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "-4"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_when_to_come_again(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


def test_a_date_to_come_again_is_read() -> None:
    assert 25 < retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 31
