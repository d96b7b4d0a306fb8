"""The gated delta rule of bfloat16 in Triton: `delta_rule_torch` in four launches forward and four backward.

Forward: what is within a chunk (scales, sums of g, T^-1); its inverse; the states, from chunk to chunk; the outputs.
Backward: what is within a chunk again; the gradients of the states, from the last chunk to the first; those of what
reads states and chunks; those of what writes. Only the states' two kernels walk over chunks, a program for each head
and block of its values' columns; the others have programs for each chunk. `tiles_triton` has what they are made of.

Shapes: X chunks of all heads of all rows, C tokens of a chunk, K columns of a key, V of a block of values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.chunks import CHUNK, chunks_of
from fastgrpo.kernels.tiles_triton import Rows

# What changes from batch to batch, or from a launch's heads to the next ones, compiles nothing again.
VARIED = ("length", "heads", "chunks")
UNALIGNED = ("g", "beta", "d_g", "d_beta")


class Block(NamedTuple):
    """Columns of a value that a program takes at once, its warps, and the stages of its loop's loads."""

    values: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """B, L, H, K and V of the heads that are computed together."""

    rows: int
    length: int
    heads: int
    keys: int
    values: int

    @classmethod
    def of(cls, query: Tensor, value: Tensor) -> Sizes:
        """Of queries [B, L, H, K] and values [B, L, H, V]."""
        rows, length, heads, keys = query.shape
        return cls(rows, length, heads, keys, value.shape[-1])

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return chunks_of(self.length)

    @property
    def places(self) -> int:
        """Chunks of all heads of all rows, a head's one after another."""
        return self.rows * self.heads * self.chunks

    def blocks(self, block: Block) -> int:
        """Blocks of a value's columns."""
        return triton.cdiv(self.values, block.values)

    def tokens(self, like: Tensor, *width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """So many numbers for each token, [X, C, width]."""
        return like.new_empty(self.places, CHUNK, *width, dtype=dtype)

    def halves(self, like: Tensor, height: int, width: int) -> Tensor:
        """A matrix in halves for each chunk, [X, 2, height, width]."""
        return like.new_empty(self.places, 2, height, width, dtype=torch.bfloat16)


def launch_for(kernel: Any, block: Block, sizes: Sizes, programs: int, first: Tensor, *others: Tensor | Rows) -> None:
    """So many programs of a kernel, which takes all sizes after its tensors."""
    launch(
        kernel, programs, first, *others, sizes.length, sizes.heads, sizes.keys, sizes.values, sizes.chunks,
        C=CHUNK, K=max(triton.next_power_of_2(sizes.keys), 16), V=block.values,
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
