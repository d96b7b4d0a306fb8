"""Guards around vLLM: no Ctrl-C inside a step, nothing on the terminal while it starts, globals put back, and no patch
of sources that it was not written for."""

from __future__ import annotations

import hashlib
import inspect
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Hold SIGINT back until the block ends (main thread only; elsewhere Python never raises it)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, Any]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received and callable(previous):
            previous(*received[0])


@contextmanager
def output_kept_back() -> Iterator[None]:
    """Keep what native code and loggers print at start off the terminal, unless the block fails by itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept, ExitStack() as stack:
        terminal = {}
        for descriptor in (1, 2):
            terminal[descriptor] = os.dup(descriptor)
            stack.callback(os.close, terminal[descriptor])
            os.dup2(kept.fileno(), descriptor)
        failed = True
        try:
            yield
            failed = False
        except KeyboardInterrupt:
            failed = False
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in terminal.items():
                os.dup2(original, descriptor)
            if failed:
                kept.seek(0)
                os.write(2, kept.read())


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The attribute `name` of `owner` is `value` until the block ends."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def source_digest(find: Callable[[], Iterable[Any]]) -> Callable[[], str | None]:
    """Of a function that imports classes and functions, one that returns a digest of their sources; None where one of
    them is not where it was, or has no source."""

    @wraps(find)
    def digest() -> str | None:
        try:
            text = "\n".join(inspect.getsource(part).strip() for part in find())
        except (ImportError, AttributeError, OSError):  # the last one where there is no source to read
            return None
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    return digest
