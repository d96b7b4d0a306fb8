"""What Triton kernels of recurrent layers are made of: products of bfloat16, rows of tokens, stacks of matrices.

Sums are fp32. What came in bfloat16 comes into a product as it is, for scales and decays of tokens are multiplied after
it, or into its other factor. A factor in fp32 is halves, two numbers of bfloat16 that together have 16 bits: high and
low, one after the other in memory. So the left factor of a product always comes from memory as it is, and some products
are of transposed matrices: on Hopper a left factor that was computed would be read from registers, and ptxas before
CUDA 13.3, which Triton 3.6 brings, reuses those before they are read (Triton's pull request 11781;
flash-linear-attention's issue 640).

Rows [B, L, H, .] come as (tensor, stride of a token): a launch takes heads that are one after another, those of a token
together, of rows that have more of them; states [B, H, K, V] likewise as (tensor, stride of a row).

Shapes: C tokens of a chunk, D or V columns, K or R rows of a matrix.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter multiplies no bfloat16.
FACTOR = tl.constexpr(tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16)
# As kernels take them: a tensor and the stride of a token, or of states the stride of a row.
Rows = tuple[Tensor, int]


def rows_of(given: Tensor) -> Rows:
    """`given` [B, L, H, ...], or a copy where a token's numbers are not together, or tokens not evenly apart."""
    row, token, *inner = given.stride()
    if inner != [*given.shape[3:], 1] or row != given.shape[1] * token:
        # Where rows have one token, what is contiguous may have any stride of tokens.
        return given.contiguous(), given[0, 0].numel()
    return given, token


def states_of(given: Tensor) -> Rows:
    """`given` [B, H, K, V] of heads that are one after another, with the stride of a row."""
    if given[0].is_contiguous():
        return given, given.stride(0)
    return given.contiguous(), given[0].numel()


@triton.jit
def halves_of(x):
    """(high, low) of fp32."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot(a, b, sums):
    """a b + sums."""
    return tl.dot(a.to(FACTOR), b.to(FACTOR), sums)


@triton.jit
def dot_halves(a, b, sums):
    """a b + sums with b in halves."""
    return dot(a, b[0], dot(a, b[1], sums))


@triton.jit
def dot_both(a, b, sums):
    """a b + sums with both in halves; what both low ones would add is below the 16 bits."""
    return dot(a[0], b[0], dot(a[1], b[0], dot(a[0], b[1], sums)))


@triton.jit
def inside(at_D, width):
    """Which rows or columns of a block are there: all, of a width that the kernel is compiled for and blocks fill."""
    if isinstance(width, int) and tl.constexpr(width) % at_D.shape[0] == 0:
        inside_D = tl.full(at_D.shape, True, tl.int1)
    else:
        inside_D = at_D < width
    return inside_D


@triton.jit
def of_rows(rows, x, chunk, length, heads, width, column_D, C: tl.constexpr):
    """(pointers, mask) of a head's tokens in a chunk and some of their columns, in rows [B, L, H, width]."""
    token_C = chunk * C + tl.arange(0, C)
    row_C = (x // heads).to(tl.int64) * length + token_C
    offset_CD = (row_C * rows[1])[:, None] + (x % heads * width + column_D)[None, :]
    return rows[0] + offset_CD, (token_C < length)[:, None] & inside(column_D, width)[None, :]


@triton.jit
def load_rows(rows, x, chunk, length, heads, width, column_D, C: tl.constexpr):
    at_CD, inside_CD = of_rows(rows, x, chunk, length, heads, width, column_D, C)
    return tl.load(at_CD, mask=inside_CD, other=0.0)


@triton.jit
def of_tokens(rows, x, chunk, length, heads, C: tl.constexpr):
    """(pointers, mask) of a number for each token of a head in a chunk, in rows [B, L, H]."""
    token_C = chunk * C + tl.arange(0, C)
    row_C = (x // heads).to(tl.int64) * length + token_C
    return rows[0] + row_C * rows[1] + x % heads, token_C < length


@triton.jit
def load_tokens(rows, x, chunk, length, heads, C: tl.constexpr):
    at_C, inside_C = of_tokens(rows, x, chunk, length, heads, C)
    return tl.load(at_C, mask=inside_C, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(rows, x, chunk, length, heads, number_C, C: tl.constexpr):
    at_C, inside_C = of_tokens(rows, x, chunk, length, heads, C)
    tl.store(at_C, number_C.to(rows[0].dtype.element_ty), mask=inside_C)


@triton.jit
def of_stack(ptr, number, height, width, row_R, column_D):
    """(pointers, mask) of some rows and columns of matrix `number` of a stack [., height, width]."""
    offset_RD = row_R[:, None] * width + column_D[None, :]
    inside_RD = inside(row_R, height)[:, None] & inside(column_D, width)[None, :]
    return ptr + number.to(tl.int64) * height * width + offset_RD, inside_RD


@triton.jit
def load_stack(ptr, number, height, width, row_R, column_D):
    at_RD, inside_RD = of_stack(ptr, number, height, width, row_R, column_D)
    return tl.load(at_RD, mask=inside_RD, other=0.0)


@triton.jit
def of_states(states, x, heads, keys, values, row_K, column_V):
    """(pointers, mask) of some columns of a head's state, in states [B, H, K, V]."""
    offset_KV = row_K[:, None] * values + column_V[None, :]
    inside_KV = inside(row_K, keys)[:, None] & inside(column_V, values)[None, :]
    first = (x // heads).to(tl.int64) * states[1] + x % heads * keys * values
    return states[0] + first + offset_KV, inside_KV


@triton.jit
def load_halves(ptr, number, height, width, row_R, column_D):
    """(high, low) of matrix `number` of a stack [., 2, height, width]."""
    high_RD = load_stack(ptr, 2 * number, height, width, row_R, column_D)
    return high_RD, load_stack(ptr, 2 * number + 1, height, width, row_R, column_D)


@triton.jit
def store_halves(ptr, number, height, width, row_R, column_D, halves):
    at_RD, inside_RD = of_stack(ptr, 2 * number, height, width, row_R, column_D)
    tl.store(at_RD, halves[0], mask=inside_RD)
    at_RD, inside_RD = of_stack(ptr, 2 * number + 1, height, width, row_R, column_D)
    tl.store(at_RD, halves[1], mask=inside_RD)


@triton.jit
def transposed(halves):
    return tl.trans(halves[0]), tl.trans(halves[1])


@triton.jit
def faded(difference_CC, inside_CC):
    """exp of what is inside, else 0: masked before exp, which would overflow."""
    return tl.exp(tl.where(inside_CC, difference_CC.to(tl.float32), -float("inf")))
