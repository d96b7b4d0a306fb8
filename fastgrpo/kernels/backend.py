"""Which of the two implementations runs where."""

from __future__ import annotations

import os

import torch


def triton_runs(device: torch.device) -> bool:
    """Triton on a GPU, and on a CPU under its interpreter, for tests; otherwise vectorised torch."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9: H100, H200, GH200."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
