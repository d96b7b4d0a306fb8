"""Processes beside the host: its end is theirs, and what asks it to end is not for them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

# A terminal, torchrun and Slurm send these to all that a program has started, which may still want its jobs' verdicts.
NOT_FOR_THEM = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1


def started(
    command: Sequence[str], stdin: int, stdout: int = subprocess.DEVNULL, stderr: int | None = None
) -> subprocess.Popen[bytes]:
    """The process of a command, in a process group of its own, with NOT_FOR_THEM blocked from its first instant,
    also in what it starts and becomes. Raises OSError."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_THEM)  # which a child inherits
    try:
        return subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=stderr, cwd="/", close_fds=True, process_group=0
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills what `started` returned with all of its group, whether it has ended itself or not, until somebody waits for
    it. bubblewrap's child waits for its parent's word, for ever once that is killed alone: it asks the kernel to end it
    with its parent only later."""
    if process.returncode is None:  # else the number may be another's
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def end_with(host: int) -> None:
    """From now on this process is killed once `host`, the process that started it, has ended, whatever it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != host:  # it has ended meanwhile
        os._exit(1)
