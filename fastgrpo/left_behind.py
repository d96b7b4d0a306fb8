"""The end of a program in which somebody's code still runs: it has a moment, is named, and is left behind.

Where that code lets no other run, its place is told.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

from fastgrpo.errors import say_on_stderr

# For what is cancelled at the end of the event loop, and for calls in its threads: an answer on its way is there.
LOOP_S = 10.0
# For threads that a process waits for at its exit: what one still saves may take a minute, a hang takes for ever.
EXIT_S = 60.0
LOOK_S = 0.1
# For one call that keeps Python's lock: loading a library from a slow disk may take minutes.
STILL_S = 600.0
BEAT_S = 1.0


@asynccontextmanager
async def leaving_behind() -> AsyncIterator[None]:
    """A block after which the event loop can be closed at once, whatever its tasks and its threads' calls do."""
    loop, threads = asyncio.get_running_loop(), ThreadPoolExecutor(thread_name_prefix="asyncio")
    loop.set_default_executor(threads)
    try:
        yield
    finally:
        # What closes the loop waits for its executor, in Python 3.11 without a deadline.
        loop.set_default_executor(ThreadPoolExecutor(1))
        await _end_tasks()
        ending = threading.Thread(target=threads.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        ending.start()
        ending.join(LOOP_S)
        if ending.is_alive():
            say("a call in a thread (asyncio.to_thread, or a loop's executor)")


async def _end_tasks() -> None:
    """Cancel all other tasks; those that go on are the loop's no more."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    left = (await asyncio.wait(tasks, timeout=LOOP_S))[1] if tasks else set()
    for task in left:
        # What closes the loop waits for every task that it knows.
        asyncio._unregister_task(task)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    if left:
        say(*(task.get_name() for task in left))


@contextmanager
def going_on() -> Iterator[None]:
    """A block that tells the place of each thread, again and again, where no Python goes on in it for `STILL_S`.

    As where a regular expression backtracks without end: then neither a deadline nor a signal is heard. The process
    is not ended, since one that was stopped for so long (SIGSTOP, a frozen container) looks the same as it goes on.
    """
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            # Its thread needs no lock of Python's.
            faulthandler.dump_traceback_later(STILL_S, repeat=True, file=2)
            over.wait(BEAT_S)
        faulthandler.cancel_dump_traceback_later()

    beating = threading.Thread(target=beat, name="beat", daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()


def bound_exit(code: int) -> None:
    """End the process with `code` where its exit waits for threads longer than `EXIT_S`."""
    threading.Thread(target=_watch_exit, args=(code,), name="exit", daemon=True).start()


def _watch_exit(code: int) -> None:
    main, waited = threading.main_thread(), 0.0
    while waited < EXIT_S:
        time.sleep(LOOK_S)
        waited = waited + LOOK_S if _exiting(main) else 0.0
    if left := [each.name for each in threading.enumerate() if not each.daemon and each is not main]:
        say(*(f"the thread {name}" for name in left))
        try:
            sys.stdout.flush()
        finally:  # also where nobody reads it any more
            os._exit(code)


def _exiting(main: threading.Thread) -> bool:
    """Whether the main thread has done all its own, and only waits for others in a function of `threading`."""
    frame = sys._current_frames().get(main.ident or 0)
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame is None or frame.f_globals.get("__name__") == threading.__name__


def say(*names: str) -> None:
    """Name on standard error what is left behind, with how many there are of each."""
    counted: Iterable[tuple[str, int]] = Counter(names).items()
    listed = ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in counted)
    say_on_stderr(f"left behind, for it goes on though all else has ended: {listed}")
