"""A request's body as the struct that its path takes, with no more values than a server has the time for."""

from __future__ import annotations

from typing import Any

import msgspec

from fastgrpo_sandbox.reading import LONG
from fastgrpo_sandbox.remote import MSGPACK
from fastgrpo_sandbox.serving.jails import Jails, Refused

JSON = "application/json"
FORMATS = (JSON, MSGPACK)
MOST_VALUES = 1 << 20  # 16 MB of empty lists take half a minute to decode, and a gigabyte


async def read_body(jails: Jails, form: type, content_type: str, body: bytes) -> Any:
    """The body decoded; a long one beside the event loop. Raises what msgspec does, Refused and Lost."""
    if len(body) <= LONG:
        return decoded(form, content_type, body)
    return await jails.read(decoded, form, content_type, body)


def decoded(form: type, content_type: str, body: bytes) -> Any:
    """Raises what msgspec does, and Refused."""
    decode: Any = msgspec.json.decode if content_type == JSON else msgspec.msgpack.decode
    found = decode(body, type=form)
    waiting, count = [found], 0
    while waiting:
        value = waiting.pop()
        parts: Any = ()
        if isinstance(value, dict):
            parts = value.values()
        elif isinstance(value, list | tuple):
            parts = value
        elif isinstance(value, msgspec.Struct):
            parts = msgspec.structs.astuple(value)
        count += len(parts)
        if count > MOST_VALUES:
            raise Refused(f"the request has more than {MOST_VALUES} values")
        waiting += [part for part in parts if not isinstance(part, str | bytes | int | float)]
    return found
