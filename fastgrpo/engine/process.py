"""Which process vLLM gets, and what it needs kept off this one, or put back after it: signals, output, globals."""

from __future__ import annotations

import glob
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fastgrpo.config import Config
from fastgrpo.errors import UserError


def own_process(config: Config) -> bool:
    """Whether vLLM gets a process of its own: not where ranks hold it together, who step in turn."""
    if config.engine.process == "auto":
        return torch.cuda.is_available() and config.engine.tensor_parallel == 1
    return config.engine.process == "own"


def check_kv_cache(config: Config) -> None:
    """Raise UserError where vLLM has no KV cache in `engine.kv_cache_dtype` on this machine's CPU."""
    if config.engine.kv_cache_dtype == "auto" or torch.cuda.is_available():
        return
    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        raise UserError("engine.kv_cache_dtype fp8 needs a GPU, or a CPU with AVX-512: set it to auto")


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Hold SIGINT back until the block ends (main thread only; elsewhere Python never raises it)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, Any]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received and callable(previous):
            previous(*received[0])


@contextmanager
def output_kept_back() -> Iterator[None]:
    """Keep what native code and loggers print at start off the terminal, unless the block fails by itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept, ExitStack() as stack:
        terminal = {}
        for descriptor in (1, 2):
            terminal[descriptor] = os.dup(descriptor)
            stack.callback(os.close, terminal[descriptor])
            os.dup2(kept.fileno(), descriptor)
        failed = True
        try:
            yield
            failed = False
        except KeyboardInterrupt:
            failed = False
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in terminal.items():
                os.dup2(original, descriptor)
            if failed:
                kept.seek(0)
                os.write(2, kept.read())


@contextmanager
def without_wildcards(path: str | os.PathLike[str]) -> Iterator[str]:
    """`path`, or a link to it where vLLM, which finds a folder's files by `glob`, would read its name as a pattern."""
    plain = os.fspath(path)
    if glob.escape(plain) == plain:
        yield plain
        return
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "model")
        os.symlink(os.path.abspath(plain), link)
        yield link


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The attribute `name` of `owner` is `value` until the block ends."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
