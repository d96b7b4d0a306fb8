"""The training that a process has under way, and its end by `fastgrpo.stop()`.

Not in `train.py`, which is another module where it is the program: a reward function's `stop` would not find it there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fastgrpo.errors import UserError, say_on_stderr
from fastgrpo.ranks.collectives import gather_all, rank_and_world
from fastgrpo.signals import stopped_by

# At most one: two in one process would share what PyTorch, vLLM and the ranks have once a process.
_under_way: list[Training] = []
_one_at_a_time = threading.Lock()


class Training:
    """A training that `stop` may end, from any thread and however often it is asked for."""

    def __init__(self) -> None:
        self.stopping = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    async def run(self, program: Coroutine[Any, Any, None]) -> None:
        """Run the `program` to its end. It returns where it was stopped, too: ranks part in order by a return alone."""
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._running = asyncio.get_running_loop(), task
        try:
            if self.stopping:
                self.stop()
            await program
        except asyncio.CancelledError:
            if not self.stopping or stopped_by() is not None:
                raise
        finally:
            self._running = None

    def stop(self) -> None:
        """Cancel it where this rank is alone; several ask one another before each step (`stop_if_asked`)."""
        self.stopping = True
        if self._running is None or rank_and_world()[1] > 1:
            return
        loop, task = self._running
        with suppress(RuntimeError):  # it has just ended
            # A second time would end the writing of the checkpoint.
            loop.call_soon_threadsafe(lambda: task.cancelling() or task.cancel())


@contextmanager
def under_way() -> Iterator[Training]:
    """The one training of this process, for the length of the block. Raises UserError where there is another."""
    training = Training()
    with _one_at_a_time:
        if _under_way:
            raise UserError(
                "another training is under way in this process, maybe one whose notebook cell was stopped: wait for "
                "its end, or call fastgrpo.stop()"
            )
        _under_way.append(training)
    try:
        yield training
    finally:
        _under_way.clear()


def stop() -> None:
    """End the training that this process has under way, if any: it leaves a checkpoint, and `fastgrpo.train` returns.

    `fastgrpo.stop()` is this function. From any thread, a reward function's too; it does not wait. Of several ranks
    any may call it: all end before their next step.
    """
    for training in tuple(_under_way):
        if not training.stopping:
            say_on_stderr("stopping in order")
        training.stop()


def stop_if_asked() -> None:
    """Raise CancelledError on each of several ranks where `stop` was called on any. Collective."""
    if rank_and_world()[1] == 1:
        return
    if any(gather_all(any(training.stopping for training in _under_way), "the next step")):
        for training in _under_way:
            training.stopping = True
        raise asyncio.CancelledError
