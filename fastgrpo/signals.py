"""How a program ends by a signal: the first one stops it in order, a second one at once.

Ctrl-C, SIGTERM (Slurm, Kubernetes) and SIGHUP (a closed terminal) are alike but for the exit status, 128 + the signal.
Needs the standard library alone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

TERMINATING = (signal.SIGTERM, signal.SIGHUP)
STOPPING = (signal.SIGINT, *TERMINATING)
# A terminal signals all of a process group, and torchrun passes on to its ranks what they have received already.
ONE_SIGNAL_S = 1.0

_received: list[tuple[int, float]] = []
_reactions: list[Callable[[], object]] = []


def handle_signals(numbers: Sequence[signal.Signals] = STOPPING) -> None:
    """From now on one of these signals ends the process in one line, or does what the innermost `reacting` block says.

    A signal that is ignored, as by nohup, stays ignored. Of several ranks only Ctrl-C is handled: with SIGTERM torchrun
    ends the others where one has failed, and nothing that they do together can end in order then.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for number in numbers:
        if not alone and number in TERMINATING:
            continue
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _handle)


@contextmanager
def signals_handled(numbers: Sequence[signal.Signals] = STOPPING) -> Iterator[None]:
    """In the block the first of these signals raises KeyboardInterrupt, if no inner block says otherwise.

    In the main thread alone.
    """
    earlier = {number: signal.getsignal(number) for number in STOPPING}
    _received.clear()
    handle_signals(numbers)
    try:
        with reacting(_interrupt):
            yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        # What comes after the outermost block was asked nothing.
        if not _reactions:
            _received.clear()


@contextmanager
def reacting(reaction: Callable[[], object]) -> Iterator[None]:
    """In the block the first signal calls `reaction`, between two bytecodes of the main thread."""
    _reactions.append(reaction)
    try:
        yield
    finally:
        _reactions.pop()


@contextmanager
def interruptible() -> Iterator[None]:
    """Around a long stretch of a coroutine without an `await`: the first signal raises KeyboardInterrupt in it."""
    if _received:
        raise KeyboardInterrupt
    with reacting(_interrupt):
        yield


def stopped_by() -> int | None:
    """The first signal received; None before one is."""
    return _received[0][0] if _received else None


def _interrupt() -> None:
    raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if not _received:
        _received.append((number, now))
        if not _reactions:
            _end("interrupted")
        _reactions[-1]()
    elif now - _received[0][1] > ONE_SIGNAL_S:
        _end("interrupted again: ended at once")


def _end(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(128 + _received[0][0])
