"""Code of somebody else's that does not end is named and left behind, and the program ends all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, sys, threading, time
from fastgrpo import left_behind
from fastgrpo.program import run_async, run_program

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
# Each of its arguments in a child of its own, which has what they all import; what becomes of it lies in three files.
BLOCKING = """
import asyncio, os, sys, time
from contextlib import asynccontextmanager
import torch
from fastgrpo import tasks
from fastgrpo.program import run_async
from fastgrpo.config import Config
from fastgrpo.rollouts import asking, dataset, environment
from fastgrpo.training import loss

asking.BLOCKED_S = environment.BLOCKED_S = asking.CLOSE_S = tasks.LOAD_S = dataset.STAGE_WAIT_S = loss.LOSS_S = 0.2

def blocks(*_):
    time.sleep(60)

async def blocks_the_loop(*_):
    time.sleep(60)

async def ignores_its_end():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

@asynccontextmanager
async def opening():
    try:
        yield "environment"
    finally:
        await (asyncio.sleep(60) if what == "end" else ignores_its_end())

async def opened():
    async with asking.opened(opening()) as found:
        print(found)
    print("the run goes on")

class Problem:
    id = "p7"

class Hanging:
    def __iter__(self):
        yield Problem
        time.sleep(60)

async def main():
    clock = asyncio.timeout(0.1)
    match what:
        case "execute":
            await asking.ask(blocks_the_loop, clock=clock)
        case "feedback_text":
            await asking.ask(blocks, clock=clock, inline=True)
        case "prompt":
            environment.prompt_of(blocks, Problem)
        case "dataset":
            dataset.as_list(Hanging(), "dataset")
        case "problems":
            tasks.problems_of(tasks.Task(blocks, opening), Config())
        case "loss":
            loss.custom_loss("__main__:blocks", loss.LossTokens(*torch.zeros(6, 3)))
        case _:
            await opened()

children = {}
for what in sys.argv[1:]:
    child = os.fork()
    if not child:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{what}.{name}", os.O_WRONLY | os.O_CREAT), number)
        run_async(main)
        sys.exit()
    children[child] = what
while children:
    child, status = os.wait()
    with open(f"{children.pop(child)}.status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(status)))
"""


LOCKING = """
import asyncio, re, sys, time
from fastgrpo import left_behind
from fastgrpo.program import run_async

left_behind.STILL_S, left_behind.BEAT_S = 2.0, 0.2

def keeps_the_lock():
    re.match("(a+)+$", "a" * 64 + "b")

def works():
    begun = time.monotonic()
    while time.monotonic() < begun + 3:
        pass

async def main():
    print("begun", flush=True)
    await asyncio.to_thread(globals()[sys.argv[1]])
    print("done")

run_async(main)
"""


def ended_program(text: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=folder)


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


HOLDING = {
    "execute": "the environment's blocks_the_loop has held the event loop for 0.3 s, in which nothing else goes on",
    "feedback_text": "the environment's blocks has held the event loop for 0.3 s, in which nothing else goes on",
    "prompt": "prompt has held the event loop for 0.2 s for the problem p7, in which nothing else goes on: have",
    "dataset": "dataset has not been read to its end in 0.2 s: its own code hangs",
    "problems": "load_problems has not ended in 0.2 s: its own code, or the trial of solutions, hangs",
    "loss": "grpo.loss_function: __main__:blocks has not ended in 0.2 s: mend it, then continue with --resume",
    "stubborn end": "open_environment has not closed in 0.4 s: its code after the yield hangs",
}


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where `BLOCKING` has left what became of each."""
    folder = tmp_path_factory.mktemp("blocked")
    ended = ended_program(BLOCKING, *HOLDING, "end", folder=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.parametrize("what", HOLDING)
def test_what_holds_up_all_else_ends_the_run_by_its_name(what: str, blocked: Path) -> None:
    assert (blocked / f"{what}.status").read_text() == "2"
    said = (blocked / f"{what}.stderr").read_text()
    assert [line for line in said.splitlines() if line.startswith(f"error: {HOLDING[what]}")], said


def test_a_module_that_hangs_as_it_is_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("import time\ntime.sleep(60)\n")
    program = (
        "from fastgrpo import functions\n"
        "functions.IMPORT_S = 0.2\n"
        "functions.find_function('rewards:right', 'data.reward')\n"
    )
    ended = ended_program(program, folder=tmp_path)
    said = "data.reward: the module rewards has not been imported in 0.2 s: what takes long belongs into right"
    assert (ended.returncode, ended.stderr.splitlines()) == (2, [f"error: {said}"])


def test_the_place_of_a_call_that_keeps_pythons_lock_is_told_again_and_again() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOCKING, "keeps_the_lock"], stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        for _ in range(2):
            next(line for line in running.stderr if line.startswith("Timeout"))
            next(line for line in running.stderr if "in keeps_the_lock" in line)
        assert running.poll() is None
        running.kill()


def test_a_call_that_lets_others_run_is_not_told() -> None:
    ended = ended_program(LOCKING, "works")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "begun\ndone\n", "")


def test_an_environment_that_does_not_close_is_named_and_the_run_goes_on(blocked: Path) -> None:
    assert (blocked / "end.status").read_text() == "0"
    assert (blocked / "end.stdout").read_text() == "environment\nthe run goes on\n"
    said = (blocked / "end.stderr").read_text()
    assert "open_environment has not closed in 0.2 s and is cancelled: its code after the yield" in said
