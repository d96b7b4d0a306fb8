"""How a program ends: its exit status, after an error, a signal or a reader that is gone. Standard library alone."""

from __future__ import annotations

import errno
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from fastgrpo.errors import DISK_ERRORS, USER_ERROR, UserError, say_error, say_on_stderr, show_any_text, without_reader
from fastgrpo.left_behind import bound_exit
from fastgrpo.signals import signals_handled, stopped_by


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's `main` and exit: its own code (None = 0), 2 after `UserError`, 128 + the signal that stopped it.

    That is 130 after Ctrl-C, 143 after SIGTERM (see `fastgrpo.signals`), and 141 where `| head` has read enough.
    """
    show_any_text()
    try:
        with signals_handled():
            code = main() or 0
            sys.stdout.flush()
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
    except KeyboardInterrupt:
        say_on_stderr("interrupted")
        code = 128 + (stopped_by() or signal.SIGINT)
    bound_exit(code)
    sys.exit(code)


def _reader_gone() -> bool:
    """True where standard output is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
