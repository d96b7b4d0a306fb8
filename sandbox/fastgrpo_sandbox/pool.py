"""The pool: jobs and sessions admitted in order, given to its cells, outcomes counted."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, get_args

import msgspec

from fastgrpo_sandbox.cells import CLOSED, Cells
from fastgrpo_sandbox.given import require_kind, require_texts, require_whole
from fastgrpo_sandbox.guest.memo import MISSING, known, learn
from fastgrpo_sandbox.job import (
    Handler,
    Parcel,
    Prepared,
    Rejected,
    Running,
    RunningSession,
    pack_check,
    pack_job,
    pack_session,
    prepare,
)
from fastgrpo_sandbox.reading import LONG, ReaderLost, Readers, Unreadable
from fastgrpo_sandbox.requirements import explain
from fastgrpo_sandbox.stdio import Cases, passes, with_room
from fastgrpo_sandbox.turns import Turns
from fastgrpo_sandbox.types import (
    RUNS_PER_CELL,
    AssertTests,
    JailedTests,
    Limits,
    Outcome,
    SandboxUnavailable,
    Status,
    StdioTests,
    Tests,
    UnittestTests,
    require_job,
    require_loop,
)

log = logging.getLogger("fastgrpo_sandbox")
HISTORY = 4096  # spawn times kept for the percentiles
LOOKED_AT = 1 << 13  # letters of an output that the loop itself compares
CHECKS_FIRST = 0.5  # less in order: what a case printed is held until its checker has seen it
READ_FIRST = 0.5  # likewise, for whoever had a turn already when its tests were to be read
# Of `double`, by each of the ways to judge: the first holds, the second fails.
TRIED: tuple[JailedTests, ...] = (
    AssertTests(asserts=("assert double(2) == 4", "assert double(2) == 5")),
    UnittestTests(
        source="import unittest\n\nclass TestDouble(unittest.TestCase):\n"
        "    def test_1(self): self.assertEqual(double(2), 4)\n    def test_2(self): self.assertEqual(double(2), 5)\n"
    ),
)


class Session:
    """A session under way, as its opener sees it."""

    def __init__(self, ended: asyncio.Future[Outcome]) -> None:
        self._ended = ended

    async def outcome(self) -> Outcome:
        """Waits for the session's end, at most its wall limit."""
        return await asyncio.shield(self._ended)


class SandboxPool:
    """Runs untrusted Python in jails: `async with SandboxPool() as pool: outcome = await pool.run(code)`.

    cells: bubblewrap jails, each with its own fork server, for runs, and as many for sessions from the first one on
    (default: one per core). limits: what a job may use unless it brings its own. preload: modules imported once per
    cell, such as "numpy"; they can be imported in the jail, and so can what their distributions require, which is
    readable there, never writable.
    armed: children that each cell keeps ready. sessions: how many may be open at once. Runs beyond 8 per cell and
    sessions beyond `sessions` wait their turn, first come first served unless runs have an `order`, and apart from each
    other, so that a session's handler may run jobs. recycle_after: jobs after which a cell is replaced.
    Raises SandboxUnavailable on entry, with the fix, on a machine that cannot run jails, and where a preloaded module
    changes what jobs print or how they are judged.
    """

    def __init__(
        self,
        cells: int | None = None,
        limits: Limits | None = None,
        preload: Sequence[str] = (),
        armed: int = 2,
        sessions: int = 16384,
        recycle_after: int = 50_000,
    ) -> None:
        require_kind("limits", limits, (Limits,))
        require_texts("preload", preload)
        counts = {"cells": cells or 1, "armed": armed, "sessions": sessions, "recycle_after": recycle_after}
        for what, value in counts.items():
            require_whole(what, value, 0 if what == "armed" else 1)
        self.limits = limits or Limits()
        wanted = cells or os.cpu_count() or 1
        self._preload = tuple(preload)
        self.cells = Cells(wanted, self._preload, armed, recycle_after)
        self._at_once = RUNS_PER_CELL * wanted
        self._run_slots = Turns(self._at_once)
        self._long_cases = Turns(self._at_once)  # what these print is held until it was compared
        self.readers = Readers()
        self._reading: dict[JailedTests, tuple[asyncio.Task[Prepared], int]] = {}  # and how many wait for it
        self._session_slots = asyncio.Semaphore(sessions)
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None  # that it was opened in
        self._counts: Counter[str] = Counter()
        self._waits: deque[float] = deque(maxlen=HISTORY)
        self._peak_mb = 0.0

    async def _begin(self) -> None:
        """What a pool needs before its first cell."""
        if self._loop is not None:
            raise ValueError("a pool is opened once: make another")
        self._loop = asyncio.get_running_loop()
        await self.cells.begin()

    async def __aenter__(self) -> SandboxPool:
        await self._begin()
        try:
            await self.cells.start("run")
            await self._try()
        except SandboxUnavailable as error:
            await self.aclose()
            raise SandboxUnavailable(f"{error}; {explain(str(error))}") from None
        except BaseException:
            await self.aclose()
            raise
        self._counts.clear()
        self._waits.clear()
        self._peak_mb = 0.0
        return self

    async def _try(self) -> None:
        """Raises SandboxUnavailable where a job does not print what it must, or where of two tests, the first of which
        holds, any other verdict comes: a module that is preloaded may end or change all jobs."""
        loaded = f" with {', '.join(self._preload)} preloaded" if self._preload else ""
        said = await self._tried("print(6 * 7)", None)
        if said.status != "ok" or said.stdout != "42\n":
            why = said.error or f"print(6 * 7) wrote {said.stdout!r}"
            raise SandboxUnavailable(f"the jail does not work here{loaded}: {why.splitlines()[-1]}")
        for tests in TRIED:
            judged = await self._tried("double = lambda x: 2 * x", tests)
            if judged.tests != (True, False):
                why = judged.error or f"{judged.tests} came in place of (True, False)"
                where = f"{type(tests).__name__} are judged wrongly here{loaded}"
                raise SandboxUnavailable(f"{where}: {why.splitlines()[-1]}")

    async def _tried(self, code: str, tests: JailedTests | None) -> Outcome:
        """`code` under limits that hold no such job back, however small or large the pool's own are."""
        least, own = msgspec.structs.asdict(Limits()), msgspec.structs.asdict(self.limits)
        limits = Limits(**{name: max(value, own[name]) for name, value in least.items()})
        # Read here: the process that reads tests starts with the first of others.
        parcel = pack_job(code, "", {}, prepare(tests) if tests else None, limits)
        return await self._run_packed(lambda _: parcel, 0)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends every job and every cell; returns when none is left."""
        self._closing = True
        self.readers.close()
        await self.cells.close()

    # ---- jobs ----

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        files: Mapping[str, str | bytes] | None = None,
        tests: Tests | None = None,
        limits: Limits | None = None,
        order: int = 0,
    ) -> Outcome:
        """Runs `code` as a script, or under `tests`, in a fresh jail. `files` are placed in its working folder.

        Where runs wait for a cell those of the lowest `order` go first, such as the number of a training step.
        Cancelling kills the job at once. Never raises for what the code does; see Outcome. Raises ValueError for an
        argument of another type.
        """
        require_job(code, stdin, files, tests, limits, order)
        require_loop(self._loop)
        if isinstance(tests, StdioTests):
            return await self._run_cases(code, files, tests, limits, order)
        limits = limits or self.limits
        return await self._run_packed(lambda ready: pack_job(code, stdin, files or {}, ready, limits), order, tests)

    async def _run_cases(
        self, code: str, files: Mapping[str, str | bytes] | None, tests: StdioTests, limits: Limits | None, order: int
    ) -> Outcome:
        """As many cases at once as there are runs: a hundred thousand that wait would take seconds to begin and to end,
        and whoever comes after them would wait for all."""
        limits = limits or self.limits
        answers, merged = [False] * len(tests.cases), Cases()

        async def judge(case: int, given: str, wanted: str) -> None:
            own = with_room(limits, wanted)
            async with self._long_cases.taken(order) if own.output_bytes > LONG else nullcontext():
                run = await self.run(code, stdin=given, files=files, limits=own, order=order)
                check = None
                try:
                    answers[case] = await self._passes(tests, case, run)
                except Unreadable:
                    pass  # what nobody can read in a minute is not what was wanted
                except ReaderLost as error:
                    run = Outcome("infrastructure", error=str(error), error_by="host")
                if answers[case] and tests.checker:
                    check = await self._run_packed(
                        lambda _: pack_check(tests.checker, given, run.stdout, wanted, limits), order - CHECKS_FIRST
                    )
                    answers[case] = check.pass_rate == 1.0
                merged.add(case, run, check)

        left = enumerate(tests.cases)

        async def judge_on() -> None:
            for case, pair in left:
                await judge(case, *pair)

        workers = [asyncio.ensure_future(judge_on()) for _ in tests.cases[: self._at_once]]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return merged.merged(answers)

    async def _passes(self, tests: StdioTests, case: int, run: Outcome) -> bool:
        """`passes`; of thousands of numbers that are written otherwise, of which each takes 4 us, beside the loop."""
        is_same = run.stdout.rstrip() == tests.cases[case][1].rstrip()
        if len(run.stdout) <= LOOKED_AT or run.status != "ok" or tests.checker or is_same:
            return passes(tests, case, run)
        return await self.readers.ask(
            passes, msgspec.structs.replace(tests, cases=tests.cases[case : case + 1]), 0, run
        )

    async def _run_packed(
        self, pack: Callable[[Prepared | None], Parcel], order: float, tests: JailedTests | None = None
    ) -> Outcome:
        """Packed once it is its turn: what waits, as a thousand cases of one code, takes no memory of its own."""
        self._counts["queued"] += 1
        try:
            ready = await self._turn(order, tests)
        except ReaderLost as error:
            if self._closing:
                raise SandboxUnavailable(CLOSED) from None
            return self._count(Outcome("infrastructure", error=str(error), error_by="host"))
        finally:
            self._counts["queued"] -= 1
        began = time.perf_counter()
        try:
            job = Running(await self.cells.pick("run"), pack(ready))
        except Rejected as error:
            self._run_slots.release()
            return self._count(Outcome("rejected", error=str(error), error_by="host"))
        except BaseException:
            self._run_slots.release()
            raise
        job.ended.add_done_callback(lambda _: self._run_slots.release())
        outcome = await self._ended(job)
        self._waits.append(time.perf_counter() - began)
        return self._count(outcome)

    async def _turn(self, order: float, tests: JailedTests | None) -> Prepared | None:
        """Returns at the job's turn, with its tests as they were read. None is taken meanwhile; what was let go by then
        for others' tests is read again. Raises ReaderLost."""
        await self._run_slots.acquire(order)
        while tests is not None and (ready := known(prepare, tests)) is MISSING:
            self._run_slots.release()
            read = await self._read(tests)
            is_kept = known(prepare, tests) is not MISSING
            await self._run_slots.acquire(order - READ_FIRST)
            if not is_kept:  # too long to be kept, and so refused
                return read
        return None if tests is None else ready

    async def read(self, tests: Tests | None) -> None:
        """Reads what `run` will need of tests, for whoever gives runs turns of his own. What is wrong `run` says."""
        if isinstance(tests, JailedTests) and known(prepare, tests) is MISSING:
            with suppress(ReaderLost):
                await self._read(tests)

    async def _read(self, tests: JailedTests) -> Prepared:
        """Tests, by the first of those who ask for them, until the last has left. Raises ReaderLost."""
        task, asked = self._reading.get(tests) or (self._begin_reading(tests), 0)
        self._reading[tests] = task, asked + 1
        try:
            await asyncio.wait({task})
        finally:
            task, asked = self._reading[tests]
            self._reading[tests] = task, asked - 1
            if asked == 1:
                del self._reading[tests]
                task.cancel()
        return task.result()

    def _begin_reading(self, tests: JailedTests) -> asyncio.Task[Prepared]:
        async def read() -> Prepared:
            try:
                ready = await self.readers.ask(prepare, tests)
            except Unreadable as error:
                ready = Prepared(refused=f"the tests cannot be compiled: {error}")
            learn(ready, prepare, tests)
            return ready

        return asyncio.get_running_loop().create_task(read())

    async def _ended(self, job: Running) -> Outcome:
        self._counts["running"] += 1
        job.ended.add_done_callback(self._one_less)
        try:
            return await asyncio.shield(job.ended)
        except asyncio.CancelledError:
            job.kill()
            raise

    def _one_less(self, _: asyncio.Future[Outcome]) -> None:
        self._counts["running"] -= 1

    @asynccontextmanager
    async def session(
        self, code: str, on_call: Handler, inputs: Mapping[str, Any] | None = None, limits: Limits | None = None
    ) -> AsyncIterator[Session]:
        """Starts `async def main(call, **inputs)` of `code`; `await call("method", **params)` in the jail is answered
        by `await on_call(method, params)` here. Leaving the block ends the session. Values are plain msgpack data:
        from the jail at most 1 MiB at once, 16 MiB in all calls, of which each counts as 256 bytes at least, and 65,536
        values in the unanswered ones.

        on_call may raise CallError(text), which the code sees, or EndSession(text), after which the session has failed;
        anything else it raises is an infrastructure outcome.
        """
        require_job(code, "", None, None, limits)
        require_loop(self._loop)
        async with self._session_slots:
            cell = await self.cells.pick("session")
            try:
                job = RunningSession(cell, pack_session(code, inputs or {}, limits or self.limits), on_call)
            except Rejected as error:
                ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
                ended.set_result(self._count(Outcome("rejected", error=str(error), error_by="host")))
                yield Session(ended)
                return
            self._counts["sessions"] += 1
            self._counts["running"] += 1
            job.ended.add_done_callback(self._one_less)
            job.ended.add_done_callback(lambda ended: self._count(ended.result()))
            try:
                yield Session(job.ended)
            finally:
                self._counts["sessions"] -= 1
                job.kill()
                await asyncio.shield(job.ended)  # at most ANSWER_GRACE_S: then the cell is given up

    # ---- counters ----

    def _count(self, outcome: Outcome) -> Outcome:
        self._counts[outcome.status] += 1
        self._peak_mb = max(self._peak_mb, outcome.memory_mb)
        if outcome.status == "infrastructure":
            log.info("job lost: reason=%r", outcome.error)  # told by the outcome; a handler's failure is the caller's
        return outcome

    def stats(self) -> dict[str, float]:
        """Counters for a live display: queued, running, sessions, cells, outcomes by status, seconds from admission to
        outcome of runs (p50, p99), peak memory of any job in MB."""
        waits = sorted(self._waits)
        percentiles = {
            f"run_s_p{p}": waits[min(len(waits) - 1, len(waits) * p // 100)] if waits else 0.0 for p in (50, 99)
        }
        return {
            **{name: float(self._counts[name]) for name in ("queued", "running", "sessions")},
            **{name: float(self._counts[name]) for name in get_args(Status)},
            "cells": float(self.cells.alive()),
            "cells_lost": float(self.cells.lost),
            **percentiles,
            "peak_memory_mb": self._peak_mb,
        }
