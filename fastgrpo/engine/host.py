"""The engine's own process, which `engine_process.py` starts: it decodes by itself and sends what is finished.

Both sides speak pickled tuples over a pair of sockets. From there: (command, arguments). From here, in the order in
which things happened: ("finished", completions), ("alive",) where nothing else was said for a second of decoding,
("reply", value) to a command that has one, and as the last word ("failed", kind, text).
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from fastgrpo.engine.completion import Completion, packed
from fastgrpo.errors import first_line

SIGN_OF_LIFE_S = 1.0
# How soon an orphan ends, where another process holds the other end of its connection.
ORPHAN_POLL_S = 1.0


class Host:
    """Steps the engine whenever it is busy and not paused, and between two steps does what it is told."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._told = connection, queue.SimpleQueue[tuple[str, tuple[Any, ...]]]()
        self._paused, self._open = False, True
        self._said = time.monotonic()

    def run(self) -> None:
        """Start the engine and serve until `close`; where the parent is gone the process ends at once."""
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        self._start(*self._told.get()[1])
        while self._open:
            while not self._told.empty() or not self._decoding:
                self._do(*self._told.get())
                if not self._open:
                    return
            self._send_finished(self._engine.step())

    def _start(self, options: dict[str, Any]) -> None:
        # Seconds go by here, and the parent may end meanwhile.
        from fastgrpo.engine.engine import Engine

        engine = self._engine = Engine(**options)
        self._replies: dict[str, Callable[..., Any]] = {
            "settle": self._settle,
            "score": engine.score,
            "complete": lambda prompts, tokens, seed: engine.complete(prompts, max_tokens=tokens, seed=seed),
            "renew": engine.renew,
            "load": engine.load_weights,
            "sleep": engine.sleep,
            "wake": engine.wake,
            "close": self._close,
        }
        self._orders: dict[str, Callable[..., Any]] = {"submit": self._submit, "abort": engine.abort, "go": self._go}
        self._say("reply", engine.exported_weights())

    @property
    def _decoding(self) -> bool:
        return self._engine.busy and not self._paused

    def _listen(self) -> None:
        parent = os.getppid()
        try:
            while True:
                if self._connection.poll(ORPHAN_POLL_S):
                    self._told.put(self._connection.recv())
                elif os.getppid() != parent:
                    break
        except (EOFError, OSError):
            pass
        if self._open:
            os._exit(0)

    def _do(self, command: str, arguments: tuple[Any, ...]) -> None:
        if command in self._orders:
            self._orders[command](*arguments)
        else:
            self._say("reply", self._replies[command](*arguments))

    def _submit(self, requests: list[tuple[int, Any, dict[str, Any]]]) -> None:
        for key, prompt_ids, sampling in requests:
            self._engine.submit(key, prompt_ids, **sampling)

    def _go(self) -> None:
        self._paused = False

    def _settle(self) -> None:
        self._paused = True
        self._send_finished(self._engine.settle())

    def _close(self) -> None:
        self._open = False
        self._engine.close()

    def _send_finished(self, completions: list[Completion]) -> None:
        if completions:
            self._say("finished", packed(completions))
        elif time.monotonic() - self._said > SIGN_OF_LIFE_S:
            self._say("alive")

    def _say(self, *words: Any) -> None:
        self._connection.send(words)
        self._said = time.monotonic()


def main() -> None:
    # The terminal's Ctrl-C is for the parent, which says what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        Host(connection).run()
    except Exception as error:
        traceback.print_exc()
        kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        connection.send(("failed", kind, str(error).strip() or first_line(error)))
        sys.exit(1)


if __name__ == "__main__":
    main()
