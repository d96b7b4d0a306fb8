"""Texts read beside the event loop: nobody waits for another's, and each ends, whatever it is."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fastgrpo_sandbox import (
    AssertTests,
    Limits,
    Outcome,
    SandboxPool,
    SandboxUnavailable,
    StdioTests,
    UnittestTests,
    reading,
)
from fastgrpo_sandbox.guest import memo
from fastgrpo_sandbox.job import prepare
from fastgrpo_sandbox.reading import ReaderLost, Readers, Unreadable
from tests.sandbox.conftest import descendants

CODE = "def f(x): return x"
LONG = AssertTests(tuple(f"assert f({[number] * 60}) == {[number] * 60}" for number in range(400)))
# Each `finally` is compiled twice, so these 2 ** 17 times; and with two more no machine has the memory.
DEEP = 17
BOMB = AssertTests(
    (
        "".join(f"{'  ' * i}try:\n{'  ' * i}  pass\n{'  ' * i}finally:\n" for i in range(DEEP))
        + "  " * DEEP
        + "assert f",
    )
)
NUMBERS = [f"{number}.5" for number in range(300_000)]
NUMBER_TESTS = StdioTests(((" ".join(NUMBERS), "0 ".join(NUMBERS)),))


def endless() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0.2)  # sooner than in a minute
    while True:
        pass


def large() -> int:
    return len(bytearray(400 << 20))


def raising() -> None:
    raise SyntaxError("so it is")


def asked(work: Callable[[Readers], Awaitable[Any]]) -> Any:
    """What `work` returns; no process is left behind."""

    async def main() -> Any:
        readers = Readers()
        try:
            return await asyncio.wait_for(work(readers), 60)
        finally:
            readers.close()

    before = descendants(os.getpid())
    answer = asyncio.run(main())
    assert descendants(os.getpid()) <= before
    return answer


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        (endless, Unreadable, "it takes more than 60 s to read"),
        (large, Unreadable, "it takes more memory to read than a text of its length may"),
        (raising, SyntaxError, "so it is"),
    ],
)
def test_what_cannot_be_read_is_said_and_the_next_is_read(function, kind, said):
    async def work(readers: Readers) -> str:
        with pytest.raises(kind, match=said):
            await readers.ask(function)
        return await readers.ask(str.upper, "next")

    assert asked(work) == "NEXT"


def test_a_process_that_is_killed_is_no_fault_of_the_texts():
    async def work(readers: Readers) -> str:
        with pytest.raises(ReaderLost, match="status -9"):
            await readers.ask(os.kill, await readers.ask(os.getpid), signal.SIGKILL)
        return await readers.ask(str.upper, "next")

    assert asked(work) == "NEXT"


def test_a_process_that_is_killed_while_it_waits_costs_no_reading():
    async def work(readers: Readers) -> str:
        waiting = await readers.ask(os.getpid)
        os.kill(waiting, signal.SIGKILL)
        os.waitid(os.P_PID, waiting, os.WEXITED | os.WNOWAIT)
        return await readers.ask(str.upper, "next")

    assert asked(work) == "NEXT"


def test_who_leaves_ends_a_reading_and_close_ends_all():
    async def work(readers: Readers) -> list[Any]:
        left = asyncio.ensure_future(readers.ask(time.sleep, 600))
        stays = asyncio.ensure_future(readers.ask(time.sleep, 600))
        await asyncio.sleep(0.3)
        left.cancel()
        await asyncio.wait({left})
        assert await readers.ask(str.upper, "next") == "NEXT"
        readers.close()
        return await asyncio.gather(left, stays, readers.ask(str.upper, "late"), return_exceptions=True)

    kinds = list(map(type, asked(work)))
    assert kinds == [asyncio.CancelledError, ReaderLost, ReaderLost]


@pytest.mark.jail
@pytest.mark.parametrize(
    "tests",
    [
        LONG,
        BOMB,
        UnittestTests("import unittest\nclass T(unittest.TestCase):\n" + "".join(
            f"    def test_{number}(self): self.assertEqual(f({number}), {number})\n" for number in range(1500))),
        NUMBER_TESTS,
    ],
    ids=["many", "nested", "unittest", "numbers"],
)  # fmt: skip
def test_a_long_text_takes_the_loop_no_time(monkeypatch, tests):
    monkeypatch.setattr(memo, "_kept", memo._Kept())
    code = "print(input())" if isinstance(tests, StdioTests) else CODE

    async def main() -> tuple[str, float]:
        async with SandboxPool(cells=1, limits=Limits(wall_s=60, cpu_s=60, output_bytes=4 << 20)) as pool:
            began = time.thread_time()
            outcome = await pool.run(code, tests=tests)
            return outcome.status, time.thread_time() - began

    status, seconds = asyncio.run(main())
    assert status == ("rejected" if tests is BOMB else "ok")  # its code is too long for a job
    assert seconds < 0.3


@pytest.mark.jail
@pytest.mark.parametrize(
    ("text", "wanted", "is_asked"),
    [
        ("1.0 " * 15_000, "1 " * 15_000, True),
        ("1 " * 15_000, "2 " * 15_000, True),
        ("1.0 " * 15_000, "1.0 " * 14_999 + "1.0\n", False),
        ("1.0 " * 100, "1 " * 100, False),
    ],
    ids=["written otherwise", "wrong", "the same", "short"],
)
def test_many_numbers_that_are_written_otherwise_are_compared_beside_the_loop(monkeypatch, text, wanted, is_asked):
    asked = []

    async def main() -> Outcome:
        async with SandboxPool(cells=1) as pool:
            ask = pool.readers.ask
            monkeypatch.setattr(pool.readers, "ask", lambda *given: asked.append(given) or ask(*given))
            return await pool.run("print(input())", tests=StdioTests(((text, wanted),)))

    assert asyncio.run(main()).tests == (wanted[0] == text[0],)
    assert len(asked) == is_asked


@pytest.mark.jail
def test_tests_of_many_jobs_are_read_once_whoever_leaves(monkeypatch):
    monkeypatch.setattr(memo, "_kept", memo._Kept())
    asked = []

    async def main() -> list[Any]:
        async with SandboxPool(cells=1) as pool:
            ask = pool.readers.ask
            monkeypatch.setattr(pool.readers, "ask", lambda *given: asked.append(given) or ask(*given))
            jobs = [asyncio.ensure_future(pool.run(CODE, tests=LONG)) for _ in range(12)]
            while not asked:
                await asyncio.sleep(0.01)
            jobs[0].cancel()
            return await asyncio.gather(*jobs, return_exceptions=True)

    first, *others = asyncio.run(main())
    assert isinstance(first, asyncio.CancelledError)
    assert [outcome.status for outcome in others] == ["ok"] * 11
    assert asked == [(prepare, LONG)]


@pytest.mark.jail
def test_tests_that_are_too_much_are_refused_and_lost_readers_are_no_score(monkeypatch):
    monkeypatch.setattr(memo, "_kept", memo._Kept())
    failures = [Unreadable("it is too long"), ReaderLost("it is gone")]

    async def main() -> list[tuple[str, str]]:
        async with SandboxPool(cells=1) as pool:

            async def ask(*given: Any) -> Any:
                raise failures.pop(0)

            monkeypatch.setattr(pool.readers, "ask", ask)
            said = []
            for number in (1, 1, 2):
                outcome = await pool.run(CODE, tests=AssertTests((f"assert f(1) == {number}",)))
                said.append((outcome.status, outcome.error))
            return said

    refused = ("rejected", "the tests cannot be compiled: it is too long")
    assert asyncio.run(main()) == [refused, refused, ("infrastructure", "it is gone")]


def test_a_reader_finds_the_package_where_an_import_hook_alone_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an editable install has it: the package's folder is nowhere on the path."""
    folder = str(Path(reading.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if os.path.abspath(path) != folder])
    assert asked(lambda readers: readers.ask(prepare, AssertTests(("assert f(1) == 1",)))).refused == ""


def test_a_package_that_is_named_like_a_module_of_the_library_is_not_found_in_its_place(monkeypatch, tmp_path):
    """Old ones, as `dataclasses` and `pathlib`, lie beside this one in an environment that has much."""
    (tmp_path / "subprocess.py").write_text("raise ImportError('not this one')")
    monkeypatch.syspath_prepend(str(Path(reading.__file__).parents[1]))
    monkeypatch.setattr(reading, "__file__", str(tmp_path / "fastgrpo_sandbox" / "reading.py"))
    assert asked(lambda readers: readers.ask(str.upper, "next")) == "NEXT"


@pytest.mark.jail
def test_tests_that_are_not_kept_are_read_for_each_job(monkeypatch):
    """Those of 70 MB were read again and again, for ever."""
    monkeypatch.setattr(memo, "_kept", memo._Kept())
    monkeypatch.setattr(memo, "MOST_BYTES", 100)

    async def main() -> list[str]:
        async with SandboxPool(cells=1) as pool, asyncio.timeout(30):
            tests = AssertTests(("assert f(1) == 1",))
            return [outcome.status for outcome in await asyncio.gather(*(pool.run(CODE, tests=tests) for _ in "12"))]

    assert asyncio.run(main()) == ["ok", "ok"]


def test_texts_of_a_class_of_the_callers_are_read_as_plain_ones():
    class Text(str):
        """As data sets have it, in a class that a reader cannot import."""

    tests = AssertTests((Text("assert f(1) == 1"),), Text("import math"))
    assert asked(lambda readers: readers.ask(prepare, tests)) == prepare(tests)


@pytest.mark.jail
def test_a_pool_that_is_closed_says_so_of_new_tests_too(monkeypatch):
    """An outcome would be counted as a failure of the jails."""
    monkeypatch.setattr(memo, "_kept", memo._Kept())

    async def main() -> None:
        async with SandboxPool(cells=1) as pool:
            waits = asyncio.ensure_future(pool.run(CODE, tests=BOMB))
            await asyncio.sleep(0.05)
        for late in (waits, pool.run(CODE, tests=LONG)):
            with pytest.raises(SandboxUnavailable, match="the pool is closed"):
                await late

    asyncio.run(main())
