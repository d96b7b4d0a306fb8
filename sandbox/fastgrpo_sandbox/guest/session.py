"""A session inside the jail: `async def main(call, **inputs)` whose `call` crosses to the host and back."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import types
from typing import Any

import msgspec

from .wire import CALL, CHANNEL, send_frame


class CallError(Exception):
    """The host's answer to a call was an error."""


class _Host:
    """Calls in flight, by number, and the reader that completes them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: int) -> None:
        self.loop = loop
        self.channel = channel
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.received = bytearray()
        self.last = 0
        loop.add_reader(channel, self.readable)

    async def call(self, method: str, **params: Any) -> Any:
        """The handler's answer. Raises CallError with the handler's text, TypeError for what is not plain data and
        ValueError for a call that is too long."""
        self.last += 1
        number = self.last
        send_frame(self.channel, CALL, msgspec.msgpack.encode((number, method, params)))
        answer = self.waiting[number] = self.loop.create_future()
        return await answer

    def readable(self) -> None:
        data = os.read(self.channel, 1 << 16)
        if not data:
            os._exit(1)
        self.received += data
        while len(self.received) >= 4:
            (length,) = struct.unpack_from("<I", self.received)
            if len(self.received) < 4 + length:
                return
            body = bytes(self.received[4 : 4 + length])
            del self.received[: 4 + length]
            self.answer(*msgspec.msgpack.decode(body))

    def answer(self, number: int, fine: bool, value: Any) -> None:
        future = self.waiting.pop(number, None)
        if future is None or future.done():
            return
        if fine:
            future.set_result(value)
        else:
            future.set_exception(CallError(value))


def run(module: types.ModuleType, inputs: bytes, channel: int = CHANNEL) -> bytes:
    """msgpack of what the module's `main` returns, called with the msgpack of its `inputs`. Raises what it raises,
    AttributeError when there is no `main`, and TypeError when the value is not plain data."""
    main = getattr(module, "main", None)
    if main is None:
        raise AttributeError("the session's code defines no `async def main(call, **inputs)`")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    value = loop.run_until_complete(main(_Host(loop, channel).call, **msgspec.msgpack.decode(inputs)))
    return msgspec.msgpack.encode(value)


def warm_up(module: types.ModuleType) -> None:
    """One whole session of `module`, whose one call is answered before it is made."""
    near, far = socket.socketpair()
    body = msgspec.msgpack.encode((1, True, None))
    far.send(struct.pack("<I", len(body)) + body)
    run(module, msgspec.msgpack.encode({"value": 1}), near.fileno())
    asyncio.get_event_loop().close()
    asyncio.set_event_loop(None)
    near.close()
    far.close()
