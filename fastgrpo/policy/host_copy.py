"""A tensor's copy in host memory."""

from __future__ import annotations

import torch
from torch import Tensor


def host_copy(tensor: Tensor) -> Tensor:
    """`tensor` in pageable host memory of its own, complete when this returns.

    Its pages are written before: a copy from a GPU into new ones takes each of them by itself under the driver's lock,
    an eighth of the speed on an H200's host, whichever threads copy (bench/results/lag.md). To pin as much takes as
    long, and torch keeps what it has pinned.
    """
    held = torch.empty(tensor.shape, dtype=tensor.dtype).zero_()
    return held.copy_(tensor)
