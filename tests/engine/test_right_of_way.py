"""The kernel that waits for the way, under Triton's interpreter and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastgrpo.right_of_way import RightOfWay, wait_while_set

WAITS = """
import torch
from fastgrpo.right_of_way import RightOfWay, wait_while_set

flag = torch.ones(1, dtype=torch.int32)
wait_while_set(flag, 5)
way = RightOfWay(torch.device("cpu"))
way.give_way()
way.claim()
assert way._claimed.item() == 1
way.release()
way.give_way()
assert (flag.item(), way._claimed.item()) == (1, 0)
"""


def test_a_wait_ends_though_nobody_releases_the_way() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", WAITS], env=environment, check=True, timeout=120)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two streams need a GPU")
def test_a_stream_waits_for_the_other_ones_release() -> None:
    device = torch.device("cuda")
    way, other = RightOfWay(device), torch.cuda.Stream()
    wait_while_set(way._claimed, 1)
    torch.cuda.synchronize()
    claimed, begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    with torch.cuda.stream(other):
        way.claim()
        claimed.record()
        torch.cuda._sleep(10_000_000)
        way.release()
    torch.cuda.current_stream().wait_event(claimed)
    begun.record()
    way.give_way()
    ended.record()
    torch.cuda.synchronize()
    assert 1 < begun.elapsed_time(ended) < 15
