"""The ranks that torchrun started, and waits on other ranks that end with a name instead of hanging."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from torch import distributed

from fastgrpo.errors import UserError

# torch 2.13 renamed both and warns at the old names.
reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


class RankError(UserError):
    """Another rank did not come to a collective operation in time, or the connection to it broke."""


def join_ranks(timeout_s: float = 600.0) -> tuple[int, int]:
    """(rank, world size); (0, 1) outside torchrun.

    Under torchrun: takes this rank's GPU and joins the process group, NCCL with GPUs and gloo without. No wait for
    another rank lasts longer than `timeout_s`.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return distributed.get_rank(), distributed.get_world_size()


@contextmanager
def awaiting(what: str) -> Iterator[None]:
    """Name what the block waits for where a collective operation in it fails (RankError)."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RankError(f"rank {distributed.get_rank()} waited for {what}: {reason}") from error


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of the ranks joined; (0, 1) where none were."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def over_ranks(
    metrics: dict[str, float], folds: Mapping[str, Callable[[list[float]], float]] = MappingProxyType({})
) -> dict[str, float]:
    """Each metric folded over the ranks as `folds` says, else its mean; collective."""
    ranks = gather_all(metrics, "the metrics of the other ranks")
    return {name: folds.get(name, fmean)([rank[name] for rank in ranks]) for name in metrics}


def gather_all(value: Any, what: str) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank; `what` names it where a rank does not come."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    with awaiting(what):
        distributed.all_gather_object(values, value)
    return values
