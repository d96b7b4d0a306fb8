"""A signal stops a program in order and is its exit status; a second one ends it at once; imports end in a line."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROGRAM = """
import asyncio, sys, time
from fastgrpo import signals
from fastgrpo.program import run_async, run_program
from fastgrpo.signals import interruptible

async def main():
    try:
        if sys.argv[1] == "busy":
            with interruptible():
                print("begun", flush=True)
                while True:
                    time.sleep(0.01)
        with interruptible():
            pass
        print("begun", flush=True)
        await asyncio.sleep(60)
    finally:
        if sys.argv[1] == "slow":
            signals.ONE_SIGNAL_S = float(sys.argv[2])
            print("ending", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
        print("saved", flush=True)

run_program(lambda: run_async(main))
"""
IMPORT = """
import sys, importlib.machinery as machinery
sys.modules["__main__"].__spec__ = machinery.ModuleSpec("fastgrpo.train", None)
import fastgrpo.engine_extra, time
print("begun", flush=True)
time.sleep(60)
"""


@contextmanager
def started(text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has said it is there."""
    command = [sys.executable, "-c", text, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("what", ["waits", "busy"])
def test_a_signal_stops_in_order_and_is_the_exit_status(number: signal.Signals, what: str) -> None:
    with started(PROGRAM, what) as process:
        process.send_signal(number)
        out, error = process.communicate(timeout=240)
    assert (process.returncode, out) == (128 + number, "saved\n")
    first = ["stopping in order; a second signal ends at once"] if what == "waits" else []
    assert error.splitlines() == [*first, "interrupted"]


def test_a_program_stops_in_order_where_nobody_reads_what_it_says() -> None:
    """As of `2>&1 | tee log`, which Ctrl-C ends at once."""
    with started(PROGRAM, "waits") as process:
        assert process.stderr is not None
        process.stderr.close()
        process.stderr = None
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=240)
    assert (process.returncode, out) == (130, "saved\n")


@pytest.mark.parametrize(("apart_s", "ended"), [(0.0, True), (3600.0, False)])
def test_a_second_signal_ends_at_once_unless_it_is_the_first_one_passed_on(apart_s: float, ended: bool) -> None:
    with started(PROGRAM, "slow", str(apart_s)) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        if ended:
            process.wait(timeout=240)
        out, error = process.communicate("\n", timeout=240)
    assert (process.returncode, out) == (143, "" if ended else "saved\n")
    assert error.splitlines()[-1] == ("interrupted again: ended at once" if ended else "interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_program_imports_is_one_line(number: signal.Signals) -> None:
    with started(IMPORT) as process:
        process.send_signal(number)
        _, error = process.communicate(timeout=240)
    assert (process.returncode, error) == (128 + number, "interrupted\n")


def test_of_several_ranks_torchrun_ends_the_others_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with started(PROGRAM, "slow", "0") as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=240)
    assert (process.returncode, out) == (-signal.SIGTERM, "")


def test_an_ignored_signal_stays_so() -> None:
    """As under nohup."""
    text = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + PROGRAM
    with started(text, "waits") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=240)
    assert process.returncode == 143
