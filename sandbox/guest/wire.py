"""Frames on the jail's descriptors: to the fork server on the channel, between solution and judge on the peer."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

CHANNEL = 3
CALL, RESULT = b"C", b"R"
MAX_PEER_FRAME = 16 << 20
ERROR_CHARACTERS = 4000


def write_all(fd: int, data: bytes) -> None:
    """Writes every byte. Raises OSError when the other end is gone."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_exactly(fd: int, count: int) -> bytes:
    """`count` bytes. Raises EOFError when the other end closes before."""
    parts = []
    while count:
        part = os.read(fd, count)
        if not part:
            raise EOFError("the other end of the jail's channel is closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def send_call(channel: int, call_id: int, method: str, params: dict[str, Any]) -> None:
    """One call to the host. Raises TypeError when `params` is not plain data."""
    body = msgspec.msgpack.encode((call_id, method, params))
    write_all(channel, struct.pack("<I", len(body)) + CALL + body)


def send_result(error: str = "", kind: str = "", value: Any = None, tests: Sequence[bool] = ()) -> None:
    """The one result frame of this process. Raises TypeError when `value` is not plain data."""
    body = msgspec.msgpack.encode((error[-ERROR_CHARACTERS:], kind, value, list(tests)))
    write_all(CHANNEL, struct.pack("<I", len(body)) + RESULT + body)


def send_peer(fd: int, data: bytes) -> None:
    write_all(fd, struct.pack("<I", len(data)) + data)


def read_peer(fd: int) -> bytes:
    """One frame from the other process. Raises EOFError when it is gone and ValueError when the frame is too long."""
    (length,) = struct.unpack("<I", read_exactly(fd, 4))
    if length > MAX_PEER_FRAME:
        raise ValueError("frame too long")
    return read_exactly(fd, length)
