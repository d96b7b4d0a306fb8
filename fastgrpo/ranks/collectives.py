"""The ranks that torchrun started, and waits on other ranks that end with a name instead of hanging."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from statistics import fmean
from typing import Any

import torch
from torch import distributed
from torch.distributed import DistError, PrefixStore, ProcessGroup, Store, TCPStore

from fastgrpo.errors import DISK_FULL, UserError, first_line, last_line, say_on_stderr, shown, this_rank
from fastgrpo.ranks.deadlines import Peers, listening, told_failure, within

# torch 2.13 renamed both and warns at the old names.
reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

# Within a step the ranks keep pace; between stages they wait for the slowest rollout, or for the first rank's traces.
STEP_WAIT_S = 600.0
STAGE_WAIT_S = 7200.0
# For all ranks to come: imports from a slow disk, and what a script does before it trains.
JOIN_WAIT_S = 600.0
# After which it is said for whom is waited, and after twice as long again.
SAY_S = 30.0
LOOK_S = 0.1
# For connections among ranks that have all come.
CONNECT_WAIT_S = 60.0
# How long a rank that fails before it has joined the others tries to tell them.
TELL_WAIT_S = 10.0

# The (rank, world) of each time that is over: what ranks told the store then is not taken for what they tell now.
_over: list[tuple[int, int]] = []
_SOURCE = re.compile(r"^\[\S+:\d+\] ")


class RankError(UserError):
    """Another rank has failed, did not come to a collective operation in time, or the connection to it broke."""


@contextmanager
def joined_ranks(tensor_parallel: int = 1) -> Iterator[tuple[int, int]]:
    """(rank, world size) for the length of the block; (0, 1) outside torchrun.

    Under torchrun: takes this rank's GPU and joins the process group: gloo for objects and CPU tensors, NCCL for a
    GPU's. Where one rank fails, hangs or vanishes, all ranks end (`fastgrpo.ranks.deadlines`).
    Raises UserError where the ranks, or those of this host, are not a multiple of `tensor_parallel`, a host's more than
    its GPUs, or do not come together.
    """
    check_world(tensor_parallel)
    if not _started_as_rank():
        yield 0, 1
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_own_gpu())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        store, rank, world = next(distributed.rendezvous("env://", timeout=timedelta(seconds=JOIN_WAIT_S)))
        # A connection of its own: the process group's is held by waits in other threads.
        own = _connected(JOIN_WAIT_S)
    except (ValueError, RuntimeError) as error:  # a variable that is missing or none, a port, a rank that is gone
        raise UserError(
            f"RANK and WORLD_SIZE make this process number {os.environ['RANK']} of {os.environ['WORLD_SIZE']} ranks, "
            f"which it cannot join: {first_line(error)}; start all of them by torchrun, with a --local-addr that the "
            "other hosts reach, or unset both for one alone"
        ) from error
    with listening(own, rank, world) as peers:
        store = _of_this_time(store)
        peers.names = _all_come(store, rank, world)
        hook = sys.excepthook
        _connect(backend, store, rank, world)
        yield rank, world
    distributed.destroy_process_group()
    # With the group torch wrote "[rank0]: " before each line of an uncaught error, once more for each group.
    sys.excepthook = hook
    _over.append((rank, world))


@contextmanager
def telling_ranks() -> Iterator[None]:
    """What a rank does before it joins the others: where it fails, they end by its error in place of their deadline."""
    try:
        yield
    except Exception as error:
        if _started_as_rank():
            with suppress(KeyError, ValueError, RuntimeError):
                rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
                peers = Peers(_connected(TELL_WAIT_S), rank, world)
                peers.names[rank] = this_rank()
                peers.tell(str(error) or type(error).__name__)
        raise


def _started_as_rank() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _connected(seconds: float) -> Store:
    """The store that all ranks share, over a connection of its own. Raises KeyError, ValueError, RuntimeError."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return _of_this_time(TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds)))


def _of_this_time(store: Store) -> Store:
    return PrefixStore(f"fastgrpo/{len(_over)}", store)


def _all_come(store: Store, rank: int, world: int) -> list[str]:
    """The ranks' names, once all have come. Which are missing is said meanwhile, by the first of those that have."""
    keys = [f"name/{number}" for number in range(world)]
    began, say_s = time.monotonic(), SAY_S
    try:
        store.set(keys[rank], this_rank())
        while not store.check(keys):  # no wait of the store's own, which no signal ends
            if (waited := time.monotonic() - began) > min(say_s, JOIN_WAIT_S):
                say_s *= 2
                missing = [number for number, key in enumerate(keys) if not store.check([key])]
                _tell_missing(missing, rank, world, waited)
            time.sleep(LOOK_S)
        return [store.get(key).decode() for key in keys]
    except DistError as error:
        raise RankError(told_failure() or f"the store of rank 0 is gone: {first_line(error)}") from error


def _tell_missing(missing: list[int], rank: int, world: int, waited: float) -> None:
    """Say who is missing, once for all that wait. Raises RankError where they were waited for long enough."""
    who, where = f"of {world} ranks {', '.join(map(str, missing))}", "what torchrun printed on their host"
    if missing and waited > JOIN_WAIT_S:
        raise RankError(told_failure() or f"{who} did not come within {JOIN_WAIT_S:.0f} s: look at {where}")
    if missing and missing[:rank] == list(range(rank)):
        say_on_stderr(f"{who} did not come yet, within {waited:.0f} s: they import still, or look at {where}")


def _connect(backend: str, store: Store, rank: int, world: int) -> None:
    """Make the process group of ranks that have all come."""
    store.set_timeout(timedelta(seconds=STAGE_WAIT_S))
    complaint = (
        "cannot connect to the other ranks: set GLOO_SOCKET_IFNAME on each host to the network interface by which the "
        "hosts reach each other"
    )
    try:
        with within(CONNECT_WAIT_S, complaint):
            distributed.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=STAGE_WAIT_S)
            )
    except RuntimeError as error:
        raise RankError(told_failure() or f"{complaint} ({first_line(error)})") from error


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
        # Nor is a full disk, which who writes tells.
        if DISK_FULL.search(str(error)):
            raise
        # Whose connection broke is not what happened there, and gloo says where in its sources, with advice.
        said = _SOURCE.sub("", last_line(error)).partition(". This is typically caused by")[0]
        raise RankError(told_failure() or f"waited for {what}: {said}") from error


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
    local, gpus = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= gpus:
        raise UserError(
            f"rank {os.environ['RANK']} has no GPU: it is number {local + 1} of this host, and {gpus} "
            f"{'is' if gpus == 1 else 'are'} visible; lower torchrun's --nproc-per-node, or set CUDA_VISIBLE_DEVICES"
        )
    return local


def check_world(tensor_parallel: int) -> None:
    """Raise UserError where torchrun's processes, in all or on this host, are not a multiple of `tensor_parallel`."""
    world = world_started()
    if world % tensor_parallel:
        raise UserError(
            f"engine.tensor_parallel {tensor_parallel} needs a multiple of {tensor_parallel} processes and there "
            f"{'is' if world == 1 else 'are'} {world}: set torchrun's --nproc-per-node, or tensor_parallel back to 1"
        )
    # Of one host all are here, whatever an earlier vLLM has written over the variable: it does so on a CPU.
    here = _number("LOCAL_WORLD_SIZE", world) if _number("GROUP_WORLD_SIZE", 1) > 1 else world
    if here % tensor_parallel:
        raise UserError(
            f"engine.tensor_parallel {tensor_parallel} needs ranks of one host and this one has {here}: make "
            f"torchrun's --nproc-per-node a multiple of {tensor_parallel} on each host, or lower tensor_parallel"
        )


def world_started() -> int:
    """The processes that torchrun has started, joined or not; 1 outside of it."""
    return _number("WORLD_SIZE", 1)


def _number(variable: str, default: int) -> int:
    """One that torchrun sets. Raises UserError where somebody else has set it to none."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(f"{variable} = {text!r} is no number: start all ranks by torchrun, or unset it")
    return int(text)


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


def group_of_all() -> ProcessGroup | None:
    """A gloo group of all ranks, for `gather_all` beside the collectives of other threads; None of one. Collective."""
    if rank_and_world()[1] == 1:
        return None
    with awaiting("the other ranks to connect once more", STAGE_WAIT_S):
        return distributed.new_group(backend="gloo", timeout=timedelta(seconds=STAGE_WAIT_S))


def gather_all(value: Any, what: str, group: ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank; `what` names it where a rank does not come.

    `group`: not by the ranks' own connections but those of `group_of_all`.
    Raises RankError where another rank has come with something else, as after an interrupt that found them apart.
    """
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    with awaiting(what, STAGE_WAIT_S):
        distributed.all_gather_object(values, (what, value), group)
    for rank, (other, _) in enumerate(values):
        if other != what:
            raise RankError(f"waited for {what}, but rank {rank} has come for {other}")
    return [value for _, value in values]


def refuse_differences(find: Callable[[], dict[str, Any]], fix: str) -> None:
    """Raise UserError, on every rank, where a rank finds other values than the first one; collective.

    One rank alone looks for nothing.
    """
    if rank_and_world()[1] == 1:
        return
    ranks = gather_all((this_rank(), find()), "what the other ranks have found")
    first_name, first = ranks[0]
    for name, other in ranks[1:]:
        for key in first | other:
            if (here := other.get(key)) != (there := first.get(key)):
                raise UserError(f"{key} is {shown(here)} on {name} and {shown(there)} on {first_name}: {fix}")


def gather_first(value: Any, what: str) -> list[Any]:
    """Every rank's `value`, in rank order, on the first rank, and none on the others; otherwise as `gather_all`."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] | None = [None] * world if rank == 0 else None
    with awaiting(what, STAGE_WAIT_S):
        distributed.gather_object(value, values)
    return values or []
