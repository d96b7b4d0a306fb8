"""Two ranks as processes of a test, forked from one server that has imported torch, transformers and vLLM once."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.helpers.hosts import Host


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


def run_under_agent(main: Callable[..., None], *arguments: str) -> tuple[int | None, str]:
    """`main(*arguments)` on two ranks under torchrun's agent; its exit status and what they all print."""
    with tempfile.NamedTemporaryFile() as printed:
        agent = start_agent(main, *arguments, printed=printed.name)
        agent.join(240)
        return agent.exitcode, Path(printed.name).read_text()


def start_agent(
    main: Callable[..., None],
    *arguments: str,
    printed: str,
    ranks: int = 2,
    endpoint: str = "localhost:0",
    host: Host | None = None,
) -> Any:
    """The process of torchrun's agent for `main(*arguments)` on `ranks` ranks; what they print goes to a file.

    With a `host` it is there, one of two.
    """
    agent: Any = processes().Process(  # type: ignore[attr-defined]
        target=_agent, args=(main, arguments, printed, ranks, endpoint, host)
    )
    agent.start()
    return agent


def _agent(
    main: Callable[..., None], arguments: tuple[str, ...], printed: str, ranks: int, endpoint: str, host: Host | None
) -> None:
    with open(printed, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    if host is not None:
        host.enter()
    hosts = 1 if host is None else 2
    config = LaunchConfig(
        min_nodes=hosts,
        max_nodes=hosts,
        nproc_per_node=ranks,
        logs_specs=DefaultLogsSpecs(),
        run_id=str(os.getpid()) if host is None else endpoint,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=0,
        start_method="fork" if _method() == "forkserver" else "spawn",
    )
    record(elastic_launch(config, main))(*arguments)


def _method() -> str:
    return "spawn" if torch.cuda.is_available() else "forkserver"


def _rank(rank: int, port: int, main: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main(rank, *arguments)
