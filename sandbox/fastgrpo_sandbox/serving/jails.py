"""What stands between requests and the pool: admission, the server's caps on limits, and answers without secrets."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from fastgrpo_sandbox.reading import ReaderLost, Unreadable
from fastgrpo_sandbox.remote import RunRequest
from fastgrpo_sandbox.stdio import MOST_OUTPUT
from fastgrpo_sandbox.turns import LANE, Turns
from fastgrpo_sandbox.types import MOST_CASES, RUNS_PER_CELL, Limits, Outcome

if TYPE_CHECKING:
    from fastgrpo_sandbox.pool import SandboxPool

log = logging.getLogger("fastgrpo_sandbox")
T = TypeVar("T")
MAX_RETRY_S = 30
MOST_UNREAD = 256 << 20  # bytes of answers, beside those of the jobs under way
LOST = "the jail failed, not the code; the server's log says why"


class Busy(Exception):
    """The queue is full; `retry_after_s` is when a place should be free."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Lost(Exception):
    """The jails failed and the asked-for form has no word for that."""

    def __init__(self) -> None:
        super().__init__(LOST)


class Refused(ValueError):
    """The request asks for what this server does not offer; the text is one sentence for its sender."""


def python_only(*languages: str) -> None:
    """Raises Refused where one of `languages` is another."""
    if other := sorted(set(languages) - {"python"}):
        raise Refused(f"language {other[0][:40]!r} is not offered: this server runs python")


class Jails:
    """Runs jobs in `pool`, `at_once` of a client under way and at most `queue` waiting; `caps` bounds what any may use.

    A request is taken while a place is free and then whole, so that one of many jobs is not starved by small ones.
    Clients, known by their address (turns.LANE), take turns, and none has all of them nor all places: `at_once` turns
    and places are kept for others.
    """

    def __init__(self, pool: SandboxPool, at_once: int, queue: int, caps: Limits) -> None:
        self.pool = pool
        self.places = at_once + queue
        self.caps = caps
        self.taken = 0
        self._at_once = at_once
        self._taken_by: Counter[str] = Counter()
        self._turns = Turns(2 * at_once)
        self._own_turns: WeakValueDictionary[str, Turns] = WeakValueDictionary()  # of each client
        self.waiting = 0  # for a turn, or for answers to be read
        self._unread = 0  # bytes of answers
        self._was_read = asyncio.Event()
        self._usual = self.capped(Limits())

    def admit(self) -> None:
        """Raises Busy while no place is free, but for a client that has fewer jobs here than may be under way."""
        if self.taken >= self.places and self._taken_by[LANE.get()] >= self._at_once:
            stats = self.pool.stats()
            wait_s = stats["run_s_p50"] * self.taken / (RUNS_PER_CELL * max(stats["cells"], 1))
            raise Busy(min(MAX_RETRY_S, max(1, math.ceil(wait_s))))

    async def read(self, function: Callable[..., T], *given: Any) -> T:
        """`function(*given)`, beside the event loop (reading.py): it may be long. Raises Refused and Lost."""
        try:
            return await self.pool.readers.ask(function, *given)
        except Unreadable as error:
            raise Refused(f"the request is too much: {error}") from None
        except ReaderLost as error:
            log.error("no reading: reason=%r", str(error))
            raise Lost from None

    async def run(self, job: RunRequest) -> Outcome:
        """The outcome of one job. Cancelling ends it. Raises Busy, Refused for more cases than there may be, and
        SandboxUnavailable once no cell can start."""
        if job.jobs > MOST_CASES:
            raise Refused(f"tests with {job.jobs} cases are too many for one request: send {MOST_CASES} in each")
        with self._places([job]):
            return await self._run(job)

    async def run_all(self, jobs: Sequence[RunRequest]) -> list[Outcome]:
        """Outcomes in order, the jobs run side by side."""
        with self._places(jobs):
            tasks = [asyncio.ensure_future(self._run(job)) for job in jobs]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    @contextmanager
    def _places(self, jobs: Sequence[RunRequest]) -> Iterator[None]:
        self.admit()
        places, client = sum(job.jobs for job in jobs), LANE.get()
        self.taken += places
        self._taken_by[client] += places
        try:
            yield
        finally:
            self.taken -= places
            self._taken_by[client] -= places
            self._taken_by += Counter()  # forgets who has none

    async def _run(self, job: RunRequest) -> Outcome:
        limits = self.capped(job.limits) if job.limits else self._usual
        await self.pool.read(job.tests)  # else long ones would hold all turns
        async with self._begun():
            outcome = await self.pool.run(job.code, stdin=job.stdin, files=job.files, tests=job.tests, limits=limits)
        if outcome.status == "infrastructure":  # its reason may name the host's own files
            return msgspec.structs.replace(outcome, error=LOST)
        return outcome

    @asynccontextmanager
    async def _begun(self) -> AsyncIterator[None]:
        """A job's time in the pool, once there is room for what it may print."""
        self.waiting += 1
        waits = ExitStack()
        waits.callback(self._waits_no_more)
        own = self._own_turns.setdefault(LANE.get(), Turns(self._at_once))
        with waits:
            async with own.taken(), self._turns.taken():
                while self._unread > MOST_UNREAD:
                    self._was_read.clear()
                    await self._was_read.wait()
                waits.close()
                yield

    def _waits_no_more(self) -> None:
        self.waiting -= 1

    @contextmanager
    def unread(self, size: int) -> Iterator[None]:
        """An answer of so many bytes while its client reads it. Where all are too many, no job begins meanwhile."""
        self._unread += size
        try:
            yield
        finally:
            self._unread -= size
            self._was_read.set()

    def limits(self, seconds: float, memory_mb: int = 0, output_bytes: int = MOST_OUTPUT) -> Limits:
        """The caps with less time, less output, and less memory (MiB) where any is asked for. Raises Refused for a time
        of none."""
        if not seconds > 0:
            raise Refused(f"a time limit of {seconds} s lets nothing run: give more than 0")
        seconds = min(seconds, self.caps.wall_s)
        memory_mb = min(memory_mb, self.caps.memory_mb) if memory_mb > 0 else self.caps.memory_mb
        output_bytes = min(output_bytes, self.caps.output_bytes)
        return msgspec.structs.replace(
            self.caps, wall_s=seconds, cpu_s=seconds, memory_mb=memory_mb, output_bytes=output_bytes
        )

    def capped(self, limits: Limits) -> Limits:
        """`limits`, none above the server's."""
        names = Limits.__struct_fields__
        return Limits(**{name: min(getattr(limits, name), getattr(self.caps, name)) for name in names})
