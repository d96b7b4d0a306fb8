"""Plain data between solution and judge: exact builtin types as tagged JSON, so that nothing received can carry code.

Lists, strings, floats, booleans, None and 64-bit integers are themselves; every other type is an object with one key.
Subclasses travel as their builtin base. What is not plain becomes a handle, `{"handle": n}`, by the caller's choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Unplain = Callable[[Any], Any]
SMALL = 1 << 63
# Not as ASCII: two surrogates side by side would come back from their escapes as one character.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def refuse(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} is not plain data")


def pack(value: Any, unplain: Unplain = refuse) -> bytes:
    """`value` as bytes. `unplain(value)` gives the JSON for what is not plain; by default it raises TypeError."""
    return _encode(_tag(value, unplain)).encode("utf-8", "surrogatepass")


def unpack(data: bytes, handle: Callable[[int], Any] = refuse) -> Any:
    """Inverse of pack. Raises ValueError, TypeError, KeyError or RecursionError for anything malformed."""
    return _untag(json.loads(data.decode("utf-8", "surrogatepass")), handle)


def _tag(value: Any, unplain: Unplain) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -SMALL <= value < SMALL else {"int": hex(value)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [_tag(item, unplain) for item in list.__iter__(value)]
    return _tag_object(value, unplain)


def _tag_object(value: Any, unplain: Unplain) -> Any:
    if isinstance(value, dict):
        return {"dict": [[_tag(key, unplain), _tag(item, unplain)] for key, item in dict.items(value)]}
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [_tag(item, unplain) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__ if type(value) is bytearray else "bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    return unplain(value)


def _untag(value: Any, handle: Callable[[int], Any]) -> Any:
    if isinstance(value, list):
        return [_untag(item, handle) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, body),) = value.items()
    if tag == "dict":
        return {_untag(key, handle): _untag(item, handle) for key, item in body}
    if tag == "handle":
        return handle(int(body))
    return _BUILD[tag](_untag(body, handle))


_BUILD: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
}
