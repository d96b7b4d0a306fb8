"""How a program runs and ends: its coroutine, its exit status after an error, a signal or a reader that is gone.

Needs the standard library alone until a coroutine is run: the doctor runs before anything is installed.
"""

from __future__ import annotations

import asyncio
import errno
import select
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from fastgrpo.errors import DISK_ERRORS, USER_ERROR, UserError, say_error, say_on_stderr, show_any_text, without_reader
from fastgrpo.left_behind import bound_exit, going_on, leaving_behind
from fastgrpo.signals import reacting, signals_handled, stopped_by

Value = TypeVar("Value")


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's `main` and exit: its own code (None = 0), 2 after `UserError`, 128 + the signal that stopped it.

    That is 130 after Ctrl-C, 143 after SIGTERM (see `fastgrpo.signals`), and 141 where `| head` has read enough.
    """
    show_any_text()
    try:
        with signals_handled():
            code = _or_interrupted(main)
    except UserError as error:
        say_error(str(error))
        code = USER_ERROR
    except BrokenPipeError:
        if not _reader_gone():
            raise
        code = 128 + signal.SIGPIPE
        without_reader()
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fix = "shorten it" if error.errno == errno.ENAMETOOLONG else "check the disk's space and the owner"
        say_error(f"cannot use {str(error.filename or 'a file')[:300]}: {error.strerror}; {fix}")
        code = USER_ERROR
    bound_exit(code)
    sys.exit(code)


def _or_interrupted(main: Callable[[], int | None]) -> int:
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        say_on_stderr("interrupted")
        code = 128 + (stopped_by() or signal.SIGINT)
    return code


def run_async(main: Callable[[], Coroutine[Any, Any, Value]]) -> Value:
    """What a program's coroutine returns, run under uvloop; a signal cancels it and becomes KeyboardInterrupt.

    What somebody's code leaves running is waited for a moment, named and left behind; where it lets nothing else run,
    its place is told (`fastgrpo.left_behind`).
    """
    from uvloop import new_event_loop

    async def stoppable() -> Value:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None, "a coroutine runs in a task"

        def stop() -> None:
            loop.call_soon_threadsafe(task.cancel)
            say_on_stderr("stopping in order; a second signal ends at once")

        with reacting(stop):
            async with leaving_behind():
                return await main()

    with going_on(), asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            return runner.run(stoppable())
        except asyncio.CancelledError:
            if stopped_by() is None:
                raise
            raise KeyboardInterrupt from None


def _reader_gone() -> bool:
    """True where standard output is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
