"""Which of the two implementations runs where."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


def triton_runs(device: torch.device) -> bool:
    """Triton on a GPU, and on a CPU under its interpreter, for tests; otherwise vectorised torch."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9: H100, H200, GH200."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def launch(kernel: Any, programs: int, first: Tensor, *arguments: Any, **constants: Any) -> None:
    """So many programs of a Triton kernel, on the GPU of its `first` tensor, whichever is the current one."""
    with torch.cuda.device_of(first):
        kernel[(programs,)](first, *arguments, **constants)
