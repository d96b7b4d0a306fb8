"""Mamba-2 of bfloat16 backward in Triton, in five launches; `mamba2_forward_triton` says how.

Steps and states come again; then the states' gradients, from the last chunk to the first; the gradients of what each
head has to itself; and those of b and c, summed over the heads of a group. Of these a program takes some, and what
programs leave is added up in order, so that the result is the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.chunks import CHUNK
from fastgrpo.kernels.mamba2_forward_triton import (
    UNALIGNED,
    VARIED,
    Block,
    Sizes,
    Steps,
    block_of_state,
    launch_for,
    load_dt,
    of_head,
    smooth,
    steps_and_states,
)
from fastgrpo.kernels.tiles_triton import (
    dot,
    dot_both,
    dot_halves,
    faded,
    halves_of,
    load_halves,
    load_rows,
    of_rows,
    of_states,
    rows_of,
    states_of,
    store_halves,
    store_tokens,
    transposed,
)

# Chosen by registers and shared memory.
D_STATES = Block(rows=128, columns=32, warps=4, stages=2)
D_VALUES = Block(rows=128, columns=64, warps=4, stages=2)
D_STEPS = Block(rows=128, columns=64, warps=4, stages=2)
D_GROUPS = Block(rows=64, columns=64, warps=4, stages=2)
# Heads of a group that a program of the last kernel takes.
SUMMED = tl.constexpr(8)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _d_states_kernel(
    sum_ptr, c, d_output, d_final, d_halves_ptr, d_states_ptr, d_initial,
    length, heads, groups, chunks,
    state: tl.constexpr, values: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk, in halves, and of the first one; and the given one in halves."""
    x, block, row_N, column_P = block_of_state(state, values, N, P)
    i_C = tl.arange(0, C)
    from_NP, inside_NP = of_states(d_final, x, heads, state, values, row_N, column_P)
    d_state_NP = tl.load(from_NP, mask=inside_NP, other=0.0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        place = x * chunks + chunk
        first = place.to(tl.int64) * C
        sum_C, last = tl.load(sum_ptr + first + i_C), tl.load(sum_ptr + first + C - 1)
        c_CN = load_rows(c, of_head(x, heads, groups), chunk, length, groups, state, row_N, C)
        d_output_CP = load_rows(d_output, x, chunk, length, heads, values, column_P, C)
        store_halves(d_states_ptr, place, state, values, row_N, column_P, halves_of(d_state_NP))
        if block < tl.cdiv(values, P):
            store_halves(d_halves_ptr, place, C, values, i_C, column_P, halves_of(d_output_CP))
        d_state_NP *= tl.exp(last.to(tl.float32))
        d_read_CP = d_output_CP * tl.exp(sum_C.to(tl.float32))[:, None]
        d_state_NP = dot_halves(tl.trans(c_CN), halves_of(d_read_CP), d_state_NP)
    to_NP, inside_NP = of_states(d_initial, x, heads, state, values, row_N, column_P)
    tl.store(to_NP, d_state_NP, mask=inside_NP)


@triton.jit
def _taken(b, c, group, chunk, length, groups, state: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """Of a chunk what token i's output takes of token j, [j, i], before it fades and but for j's step."""
    taken_CC = tl.zeros([C, C], tl.float32)
    for first in tl.static_range(0, state, N):
        row_N = first + tl.arange(0, N)
        b_CN = load_rows(b, group, chunk, length, groups, state, row_N, C)
        c_CN = load_rows(c, group, chunk, length, groups, state, row_N, C)
        taken_CC = dot(b_CN, tl.trans(c_CN), taken_CC)
    return taken_CC


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _d_values_kernel(
    step_ptr, sum_ptr, x_rows, b, c, d_ptr, d_halves_ptr, states_ptr, d_states_ptr,
    d_x, reads_ptr, writes_ptr, kept_ptr,
    length, heads, groups, chunks,
    state: tl.constexpr, values: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of x; and what fades, times its gradient: what each token reads of its chunk's first state and
    writes into its last one, but for its step, and what the first keeps until the last.
    """
    place, i_C = tl.program_id(0), tl.arange(0, C)
    x, chunk, at_C = place // chunks, place % chunks, place.to(tl.int64) * C + i_C
    group = of_head(x, heads, groups)
    sum_C, last = tl.load(sum_ptr + at_C), tl.load(sum_ptr + place.to(tl.int64) * C + C - 1)
    step_C, d = tl.load(step_ptr + at_C), tl.load(d_ptr + x % heads).to(tl.float32)
    taken_CC = _taken(b, c, group, chunk, length, groups, state, C, N)
    taken_CC *= faded(sum_C[None, :] - sum_C[:, None], i_C[:, None] <= i_C[None, :])
    taking = transposed(halves_of(taken_CC))
    since_C, until_C = tl.exp(sum_C.to(tl.float32)), tl.exp((last - sum_C).to(tl.float32))
    reads_C, writes_C, kept_P = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([P], tl.float32)
    for first in range(0, values, P):
        column_P = first + tl.arange(0, P)
        read_PC, d_written_PC = tl.zeros([P, C], tl.float32), tl.zeros([P, C], tl.float32)
        for first_row in tl.static_range(0, state, N):
            row_N = first_row + tl.arange(0, N)
            b_NC = tl.trans(load_rows(b, group, chunk, length, groups, state, row_N, C))
            c_NC = tl.trans(load_rows(c, group, chunk, length, groups, state, row_N, C))
            before = load_halves(states_ptr, place, state, values, row_N, column_P)
            d_after = load_halves(d_states_ptr, place, state, values, row_N, column_P)
            read_PC = dot(tl.trans(before[0]), c_NC, dot(tl.trans(before[1]), c_NC, read_PC))
            d_written_PC = dot(tl.trans(d_after[0]), b_NC, dot(tl.trans(d_after[1]), b_NC, d_written_PC))
            kept_NP = before[0].to(tl.float32) + before[1].to(tl.float32)
            kept_P += tl.sum(kept_NP * (d_after[0].to(tl.float32) + d_after[1].to(tl.float32)), axis=0)
        x_CP = load_rows(x_rows, x, chunk, length, heads, values, column_P, C)
        d_halves = load_halves(d_halves_ptr, place, C, values, i_C, column_P)
        d_output_CP = d_halves[0].to(tl.float32) + d_halves[1].to(tl.float32)
        reads_C += tl.sum(tl.trans(read_PC) * d_output_CP, axis=1)
        d_written_PC *= until_C[None, :]
        writes_C += tl.sum(tl.trans(d_written_PC) * x_CP.to(tl.float32), axis=1)
        d_written_PC = dot_both(transposed(d_halves), taking, d_written_PC)
        d_x_CP = tl.trans(d_written_PC) * step_C[:, None] + d_output_CP * d
        to_CP, inside_CP = of_rows(d_x, x, chunk, length, heads, values, column_P, C)
        tl.store(to_CP, d_x_CP.to(d_x[0].dtype.element_ty), mask=inside_CP)
    tl.store(reads_ptr + at_C, reads_C * since_C)
    tl.store(writes_ptr + at_C, writes_C)
    tl.store(kept_ptr + place, tl.sum(kept_P, axis=0) * tl.exp(last.to(tl.float32)))


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _d_steps_kernel(
    step_ptr, sum_ptr, x_rows, dt, bias_ptr, a_ptr, low, high, b, c, d_halves_ptr, reads_ptr, writes_ptr, kept_ptr,
    d_dt, d_a_ptr, d_d_ptr, d_bias_ptr,
    length, heads, groups, chunks,
    state: tl.constexpr, values: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of dt, and each chunk's part of those of a, d and dt_bias."""
    place, i_C = tl.program_id(0), tl.arange(0, C)
    x, chunk, at_C = place // chunks, place % chunks, place.to(tl.int64) * C + i_C
    group = of_head(x, heads, groups)
    faded_CC = _taken(b, c, group, chunk, length, groups, state, C, N)
    # As there [j, i] is of what token i takes of token j.
    d_taken_CC = tl.zeros([C, C], tl.float32)
    for first in tl.static_range(0, values, P):
        column_P = first + tl.arange(0, P)
        x_CP = load_rows(x_rows, x, chunk, length, heads, values, column_P, C)
        d_halves = load_halves(d_halves_ptr, place, C, values, i_C, column_P)
        d_taken_CC = dot_halves(x_CP, transposed(d_halves), d_taken_CC)
    j_C1, i_1C = i_C[:, None], i_C[None, :]
    tl.store(d_d_ptr + place, tl.sum(tl.sum(tl.where(j_C1 == i_1C, d_taken_CC, 0.0), axis=1), axis=0))
    sum_C, step_C = tl.load(sum_ptr + at_C), tl.load(step_ptr + at_C)
    reads_C, writes_C = tl.load(reads_ptr + at_C), tl.load(writes_ptr + at_C)
    faded_CC *= d_taken_CC * faded(sum_C[None, :] - sum_C[:, None], j_C1 <= i_1C)
    d_step_C = tl.sum(faded_CC, axis=1) + writes_C
    # Of what fades at a token all that comes from before it and is used from it on.
    used_CC = tl.cumsum(tl.where(j_C1 < i_1C, faded_CC, 0.0), axis=1, reverse=True)
    d_g_C = tl.sum(tl.where(j_C1 < i_1C, (used_CC + writes_C[:, None]) * step_C[:, None], 0.0), axis=0)
    d_g_C += tl.sum(tl.where(j_C1 >= i_1C, reads_C[:, None], 0.0), axis=0) + tl.load(kept_ptr + place)
    tl.store(d_a_ptr + place, tl.sum(d_g_C * step_C, axis=0))
    d_step_C += d_g_C * tl.load(a_ptr + x % heads).to(tl.float32)
    dt_C = load_dt(dt, x, chunk, length, heads, C)
    raw_C = dt_C + tl.load(bias_ptr + x % heads).to(tl.float32)
    smooth_C = smooth(raw_C)
    within_C = (smooth_C >= low) & (smooth_C <= high) & (dt_C > -float("inf"))
    d_raw_C = tl.where(within_C, d_step_C * tl.sigmoid(raw_C), 0.0)
    tl.store(d_bias_ptr + place, tl.sum(d_raw_C, axis=0))
    store_tokens(d_dt, x, chunk, length, heads, d_raw_C, C)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _d_groups_kernel(
    step_ptr, sum_ptr, x_rows, b, c, d_halves_ptr, states_ptr, d_states_ptr, d_b, d_c,
    length, heads, groups, chunks,
    state: tl.constexpr, values: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradients of b and c of some of a group's heads, in rows [B, parts, L, G, N]."""
    i_C, of_values, of_states_ = tl.arange(0, C), tl.cdiv(values, P), tl.cdiv(state, N)
    row_N = tl.program_id(0) % of_states_ * N + tl.arange(0, N)
    in_group = heads // groups
    parts = tl.cdiv(in_group, SUMMED)
    part, at = tl.program_id(0) // of_states_ % parts, tl.program_id(0) // of_states_ // parts
    chunk, group = at % chunks, at // chunks
    first_x = group * in_group + part * SUMMED
    # [j, i] is of what token i takes of token j.
    d_taken_CC = tl.zeros([C, C], tl.float32)
    d_b_NC, d_c_NC = tl.zeros([N, C], tl.float32), tl.zeros([N, C], tl.float32)
    for number in range(tl.minimum(SUMMED, in_group - part * SUMMED) * of_values):
        x, column_P = first_x + number // of_values, number % of_values * P + tl.arange(0, P)
        place = x * chunks + chunk
        first = place.to(tl.int64) * C
        sum_C, last = tl.load(sum_ptr + first + i_C), tl.load(sum_ptr + first + C - 1)
        step_C = tl.load(step_ptr + first + i_C)
        x_CP = load_rows(x_rows, x, chunk, length, heads, values, column_P, C)
        d_halves = load_halves(d_halves_ptr, place, C, values, i_C, column_P)
        before = load_halves(states_ptr, place, state, values, row_N, column_P)
        d_after = load_halves(d_states_ptr, place, state, values, row_N, column_P)
        each_CC = dot_halves(x_CP, transposed(d_halves), tl.zeros([C, C], tl.float32))
        each_CC *= faded(sum_C[None, :] - sum_C[:, None], i_C[:, None] <= i_C[None, :])
        d_taken_CC += each_CC * step_C[:, None]
        d_output_CP = d_halves[0].to(tl.float32) + d_halves[1].to(tl.float32)
        d_read_CP = d_output_CP * tl.exp(sum_C.to(tl.float32))[:, None]
        d_c_NC = dot_both(before, transposed(halves_of(d_read_CP)), d_c_NC)
        write_C = tl.exp((last - sum_C).to(tl.float32)) * step_C
        written_CP = x_CP.to(tl.float32) * write_C[:, None]
        d_b_NC = dot_both(d_after, transposed(halves_of(written_CP)), d_b_NC)
    b_NC = tl.trans(load_rows(b, group, chunk, length, groups, state, row_N, C))
    c_NC = tl.trans(load_rows(c, group, chunk, length, groups, state, row_N, C))
    d_taken = halves_of(d_taken_CC)
    d_c_NC = dot_halves(b_NC, d_taken, d_c_NC)
    d_b_NC = dot_halves(c_NC, transposed(d_taken), d_b_NC)
    of_part = (group // groups * parts + part) * groups + group % groups
    to_CN, inside_CN = of_rows(d_b, of_part, chunk, length, groups, state, row_N, C)
    tl.store(to_CN, tl.trans(d_b_NC), mask=inside_CN)
    to_CN, inside_CN = of_rows(d_c, of_part, chunk, length, groups, state, row_N, C)
    tl.store(to_CN, tl.trans(d_c_NC), mask=inside_CN)


def backward(
    d_output: Tensor,
    d_final: Tensor,
    inputs: Sequence[Tensor],
    dt_limit: tuple[float, float],
    initial_state: Tensor,
    gradients: Sequence[Tensor],
    d_initial: Tensor,
) -> None:
    """Writes the `gradients` of `inputs` and that of the initial state, arguments of `forward`; adds those of a, d and
    dt_bias, which are fp32, to what is there.

    d_output, d_final: the gradients of what `forward` wrote, fp32.
    """
    x, dt, a, b, c, d, dt_bias = inputs
    d_x, d_dt, d_a, d_b, d_c, d_d, d_bias = gradients
    sizes, steps = Sizes.of(x, b), Steps(rows_of(dt), dt_bias, a, *map(float, dt_limit))
    x_rows, b_rows, c_rows = (rows_of(given) for given in (x, b, c))
    last = torch.empty_like(d_initial)
    step_XC, sum_XC, states_X2NP = steps_and_states(sizes, steps, x_rows, b_rows, initial_state, last)
    d_states_X2NP, d_halves_X2CP = (sizes.halves(d_output, height) for height in (sizes.state, CHUNK))
    launch_for(
        _d_states_kernel, D_STATES, sizes,
        sizes.rows * sizes.heads * sizes.of_states(D_STATES) * sizes.of_values(D_STATES),
        sum_XC, c_rows, rows_of(d_output), states_of(d_final), d_halves_X2CP, d_states_X2NP, states_of(d_initial),
    )  # fmt: skip
    reads_XC, writes_XC, kept_X = *d_output.new_empty(2, sizes.places, CHUNK), d_output.new_empty(sizes.places)
    launch_for(
        _d_values_kernel, D_VALUES, sizes, sizes.places,
        step_XC, sum_XC, x_rows, b_rows, c_rows, d, d_halves_X2CP, states_X2NP, d_states_X2NP,
        (d_x, d_x.stride(1)), reads_XC, writes_XC, kept_X,
    )  # fmt: skip
    parts_3X = d_output.new_empty(3, sizes.places)
    launch_for(
        _d_steps_kernel, D_STEPS, sizes, sizes.places,
        step_XC, sum_XC, x_rows, *steps, b_rows, c_rows, d_halves_X2CP, reads_XC, writes_XC, kept_X,
        (d_dt, d_dt.stride(1)), *parts_3X,
    )  # fmt: skip
    for gradient, parts_X in zip((d_a, d_d, d_bias), parts_3X, strict=True):
        gradient.add_(parts_X.view(sizes.rows, sizes.heads, sizes.chunks).sum((0, 2)))
    parts = triton.cdiv(sizes.heads // sizes.groups, SUMMED.value)
    summed = [d_output.new_empty(sizes.rows, parts, *b.shape[1:]) for _ in range(2)]
    launch_for(
        _d_groups_kernel, D_GROUPS, sizes,
        sizes.rows * sizes.groups * sizes.chunks * parts * sizes.of_states(D_GROUPS),
        step_XC, sum_XC, x_rows, b_rows, c_rows, d_halves_X2CP, states_X2NP, d_states_X2NP,
        *((each, each.stride(2)) for each in summed),
    )  # fmt: skip
    for gradient, each in zip((d_b, d_c), summed, strict=True):
        gradient.copy_(each.sum(1))
