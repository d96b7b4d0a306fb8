"""What ends a process when its own wait, or another rank, will not: one child process for each way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from fastgrpo.program import run_program
from fastgrpo.ranks import deadlines
from fastgrpo.ranks.deadlines import Peers
from tests.helpers.ranks import processes


def rank_main(port: int, said: Path, block: Callable[[], object]) -> None:
    """Rank 0 of two runs `block`; its standard error goes to the file `said`."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    deadlines.POLL_S, deadlines.SILENT_POLLS, deadlines.GRACE_S = 0.1, 10, 0.1

    def main() -> None:
        with deadlines.listening(TCPStore("localhost", port, is_master=False), 0, 2):
            block()

    run_program(main)


def wait_within_a_deadline() -> None:
    with deadlines.within(0.2, "waited too long"):
        time.sleep(60)


def fail() -> None:
    raise ValueError("a reward of text")


def ended(store: TCPStore, folder: Path, block: Callable[[], object]) -> tuple[int | None, str]:
    """Exit code and standard error of rank 0, which runs `block`."""
    process = processes().Process(target=rank_main, args=(store.port, folder / "said", block))
    process.start()
    process.join(200)  # the first also starts the process that has imported torch and vLLM
    process.kill()
    return process.exitcode, (folder / "said").read_text()


@pytest.mark.parametrize(
    ("peer", "block", "code", "said"),
    [
        ("silent", partial(time.sleep, 60), 2, "error: rank 1 is gone: no sign of life for 1 s\n"),
        ("has not come", partial(time.sleep, 3), 0, ""),
        ("tells", partial(time.sleep, 60), 2, "error: rank 1 failed: no space left\n"),
        ("leaves", partial(time.sleep, 3), 0, ""),
        ("leaves", wait_within_a_deadline, 2, "error: waited too long\n"),
    ],
)
def test_a_rank_ends_when_it_must_and_says_why(
    tmp_path: Path, peer: str, block: Callable[[], object], code: int, said: str
) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    other = Peers(store, 1, 2)
    if peer == "silent":
        store.add("alive/1", 1)
    elif peer == "tells":
        other.tell("no space left")
    elif peer == "leaves":
        other.leave()
    assert ended(store, tmp_path, block) == (code, said)


def test_a_rank_that_has_come_is_missed_by_one_before_it_whose_next_never_comes() -> None:
    """As where a rank is killed before it comes: torchrun then ends the others of its host, and nobody listens."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store.add("alive/2", 3)
    assert Peers(store, 0, 4)._next() == (2, 3)
    assert Peers(store, 1, 4)._next() == (2, 3)
    assert Peers(store, 2, 4)._next() == (2, 0)
    store.add("alive/1", 1)
    assert Peers(store, 0, 4)._next() == (1, 1)


def serve_store(port: Connection) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    time.sleep(600)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_ends_where_the_store_is_silent_or_gone(tmp_path: Path, number: signal.Signals) -> None:
    """As where the first rank's host is: then nobody tells, and what asked it does not return."""
    ours, theirs = Pipe()
    serving = processes().Process(target=serve_store, args=(theirs,))
    serving.start()
    try:
        assert ours.poll(200)
        process = processes().Process(target=rank_main, args=(ours.recv(), tmp_path / "said", partial(time.sleep, 60)))
        process.start()
        ends = time.monotonic() + 60
        while not (tmp_path / "said").exists() and time.monotonic() < ends:
            time.sleep(0.1)
        time.sleep(1)
        os.kill(serving.pid, number)
        process.join(30)
        process.kill()
    finally:
        serving.kill()
    said = "error: rank 0 cannot be reached: no sign of life for 1 s\n"
    assert process.exitcode == 2
    assert (tmp_path / "said").read_text().endswith(said)


def test_a_rank_that_has_come_is_missed_from_then_on() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with deadlines.listening(store, 1, 2):
        assert store.add("alive/1", 0) == 1


def test_what_a_rank_raises_reaches_the_others(tmp_path: Path) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert ended(store, tmp_path, fail)[0] == 1
    assert store.get("failed") == b"rank 0 failed: a reward of text"


def test_interrupted_ranks_meet_at_one_step_and_wait_for_none_that_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where one is inside a wait for the other, which hears no signal: a checkpoint of both would wait for ever."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [Peers(store, rank, 2) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda rank: rank.met("step 3"), ranks)) == [True, True]
        monkeypatch.setattr(deadlines, "MEET_S", 0.2)
        assert list(threads.map(Peers.met, ranks, ["step 4", "step 5"])) == [False, False]
    assert deadlines.met("step 6")  # of one alone


def test_others_are_told_that_a_rank_was_interrupted() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(KeyboardInterrupt), deadlines.listening(store, 1, 2):
        raise KeyboardInterrupt
    assert store.get("failed") == b"rank 1 failed: it was interrupted"
