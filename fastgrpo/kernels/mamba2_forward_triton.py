"""Mamba-2 of bfloat16 forward in Triton, in three launches: steps, states from chunk to chunk, outputs.

`tiles_triton` says what halves are, which factors a product may have, and how rows and states come. Only the
states' kernel walks over chunks, a program for each head and block of its states; blocks are independent of each other,
for no row or column of a state reads another one. So states and values may be of any width.

Shapes: X chunks of all heads of all rows, C tokens of a chunk, N rows of a state, P columns of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.chunks import CHUNK, chunks_of
from fastgrpo.kernels.tiles_triton import (
    Rows,
    dot,
    dot_halves,
    faded,
    halves_of,
    load_halves,
    load_rows,
    of_rows,
    of_states,
    of_tokens,
    rows_of,
    states_of,
    store_halves,
)

# What changes from batch to batch compiles nothing again.
VARIED = ("length", "chunks")
UNALIGNED = ("dt", "d_dt")


class Block(NamedTuple):
    """Rows of a state and columns of values that a program takes at once, its warps, the stages of its loop's loads."""

    rows: int
    columns: int
    warps: int
    stages: int


# Chosen by registers and shared memory.
STEPS = Block(rows=16, columns=16, warps=1, stages=1)
STATES = Block(rows=64, columns=64, warps=4, stages=3)
OUTPUTS = Block(rows=128, columns=64, warps=4, stages=2)


class Sizes(NamedTuple):
    """B, L, H, G, N and P of rows that are computed together."""

    rows: int
    length: int
    heads: int
    groups: int
    state: int
    values: int

    @classmethod
    def of(cls, x: Tensor, b: Tensor) -> Sizes:
        """Of values [B, L, H, P] and b [B, L, G, N]."""
        rows, length, heads, values = x.shape
        groups, state = b.shape[2:]
        return cls(rows, length, heads, groups, state, values)

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return chunks_of(self.length)

    @property
    def places(self) -> int:
        """Chunks of all heads of all rows, a head's one after another."""
        return self.rows * self.heads * self.chunks

    def of_states(self, block: Block) -> int:
        """Blocks of a state's rows."""
        return triton.cdiv(self.state, block.rows)

    def of_values(self, block: Block) -> int:
        """Blocks of a value's columns."""
        return triton.cdiv(self.values, block.columns)

    def halves(self, like: Tensor, height: int) -> Tensor:
        """A matrix in halves for each chunk, [X, 2, height, P]."""
        return like.new_empty(self.places, 2, height, self.values, dtype=torch.bfloat16)


class Steps(NamedTuple):
    """What becomes of dt: what a launch takes of it."""

    dt: Rows
    dt_bias: Tensor
    a: Tensor
    low: float
    high: float


def launch_for(kernel: Any, block: Block, sizes: Sizes, programs: int, *tensors: Any) -> None:
    """So many programs of a kernel, which takes all sizes after its tensors."""
    rows, columns = (
        min(taken, max(triton.next_power_of_2(all_), 16))
        for taken, all_ in ((block.rows, sizes.state), (block.columns, sizes.values))
    )
    launch(
        kernel, programs, *tensors, sizes.length, sizes.heads, sizes.groups, sizes.chunks,
        state=sizes.state, values=sizes.values, C=CHUNK, N=rows, P=columns,
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip


@triton.jit
def of_head(x, heads, groups):
    """The group of head x of all rows, counted through all rows."""
    return x // heads * groups + x % heads // (heads // groups)


@triton.jit
def block_of_state(state: tl.constexpr, values: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """(head of this program, its block of the head's state, that block's rows [N] and columns [P])."""
    of_values, of_states_ = tl.cdiv(values, P), tl.cdiv(state, N)
    block, x = tl.program_id(0) % (of_values * of_states_), tl.program_id(0) // (of_values * of_states_)
    column_P, row_N = block % of_values * P + tl.arange(0, P), block // of_values * N + tl.arange(0, N)
    return x, block, row_N, column_P


@triton.jit
def smooth(raw_C):
    """softplus, log(1 + exp(raw)), which below is exp(raw): 1 + exp(raw) alone would have lost it."""
    small_C = tl.exp(-tl.abs(raw_C))
    sum_C = 1.0 + small_C
    log_C = tl.where(sum_C == 1.0, small_C, tl.log(sum_C) * (small_C / tl.where(sum_C == 1.0, 1.0, sum_C - 1.0)))
    return tl.maximum(raw_C, 0.0) + log_C


@triton.jit
def load_dt(dt, x, chunk, length, heads, C: tl.constexpr):
    """dt of a head's tokens in a chunk, -inf after the last."""
    at_C, inside_C = of_tokens(dt, x, chunk, length, heads, C)
    return tl.load(at_C, mask=inside_C, other=-float("inf")).to(tl.float32)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _steps_kernel(
    step_ptr, sum_ptr, dt, bias_ptr, a_ptr, low, high,
    length, heads, groups, chunks,
    state: tl.constexpr, values: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Each token's step, 0 after the last one and where dt is -inf, and G."""
    place, i_C = tl.program_id(0), tl.arange(0, C)
    x, chunk, at_C = place // chunks, place % chunks, place.to(tl.int64) * C + i_C
    dt_C = load_dt(dt, x, chunk, length, heads, C)
    raw_C = dt_C + tl.load(bias_ptr + x % heads).to(tl.float32)
    step_C = tl.minimum(tl.maximum(smooth(raw_C), low), high)
    step_C = tl.where(dt_C == -float("inf"), 0.0, step_C)
    tl.store(step_ptr + at_C, step_C)
    # In fp32 a difference of two long sums, where states fade fast, keeps few digits.
    g_C = step_C * tl.load(a_ptr + x % heads).to(tl.float32)
    tl.store(sum_ptr + at_C, tl.cumsum(g_C.to(tl.float64), axis=0))


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _states_kernel(
    step_ptr, sum_ptr, x_rows, b, initial_state, states_ptr, final_state,
    length, heads, groups, chunks,
    state: tl.constexpr, values: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, in halves, and after the last one."""
    x, _, row_N, column_P = block_of_state(state, values, N, P)
    i_C = tl.arange(0, C)
    from_NP, inside_NP = of_states(initial_state, x, heads, state, values, row_N, column_P)
    state_NP = tl.load(from_NP, mask=inside_NP, other=0.0)
    for chunk in range(chunks):
        place = x * chunks + chunk
        first = place.to(tl.int64) * C
        sum_C, last = tl.load(sum_ptr + first + i_C), tl.load(sum_ptr + first + C - 1)
        step_C = tl.load(step_ptr + first + i_C)
        b_CN = load_rows(b, of_head(x, heads, groups), chunk, length, groups, state, row_N, C)
        x_CP = load_rows(x_rows, x, chunk, length, heads, values, column_P, C)
        store_halves(states_ptr, place, state, values, row_N, column_P, halves_of(state_NP))
        write_C = tl.exp((last - sum_C).to(tl.float32)) * step_C
        state_NP *= tl.exp(last.to(tl.float32))
        state_NP = dot_halves(tl.trans(b_CN), halves_of(x_CP.to(tl.float32) * write_C[:, None]), state_NP)
    to_NP, inside_NP = of_states(final_state, x, heads, state, values, row_N, column_P)
    tl.store(to_NP, state_NP, mask=inside_NP)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _outputs_kernel(
    step_ptr, sum_ptr, x_rows, b, c, d_ptr, states_ptr, output,
    length, heads, groups, chunks,
    state: tl.constexpr, values: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What each token reads of the state before its chunk, and of what was written since."""
    of_values, i_C = tl.cdiv(values, P), tl.arange(0, C)
    place, column_P = tl.program_id(0) // of_values, tl.program_id(0) % of_values * P + tl.arange(0, P)
    x, chunk, at_C = place // chunks, place % chunks, place.to(tl.int64) * C + i_C
    group = of_head(x, heads, groups)
    # [j, i] is what token i's output takes of token j.
    taken_CC, output_PC = tl.zeros([C, C], tl.float32), tl.zeros([P, C], tl.float32)
    for first in tl.static_range(0, state, N):
        row_N = first + tl.arange(0, N)
        b_CN = load_rows(b, group, chunk, length, groups, state, row_N, C)
        c_NC = tl.trans(load_rows(c, group, chunk, length, groups, state, row_N, C))
        before = load_halves(states_ptr, place, state, values, row_N, column_P)
        taken_CC = dot(b_CN, c_NC, taken_CC)
        output_PC = dot(tl.trans(before[0]), c_NC, dot(tl.trans(before[1]), c_NC, output_PC))
    sum_C = tl.load(sum_ptr + at_C)
    taken_CC *= faded(sum_C[None, :] - sum_C[:, None], i_C[:, None] <= i_C[None, :]) * tl.load(step_ptr + at_C)[:, None]
    output_PC *= tl.exp(sum_C.to(tl.float32))[None, :]
    x_CP = load_rows(x_rows, x, chunk, length, heads, values, column_P, C)
    output_PC = dot_halves(tl.trans(x_CP), halves_of(taken_CC), output_PC)
    output_CP = tl.trans(output_PC) + x_CP.to(tl.float32) * tl.load(d_ptr + x % heads).to(tl.float32)
    to_CP, inside_CP = of_rows(output, x, chunk, length, heads, values, column_P, C)
    tl.store(to_CP, output_CP, mask=inside_CP)


def steps_and_states(
    sizes: Sizes, steps: Steps, x: Rows, b: Rows, initial_state: Tensor, final_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The step and G of each token, [X, C], and the state before each chunk, in halves; writes that after the last."""
    like = final_state
    step_XC, sum_XC = (like.new_empty(sizes.places, CHUNK, dtype=dtype) for dtype in (torch.float32, torch.float64))
    launch_for(_steps_kernel, STEPS, sizes, sizes.places, step_XC, sum_XC, *steps)
    states_X2NP = sizes.halves(like, sizes.state)
    launch_for(
        _states_kernel, STATES, sizes, sizes.rows * sizes.heads * sizes.of_states(STATES) * sizes.of_values(STATES),
        step_XC, sum_XC, x, b, states_of(initial_state), states_X2NP, states_of(final_state),
    )  # fmt: skip
    return step_XC, sum_XC, states_X2NP


def forward(
    inputs: Sequence[Tensor], dt_limit: tuple[float, float], output: Tensor, initial_state: Tensor, final_state: Tensor
) -> None:
    """Writes the results of `mamba2`, of which `inputs` are the first seven arguments: x, b and c bfloat16."""
    x, dt, a, b, c, d, dt_bias = inputs
    sizes, steps = Sizes.of(x, b), Steps(rows_of(dt), dt_bias, a, *map(float, dt_limit))
    x_rows, b_rows, c_rows = (rows_of(given) for given in (x, b, c))
    step_XC, sum_XC, states_X2NP = steps_and_states(sizes, steps, x_rows, b_rows, initial_state, final_state)
    launch_for(
        _outputs_kernel, OUTPUTS, sizes, sizes.places * sizes.of_values(OUTPUTS),
        step_XC, sum_XC, x_rows, b_rows, c_rows, d, states_X2NP, (output, output.stride(1)),
    )  # fmt: skip
