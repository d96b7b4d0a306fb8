"""Work behind the training, in a thread of its own: one piece after another. What fails on one rank fails on all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from torch.distributed import ProcessGroup

from fastgrpo.errors import CannotWrite
from fastgrpo.ranks.collectives import STAGE_WAIT_S, RankError, gather_all, group_of_all

PARTS = "the other ranks' part of the checkpoint"


class Behind:
    """Pieces of work that all ranks begin in the same order. They meet over connections of their own.

    Each failure is raised once, on every rank, by the first `check`, `wait` or `close` after it.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._group: ProcessGroup | None = None
        self._begun: list[Future[None]] = []

    def begin(self, work: Callable[[], None], *, at_once: bool = False) -> None:
        """Do `work`, which meets the other ranks in `together` alone, when what was begun before is done; collective.

        `at_once`: here and now, where nothing is under way.
        """
        if self._thread is None:
            self._thread, self._group = ThreadPoolExecutor(1, thread_name_prefix="behind"), group_of_all()
        if at_once:
            work()
        else:
            self._begun.append(self._thread.submit(work))

    def together(self, work: Callable[[], object]) -> None:
        """This rank's part of something, in a piece of work; what it raises on any rank it raises on all.

        That is its own error here; of another rank's the sentence, as `CannotWrite` or `RankError`.
        """
        try:
            work()
        except BaseException as error:
            with suppress(RankError):
                gather_all((isinstance(error, CannotWrite), str(error) or type(error).__name__), PARTS, self._group)
            raise
        for failed in gather_all(None, PARTS, self._group):
            if failed is not None:
                raise (CannotWrite if failed[0] else RankError)(failed[1])

    def check(self) -> None:
        """Raise what has failed, on every rank at once; collective."""
        while self._begun and all(gather_all(self._begun[0].done(), "the checkpoint of the other ranks")):
            self._end_first()

    def wait(self) -> None:
        """Wait until all work is done, and raise what failed."""
        while self._begun:
            self._end_first()

    def close(self) -> None:
        """`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown(wait=False)
                self._thread = None

    def _end_first(self) -> None:
        try:
            failed = self._begun[0].exception(STAGE_WAIT_S)
        except TimeoutError:
            self._begun.clear()
            raise CannotWrite(
                f"a checkpoint was not written in {STAGE_WAIT_S:.0f} s: look at its disk, then continue with --resume"
            ) from None
        del self._begun[0]
        if failed is not None:
            # What comes after it finds no checkpoint to change.
            self._begun.clear()
            raise failed
