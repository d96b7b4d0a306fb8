"""The ranks that torchrun started, and waits on other ranks that end with a name instead of hanging."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from datetime import timedelta
from statistics import fmean
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore

from fastgrpo.errors import UserError, first_line, last_line
from fastgrpo.ranks.deadlines import listening, within

# torch 2.13 renamed both and warns at the old names.
reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

# Within a step the ranks keep pace; between stages they wait for the slowest rollout, or for the first rank's traces.
STEP_WAIT_S = 600.0
STAGE_WAIT_S = 7200.0


class RankError(UserError):
    """Another rank did not come to a collective operation in time, or the connection to it broke."""


@contextmanager
def joined_ranks(tensor_parallel: int = 1) -> Iterator[tuple[int, int]]:
    """(rank, world size) for the length of the block; (0, 1) outside torchrun.

    Under torchrun: takes this rank's GPU and joins the process group: gloo for objects and CPU tensors, NCCL for a
    GPU's. Where one rank fails, hangs or vanishes, all ranks end (`fastgrpo.ranks.deadlines`).
    Raises UserError where the ranks are not a multiple of `tensor_parallel`, a machine's more than its GPUs, or do not
    come together.
    """
    check_world(tensor_parallel)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_own_gpu())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=STAGE_WAIT_S))
        # A connection of its own: the process group's is held by waits in other threads.
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    except (ValueError, RuntimeError) as error:  # a variable that is missing or none, a port, a rank that is gone
        raise UserError(
            f"RANK and WORLD_SIZE make this process number {os.environ['RANK']} of {os.environ['WORLD_SIZE']} ranks, "
            f"which it cannot join: {first_line(error)}; start all of them by torchrun, or unset both for one alone"
        ) from error
    rank, world = rank_and_world()
    with listening(PrefixStore("fastgrpo", store), rank, world):
        yield rank, world
    distributed.destroy_process_group()


@contextmanager
def awaiting(what: str, seconds: float = STEP_WAIT_S) -> Iterator[None]:
    """Name what the block waits for where a collective operation in it fails (RankError) or outlasts `seconds`.

    NCCL's waits block no Python: what needs their result must be in the block too.
    """
    try:
        with within(seconds, f"waited for {what} longer than {seconds:.0f} s"):
            yield
    except torch.OutOfMemoryError:
        # Not the other rank's doing, and whoever planned the memory has advice.
        raise
    except RuntimeError as error:
        raise RankError(f"waited for {what}: {last_line(error)}") from error


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of the ranks joined; (0, 1) where none were."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_first_rank() -> bool:
    """True on the rank that writes and speaks for all of them."""
    return rank_and_world()[0] == 0


def _own_gpu() -> int:
    """This rank's GPU among those of its machine that it may see."""
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise UserError(
            f"rank {os.environ['RANK']} has no GPU: it is number {local + 1} of this machine, and {gpus} "
            f"{'is' if gpus == 1 else 'are'} visible; lower torchrun's --nproc-per-node, or set CUDA_VISIBLE_DEVICES"
        )
    return local


def check_world(tensor_parallel: int) -> None:
    """Raise UserError where torchrun's processes are not a multiple of `tensor_parallel`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % tensor_parallel:
        raise UserError(
            f"engine.tensor_parallel {tensor_parallel} needs a multiple of {tensor_parallel} processes and there "
            f"{'is' if world == 1 else 'are'} {world}: set torchrun's --nproc-per-node, or tensor_parallel back to 1"
        )


def replica_leader(tensor_parallel: int) -> int:
    """The first of the `tensor_parallel` ranks in a row that hold this rank's replica of vLLM together."""
    return rank_and_world()[0] // tensor_parallel * tensor_parallel


def leads_replica(tensor_parallel: int) -> bool:
    """True on the rank that leads its replica."""
    return rank_and_world()[0] == replica_leader(tensor_parallel)


def of_replica(opened: AbstractAsyncContextManager[Any], tensor_parallel: int) -> AbstractAsyncContextManager[Any]:
    """`opened` on the rank that runs its replica's rollouts; None on the others, which need no environment."""
    return opened if leads_replica(tensor_parallel) else nullcontext()


def replica_share(tensor_parallel: int) -> slice:
    """The slice that this replica handles of a sequence dealt out in turn; empty except on its first rank."""
    rank, world = rank_and_world()
    first, step = rank // tensor_parallel, world // tensor_parallel
    return slice(first, None, step) if leads_replica(tensor_parallel) else slice(0, 0)


def over_ranks(metrics: dict[str, float], folds: Mapping[str, Callable[[list[float]], float]]) -> dict[str, float]:
    """Each metric folded over the ranks that have it, as `folds` says, else its mean; collective."""
    ranks = gather_all(metrics, "the metrics of the other ranks")
    names = dict.fromkeys(name for rank in ranks for name in rank)
    return {name: folds.get(name, fmean)([rank[name] for rank in ranks if name in rank]) for name in names}


def gather_all(value: Any, what: str) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank; `what` names it where a rank does not come.

    Raises RankError where another rank has come with something else, as after an interrupt that found them apart.
    """
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    with awaiting(what, STAGE_WAIT_S):
        distributed.all_gather_object(values, (what, value))
    for rank, (other, _) in enumerate(values):
        if other != what:
            raise RankError(f"waited for {what}, but rank {rank} has come for {other}")
    return [value for _, value in values]


def gather_first(value: Any, what: str) -> list[Any]:
    """Every rank's `value`, in rank order, on the first rank, and none on the others; otherwise as `gather_all`."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] | None = [None] * world if rank == 0 else None
    with awaiting(what, STAGE_WAIT_S):
        distributed.gather_object(value, values)
    return values or []
