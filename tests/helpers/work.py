"""How much work a function is, whatever else the machine and this process do meanwhile.

A bound on a test's time is kept with these two, never with the wall clock or `time.process_time()`: the one runs while
others have the processor, and the other counts this process's other threads and its collections of garbage.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any


def calls_of(work: Callable[[], Any]) -> int:
    """Calls of functions, in Python and in C, that `work` takes: the same number each time, for work in Python."""
    count = 0

    def counted(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def thread_seconds(work: Callable[[], Any], runs: int = 3) -> float:
    """The least processor time of this thread, in seconds, that `work` takes in `runs` runs without collections of
    garbage. For work within C (regular expressions, the parser), where `calls_of` sees nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return min(_once(work) for _ in range(runs))
    finally:
        if collects:
            gc.enable()


def _once(work: Callable[[], Any]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began
