"""Tool calls in what a policy wrote: Hermes' and Qwen's tags, or one bare JSON object, as Llama 3 writes it.

What is neither stays text, as written: an agent may read other forms itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_CLOSED = "</tool_call>"


class Call(msgspec.Struct, frozen=True):
    """One call: the tool's name and its arguments, as JSON text."""

    name: str
    arguments: str


def split_calls(text: str, known: Collection[str]) -> tuple[str, list[Call]]:
    """(what was said besides, the calls of `known` tools). A text with a call that is none has no calls at all."""
    end = text.rfind(_CLOSED) + len(_CLOSED)  # where no end follows, each beginning would be read to the end
    bodies = _TAGGED.findall(text, 0, end)
    if bodies:
        calls = [_call(body, known) for body in bodies]
        said = (_TAGGED.sub("", text[:end]) + text[end:]).strip()
    else:
        calls, said = [_call(text, known)], ""
    sound = [call for call in calls if call is not None]
    return (said, sound) if len(sound) == len(calls) else (text, [])


def _call(body: str, known: Collection[str]) -> Call | None:
    try:
        found = msgspec.json.decode(body.strip(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None
    arguments = found.get("arguments", found.get("parameters"))
    if found.get("name") not in known or not isinstance(arguments, Mapping):
        return None
    return Call(found["name"], msgspec.json.encode(arguments).decode())
