"""Two ranks as processes of a test, forked from one server that has imported torch, transformers and vLLM once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch import multiprocessing


def processes() -> BaseContext:
    """Where to start processes: CUDA does not survive a fork, so on a GPU each imports for itself."""
    multiprocessing.set_forkserver_preload(["tests.helpers.rank_imports"])
    return multiprocessing.get_context(_method())


def run_two_ranks(main: Callable[..., None], *arguments: Any) -> None:
    """`main(rank, *arguments)` on two ranks, as torchrun starts them; raises what one of them raises."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes()
    multiprocessing.start_processes(_rank, args=(port, main, *arguments), nprocs=2, start_method=_method())


def _method() -> str:
    return "spawn" if torch.cuda.is_available() else "forkserver"


def _rank(rank: int, port: int, main: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main(rank, *arguments)
