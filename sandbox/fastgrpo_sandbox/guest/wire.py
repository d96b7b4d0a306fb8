"""Frames on the jail's descriptors: to the fork server on the channel, between solution and judge on the peer."""

from __future__ import annotations

import os
from collections.abc import Sequence

CHANNEL = 3
CALL, RESULT = b"C", b"R"
MAX_FRAME = 1 << 20  # that the fork server takes from a child
MAX_PEER_FRAME = 16 << 20
ERROR_CHARACTERS = 4000
NIL = b"\xc0"


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


def result_body(error: str = "", kind: str = "", value: bytes = NIL, tests: Sequence[bool] = ()) -> bytes:
    """msgpack of (error, kind, value, tests), by hand: most jobs need no more, and a library would cost every fork.
    `value` is msgpack already."""
    answers = b"".join(b"\xc3" if passed else b"\xc2" for passed in tests)
    header = b"\xdd" + len(tests).to_bytes(4, "big")
    return b"\x94" + _text(error[-ERROR_CHARACTERS:]) + _text(kind) + value + header + answers


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return b"\xdb" + len(data).to_bytes(4, "big") + data


def send_result(error: str = "", kind: str = "", value: bytes = NIL, tests: Sequence[bool] = ()) -> None:
    """The one result frame of this process."""
    send_frame(CHANNEL, RESULT, result_body(error, kind, value, tests))


def frame(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + kind + body


def send_frame(channel: int, kind: bytes, body: bytes) -> None:
    """Raises ValueError where the fork server would take the frame for an attack, with nothing sent."""
    _check(len(body), MAX_FRAME)
    write_all(channel, frame(kind, body))


def _check(length: int, most: int) -> None:
    if length > most:
        raise ValueError(f"{length} bytes are too long to send: at most {most} can cross at once")


def send_peer(fd: int, data: bytes) -> None:
    """One frame to the other process; whoever must not send more than `MAX_PEER_FRAME` checks before."""
    write_all(fd, len(data).to_bytes(4, "little") + data)


def read_peer(fd: int, limit: int | None) -> bytes:
    """One frame from the other process, of at most `limit` bytes where there is one.

    Raises EOFError when the process is gone and ValueError when the frame is too long.
    """
    length = int.from_bytes(read_exactly(fd, 4), "little")
    if limit is not None and length > limit:
        raise ValueError("frame too long")
    return read_exactly(fd, length)
