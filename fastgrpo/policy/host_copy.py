"""A tensor's copy in host memory."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def host_copy(tensor: Tensor) -> Tensor:
    """`tensor` in pageable host memory of its own, complete when this returns, which the system has back once it is
    freed: of tensors below 32 MiB malloc keeps it, apart for each thread that asked for some.

    Its pages are written before: a copy from a GPU into new ones takes each of them by itself under the driver's lock,
    an eighth of the speed on an H200's host, whichever threads copy (bench/results/lag.md). To pin as much takes as
    long, and torch keeps what it has pinned.
    """
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = mmap.mmap(-1, tensor.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).zero_().copy_(tensor)
