"""Decoding before training on one GPU that both use at once (`grpo.max_lag` 1).

A decoding step is a chain of a few hundred short kernels. Beside training's, which fill the GPU for most of a
millisecond each, every one of them waits for the end of one, whatever the priority of its stream, and the step takes
five times as long. So training stops between layers while a decoding step is on the GPU, and has it to itself while
Python prepares the next one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# About 20 ms, an L2 access each: a right of way and not a lock, so that whatever waits for the device comes through.
POLLS = 20_000


class RightOfWay:
    """A flag in the GPU's memory, written and read by kernels in the order of their streams."""

    def __init__(self, device: torch.device) -> None:
        self._claimed = torch.zeros(1, dtype=torch.int32, device=device)

    def claim(self) -> None:
        """From here on in the current stream, others give way."""
        self._claimed.fill_(1)

    def release(self) -> None:
        """To here."""
        self._claimed.zero_()

    def give_way(self) -> None:
        """Hold up the current stream while the way is claimed, 20 ms at most."""
        wait_while_set(self._claimed, POLLS)


def wait_while_set(flag: Tensor, polls: int) -> None:
    """Occupy the current stream until the int32 `flag` is 0, for at most `polls` looks at it."""
    _wait_kernel[(1,)](flag, polls, num_warps=1)


@triton.jit
def _wait_kernel(flag_ptr, polls):
    left = polls
    while left > 0:
        left = tl.where(tl.load(flag_ptr, volatile=True) != 0, left - 1, 0)
