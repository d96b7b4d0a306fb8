"""The end of a process that cannot end itself: a wait inside native code past its deadline, a rank whose peer is gone.

Both are seen by daemon threads, which print one sentence and leave the process at once. torchrun ends the other ranks
of a host when one ends; ranks on other hosts, and those beside a rank that hangs, learn it from the store, which is on
the first rank's host. Where that is gone, the store is silent.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import NoReturn

from torch.distributed import DistError, Store

from fastgrpo.errors import USER_ERROR, say_error

POLL_S = 1.0
# Long enough for a rank that is busy with something that never lets a second thread run.
SILENT_POLLS = 25
# Ranks behind one's own of which each is looked for until one has come.
LOOKED_AT = 16
# Time for a failed rank and torchrun to end by themselves, so that the first error seen is that rank's own.
GRACE_S = 3.0
# For interrupted ranks to come to one place, of the half minute after which torchrun kills what it has interrupted.
MEET_S = 10.0
LOOK_S = 0.1

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
        for peers in tuple(_peers):
            if complaint := peers.unanswered():
                _end(complaint)
        for deadline, complaint in tuple(_waits.values()):
            if now > deadline:
                for peers in _peers:
                    peers.tell(complaint)
                _end(complaint)


class Peers(threading.Thread):
    """Signs of life among ranks, over a `store` that all of them reach. Each rank listens to the next that has come.

    `names`: what the ranks are called, with their hosts where these are several.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        super().__init__(name="peers", daemon=True)
        self.names = [f"rank {number}" for number in range(world)]
        self._store, self._rank, self._world = store, rank, world
        self._others = [(rank + step) % world for step in range(1, min(world, 1 + LOOKED_AT))]
        self._over = threading.Event()
        # Polls that the store has answered; as many as the clock had seen; how often it has seen no more of them.
        self._answered, self._seen, self._unanswered = 0, 0, 0

    def run(self) -> None:
        """End the process when any rank has failed or the next one is silent."""
        heard, silent = (self._rank, 0), 0
        # Without a store the clock ends this process, if nobody else does.
        with suppress(DistError):
            while not self._over.wait(POLL_S):
                self._store.add(f"alive/{self._rank}", 1)
                if failure := self.failure():
                    time.sleep(GRACE_S)
                    _end(failure)
                number, sign = self._next()
                silent = silent + 1 if (number, sign) == heard and 0 < sign < _LEFT else 0
                heard = number, sign
                if silent > SILENT_POLLS:
                    self._post(f"{self.names[number]} is gone: {_silence()}")
                self._answered += 1

    def _next(self) -> tuple[int, int]:
        """The next rank that has come, and its signs so far: the one before it may be killed before it comes."""
        for number in self._others:
            if sign := self._store.add(f"alive/{number}", 0):
                return number, sign
        return self._rank, 0

    def unanswered(self) -> str:
        """What to end with, once the store has answered nothing between many calls of this, a poll apart.

        The host of the first rank is gone then, or the network to it; that may tell nobody for a quarter of an hour.
        """
        silent = self._answered == self._seen and not self._over.is_set()
        self._seen, self._unanswered = self._answered, self._unanswered + 1 if silent else 0
        return f"{self.names[0]} cannot be reached: {_silence()}" if self._unanswered > SILENT_POLLS else ""

    def failure(self) -> str:
        """What the first rank that failed has told; empty where none has. Raises DistError without a store."""
        return self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else ""

    def met(self, place: str) -> bool:
        """As the function `met`; False where the store is gone."""
        ends = time.monotonic() + MEET_S
        with suppress(DistError):
            self._store.add(f"met/{place}", 1)
            while (come := self._store.add(f"met/{place}", 0)) < self._world and time.monotonic() < ends:
                time.sleep(LOOK_S)
            return come >= self._world
        return False

    def tell(self, error: str) -> None:
        """Make every other rank end with this rank's `error`, and listen no more."""
        self._over.set()
        _briefly(partial(self._post, f"{self.names[self._rank]} failed: {error}"))

    def leave(self) -> None:
        """This rank is done and will be silent; the others go on."""
        self._over.set()
        _briefly(partial(self._store.add, f"alive/{self._rank}", _LEFT))

    def _post(self, failure: str) -> None:
        self._store.compare_set(_FAILED, "", failure)


def _silence() -> str:
    return f"no sign of life for {SILENT_POLLS * POLL_S:.0f} s"


def _briefly(ask: Callable[[], object]) -> None:
    """Ask the store, for `GRACE_S` at most: nothing can interrupt a question to a host that is gone."""

    def asked() -> None:
        with suppress(DistError):
            ask()

    thread = threading.Thread(target=asked, name="store", daemon=True)
    thread.start()
    thread.join(GRACE_S)


def told_failure() -> str:
    """What the first of the other ranks to fail has told; empty where none has, or nobody listens."""
    told: list[str] = []

    def ask() -> None:
        told.extend(peers.failure() for peers in tuple(_peers))

    _briefly(ask)
    return told[0] if told else ""


def met(place: str) -> bool:
    """Whether all ranks come to this `place` within `MEET_S`; True of one alone.

    For ranks that are interrupted: one that waits for another inside native code hears no signal, and never comes.
    """
    return all(peers.met(place) for peers in tuple(_peers))


@contextmanager
def listening(store: Store, rank: int, world: int) -> Iterator[Peers]:
    """Ranks in this block end together: an exception that leaves it on one of them ends the others too."""
    _start_the_clock()
    peers = Peers(store, rank, world)
    # At once: whoever has come and gives no second sign is gone.
    with suppress(DistError):
        store.add(f"alive/{rank}", 1)
    peers.start()
    _peers.append(peers)
    try:
        yield peers
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        peers.tell("it was interrupted" if interrupted else str(error) or type(error).__name__)
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
