"""OpenAI's chat completions as JSON: what is asked, what of it cannot be had, and the answer in both of its forms."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from fastgrpo.rollouts.tool_calls import Call

MODEL = "policy"
JSON = "application/json"
STOPS = 16
Limit = Annotated[int, Meta(ge=1)] | None


class Refused(Exception):
    """A request that is answered by an error of HTTP: one sentence, with OpenAI's code for it."""

    def __init__(self, sentence: str, code: str, *, status: int = 400) -> None:
        super().__init__(sentence)
        self.code, self.status = code, status


class Reply(NamedTuple):
    """An answer of HTTP, whoever carries it."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Function(Struct):
    """The function of a tool call; `arguments` is JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(Struct):
    """One of an assistant's tool calls."""

    function: Function
    id: str = ""
    type: str = "function"


class Part(Struct):
    """A part of a message's content."""

    type: str
    text: str = ""


class Message(Struct):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """All that the content says. Raises Refused for pictures and sounds."""
        if isinstance(self.content, list):
            if others := {part.type for part in self.content} - {"text"}:
                raise Refused(f"content of type {min(others)!r} cannot be read: send text", "unsupported_content")
            return "".join(part.text for part in self.content)
        return self.content or ""

    def turn(self) -> dict[str, Any]:
        """The message as chat templates read it: arguments of calls are values there, not text."""
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _plain(call.function)} for call in self.tool_calls
            ]
        named = {"tool_call_id": self.tool_call_id, "name": self.name}
        return turn | {key: value for key, value in named.items() if value is not None}

    def same_as(self, other: Message) -> bool:
        """Whether both say the same to the policy.

        Space around an answer, the form of JSON and a tool's name beside the id of its call do not count.
        """
        ours, theirs = self.turn(), other.turn()
        if self.tool_call_id:
            ours["name"] = theirs["name"] = None
        if self.role == "assistant":
            ours["content"], theirs["content"] = ours["content"].strip(), theirs["content"].strip()
        return ours == theirs


class Request(Struct):
    """What is asked. `temperature`, `top_p`, `seed` and penalties are not read: the run says how it samples."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str = MODEL
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    logprobs: bool | None = None
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    logit_bias: dict[str, Any] | None = None
    functions: list[Any] | None = None
    # vLLM's own.
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    def refuse_impossible(self) -> None:
        """Raise Refused, naming what the engine cannot do, or would do against the distribution that is trained."""
        impossible = {
            "n above 1": (self.n or 1) != 1,
            f"stop with more than {STOPS} texts": len(self.stops) > STOPS,
            "response_format": (self.response_format or {}).get("type", "text") != "text",
            "tool_choice other than auto and none": self.tool_choice not in (None, "auto", "none"),
            "logit_bias": bool(self.logit_bias),
            "functions (send tools)": bool(self.functions),
            "chat_template_kwargs (the run's model.chat_template_kwargs count)": bool(self.chat_template_kwargs),
            "continue_final_message": bool(self.continue_final_message),
            "structured_outputs": bool(self.structured_outputs),
        }
        guided = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        impossible |= {name: getattr(self, name) is not None for name in guided}
        if found := [name for name, asked in impossible.items() if asked]:
            raise Refused(f"{found[0]} is not supported by this endpoint: leave it out", "unsupported_parameter")
        if any(not self._name(tool) for tool in self.tools or ()):
            raise Refused("each of tools needs a function with a name", "invalid_tools")

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which to end."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ()))

    def before_stop(self, text: str) -> str:
        """What was written before the first of `stops`."""
        return text[: min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=None)]

    @property
    def limit(self) -> int | None:
        """The most tokens to write."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def callable_tools(self) -> list[str]:
        """Names of the tools that may be called."""
        return [] if self.tool_choice == "none" else [self._name(tool) for tool in self.tools or ()]

    @staticmethod
    def _name(tool: dict[str, Any]) -> str:
        function = tool.get("function")
        return str(function.get("name") or "") if isinstance(function, dict) else ""


class Answer(Struct):
    """What was written, with the ids that it was written after. `pieces`: each of its tokens as text."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    pieces: Sequence[str]
    message: Message
    finish_reason: str


def answer_of(said: str, calls: Sequence[Call], turn: int) -> Message:
    """The assistant's message; calls are numbered within the rollout."""
    numbered = [
        ToolCall(Function(call.name, call.arguments), f"call_{turn}_{number}") for number, call in enumerate(calls)
    ]
    return Message("assistant", said, numbered or None)


def completion(answer: Answer, request: Request) -> dict[str, Any]:
    """A `chat.completion`; token ids as vLLM gives them, where they are asked for."""
    choice = {"index": 0, "message": _message(answer), "finish_reason": answer.finish_reason}
    body = _head("chat.completion", request) | {"choices": [choice | _logprobs(answer, request)]}
    if request.return_token_ids:
        body["prompt_token_ids"] = answer.prompt_ids
        body["choices"][0]["token_ids"] = answer.token_ids
    return body | {"usage": _usage(answer)}


def events(answer: Answer, request: Request) -> bytes:
    """A completion for a client that streams: all of it in one event, the end in the next."""
    delta = _message(answer)
    if answer.message.tool_calls:
        delta["tool_calls"] = [{"index": i} | call for i, call in enumerate(delta["tool_calls"])]
    choices: list[list[dict[str, Any]]] = [
        [{"index": 0, "delta": delta, "finish_reason": None} | _logprobs(answer, request)],
        [{"index": 0, "delta": {}, "finish_reason": answer.finish_reason}],
    ]
    head = _head("chat.completion.chunk", request)
    chunks = [head | {"choices": each} for each in choices]
    if (request.stream_options or {}).get("include_usage"):
        chunks.append(head | {"choices": [], "usage": _usage(answer)})
    lines = [b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks]
    return b"".join([*lines, b"data: [DONE]\n\n"])


def error(sentence: str, code: str, kind: str = "invalid_request_error") -> bytes:
    """The body of an error."""
    return msgspec.json.encode({"error": {"message": sentence, "type": kind, "param": None, "code": code}})


def _plain(function: Function) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(function.arguments)
    except msgspec.DecodeError:
        arguments = function.arguments
    return {"name": function.name, "arguments": arguments}


def _head(kind: str, request: Request) -> dict[str, Any]:
    number = uuid.uuid4().hex
    return {"id": f"chatcmpl-{number}", "object": kind, "created": int(time.time()), "model": request.model}


def _message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.message.content}
    if answer.message.tool_calls:
        message["tool_calls"] = [msgspec.to_builtins(call) for call in answer.message.tool_calls]
    return message


def _logprobs(answer: Answer, request: Request) -> dict[str, Any]:
    if not request.logprobs:
        return {}
    found = zip(answer.pieces, answer.logprobs, strict=True)
    tokens = [{"token": piece, "logprob": p, "bytes": list(piece.encode()), "top_logprobs": []} for piece, p in found]
    return {"logprobs": {"content": tokens}}


def _usage(answer: Answer) -> dict[str, int]:
    prompt, written = len(answer.prompt_ids), len(answer.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
