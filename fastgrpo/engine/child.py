"""The engine's own process, as the one that starts it sees it: started, ended, its last words."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from fastgrpo.errors import say_on_stderr

HOST = ("-m", "fastgrpo.engine.host")
LAST_WORDS_LINES = 120
# What a process of vLLM's own says of its failure: (Worker pid=1) ERROR 11-27 12:44:15 [file.py:9] ValueError: text
_WORKER_ERROR = re.compile(r"\bpid=\d+\).*\bERROR\b.*?\] ((?:\w+\.)*\w*(?:Error|Exception): .+)")
# What torchrun says to its ranks: the engine's process is none of them. Told that a store exists already, vLLM's worker
# would wait for one at a port where nobody is.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHELASTIC = "TORCHELASTIC_"


class Child:
    """The process, its end of the connection, and the file that all it prints goes to."""

    def __init__(self, timeout_s: float) -> None:
        """Its `connection` raises BlockingIOError where a message, sent or received, stops halfway for `timeout_s`."""
        ours, theirs = socket.socketpair()
        limit = struct.pack("ll", int(timeout_s), 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", *HOST, str(theirs.fileno())],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=self._printed,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._ended = False
        self.connection = Connection(ours.detach())

    def end(self, patience_s: float = 0.0) -> None:
        """The process and what it started are gone, killed after `patience_s`. Idempotent."""
        if self._ended:
            return
        self._ended = True
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    def said(self) -> str:
        """The last line that it printed, after a colon; nothing where there is none."""
        lines = self._lines()
        return f": {lines[-1].removeprefix('error: ')}" if lines else ""

    def worker_error(self) -> str:
        """The last error of vLLM's worker process, which vLLM does not pass on; empty where none was printed."""
        found = [match[1] for line in self._lines() if (match := _WORKER_ERROR.search(line))]
        return found[-1].strip() if found else ""

    def show(self) -> None:
        """Print its last lines, which say where it failed."""
        say_on_stderr("\n".join(self._lines()[-LAST_WORDS_LINES:]))

    def _lines(self) -> list[str]:
        # Where the process writes next is not moved.
        size = os.fstat(self._printed.fileno()).st_size
        return os.pread(self._printed.fileno(), size, 0).decode(errors="replace").rstrip().splitlines()


def environment() -> dict[str, str]:
    """This process's, with its modules and its GPU and without torchrun's ranks."""
    kept = {
        name: value for name, value in os.environ.items() if name not in TORCHRUN and not name.startswith(TORCHELASTIC)
    }
    kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    # The worker's process is started where this one's GPU is not in use yet, and shares no connection with it.
    kept["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if torch.cuda.is_available():
        index, visible = torch.cuda.current_device(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        kept["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index].strip() if visible else str(index)
    return kept
