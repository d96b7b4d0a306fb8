"""The end of a process that cannot end itself: a wait inside native code past its deadline, a rank whose peer is gone.

Both are seen by daemon threads, which print one sentence and leave the process at once. torchrun ends the other ranks
of a machine when one ends; ranks on other machines, and those beside a rank that hangs, learn it from the store.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import NoReturn

from torch.distributed import DistError, Store

from fastgrpo.errors import USER_ERROR, say_error

POLL_S = 1.0
# Long enough for a rank that is busy with something that never lets a second thread run.
SILENT_POLLS = 25
# Time for a failed rank and torchrun to end by themselves, so that the first error seen is that rank's own.
GRACE_S = 3.0

_FAILED, _LEFT = "failed", 2**40
_waits: dict[int, tuple[float, str]] = {}
_numbers = itertools.count()
# The present block of `listening`, if any.
_peers: list[Peers] = []


@contextmanager
def within(seconds: float, complaint: str) -> Iterator[None]:
    """End the process with `complaint` where the block, which nothing else can interrupt, outlasts `seconds`."""
    _start_the_clock()
    number = next(_numbers)
    _waits[number] = (time.monotonic() + seconds, complaint)
    try:
        yield
    finally:
        del _waits[number]


@cache
def _start_the_clock() -> None:
    threading.Thread(target=_watch_the_clock, name="deadlines", daemon=True).start()


def _watch_the_clock() -> None:
    while True:
        time.sleep(POLL_S)
        now = time.monotonic()
        for deadline, complaint in tuple(_waits.values()):
            if now > deadline:
                for peers in _peers:
                    peers.tell(complaint)
                _end(complaint)


class Peers(threading.Thread):
    """Signs of life among ranks, over a `store` that all of them reach. Each rank listens to the next one."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        super().__init__(name="peers", daemon=True)
        self._store, self._rank, self._next = store, rank, (rank + 1) % world
        self._over = threading.Event()

    def run(self) -> None:
        """End the process when any rank has failed or the next one is silent."""
        heard, silent = 0, 0
        # The store ends with the run's first machine, and torchrun then ends the others.
        with suppress(DistError):
            while not self._over.wait(POLL_S):
                self._store.add(f"alive/{self._rank}", 1)
                if self._store.check([_FAILED]):
                    time.sleep(GRACE_S)
                    _end(self._store.get(_FAILED).decode())
                sign = self._store.add(f"alive/{self._next}", 0)
                silent = silent + 1 if sign == heard and sign < _LEFT else 0
                heard = sign
                if silent > SILENT_POLLS:
                    self._post(f"rank {self._next} is gone: no sign of life for {SILENT_POLLS * POLL_S:.0f} s")

    def tell(self, error: str) -> None:
        """Make every other rank end with this rank's `error`, and listen no more."""
        self._over.set()
        with suppress(DistError):
            self._post(f"rank {self._rank} failed: {error}")

    def leave(self) -> None:
        """This rank is done and will be silent; the others go on."""
        self._over.set()
        with suppress(DistError):
            self._store.add(f"alive/{self._rank}", _LEFT)

    def _post(self, failure: str) -> None:
        self._store.compare_set(_FAILED, "", failure)


@contextmanager
def listening(store: Store, rank: int, world: int) -> Iterator[None]:
    """Ranks in this block end together: an exception that leaves it on one of them ends the others too."""
    peers = Peers(store, rank, world)
    peers.start()
    _peers.append(peers)
    try:
        yield
    except BaseException as error:
        peers.tell(str(error) or type(error).__name__)
        raise
    else:
        peers.leave()
    finally:
        _peers.clear()
        # A thread inside the store's native code when Python ends would end the process by an error.
        peers.join(POLL_S)


def _end(complaint: str) -> NoReturn:
    say_error(complaint)
    os._exit(USER_ERROR)
