"""Code of somebody else's that does not end is named and left behind, and the program ends all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, sys, threading, time
from fastgrpo import left_behind
from fastgrpo.cli import run_async
from fastgrpo.program import run_program

left_behind.LOOP_S = left_behind.EXIT_S = 0.3

async def stubborn():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

async def main():
    if sys.argv[1] == "task":
        main.kept = [asyncio.create_task(stubborn(), name="an agent's loop") for _ in range(2)]
    if sys.argv[1] == "call":
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
    if sys.argv[1] == "thread":
        threading.Thread(target=time.sleep, args=(60,), name="an upload").start()
    await asyncio.sleep(0.05)
    print("done")
    return 3

run_program(lambda: run_async(main))
"""
BLOCKING = """
import asyncio, time
from fastgrpo.cli import run_async
from fastgrpo.rollouts import asking

asking.BLOCKED_S = 0.2

async def execute():
    time.sleep(60)

run_async(lambda: asking.ask(execute, clock=asyncio.timeout(0.1)))
"""


def ended_program(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("task", "an agent's loop (2 times)"),
        ("call", "a call in a thread (asyncio.to_thread, or a loop's executor)"),
        ("thread", "the thread an upload"),
        ("nothing", ""),
    ],
)
def test_what_does_not_end_is_named_and_the_program_ends(what: str, named: str) -> None:
    ended = ended_program(PROGRAM, what)
    assert (ended.returncode, ended.stdout) == (3, "done\n")
    lines = ended.stderr.splitlines()
    assert lines[:1] == ([f"left behind, for it goes on though all else has ended: {named}"] if named else [])


def test_a_coroutine_that_holds_the_event_loop_ends_the_run_by_its_name() -> None:
    ended = ended_program(BLOCKING)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the environment's execute has held the event loop for 0.3 s, in which")
