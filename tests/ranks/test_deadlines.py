"""What ends a process when its own wait, or another rank, will not: one child process for each way."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch.distributed import TCPStore

from fastgrpo.ranks.deadlines import Peers

CHILD = """
import sys, time
from torch.distributed import TCPStore
from fastgrpo.ranks import deadlines as watch
from fastgrpo.program import run_program

watch.POLL_S, watch.SILENT_POLLS, watch.GRACE_S = 0.1, 10, 0.1

def main():
    with watch.listening(TCPStore("localhost", int(sys.argv[1]), is_master=False), 0, 2):
        {}

run_program(main)
"""


@pytest.mark.parametrize(
    ("peer", "block", "code", "said"),
    [
        ("silent", "time.sleep(60)", 2, "error: rank 1 is gone: no sign of life for 1 s\n"),
        ("tells", "time.sleep(60)", 2, "error: rank 1 failed: no space left\n"),
        ("leaves", "time.sleep(3)", 0, ""),
        ("leaves", "with watch.within(0.2, 'waited too long'): time.sleep(60)", 2, "error: waited too long\n"),
    ],
)
def test_a_rank_ends_when_it_must_and_says_why(peer: str, block: str, code: int, said: str) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    other = Peers(store, 1, 2)
    if peer == "tells":
        other.tell("no space left")
    elif peer == "leaves":
        other.leave()
    child = [sys.executable, "-c", CHILD.format(block), str(store.port)]
    ended = subprocess.run(child, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (code, said)


def test_what_a_rank_raises_reaches_the_others() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    child = [sys.executable, "-c", CHILD.format("raise ValueError('a reward of text')"), str(store.port)]
    ended = subprocess.run(child, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert store.get("failed") == b"rank 0 failed: a reward of text"
