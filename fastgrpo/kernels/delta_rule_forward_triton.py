"""The gated delta rule forward in Triton, in four launches; `delta_rule_tiles_triton` says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.chunks import CHUNK
from fastgrpo.kernels.delta_rule_tiles_triton import UNALIGNED, VARIED, Block, Sizes, launch_for
from fastgrpo.kernels.delta_rule_torch import EPS
from fastgrpo.kernels.tiles_triton import (
    dot,
    dot_both,
    dot_halves,
    faded,
    halves_of,
    load_halves,
    load_rows,
    load_tokens,
    of_rows,
    of_stack,
    of_states,
    rows_of,
    states_of,
    store_halves,
    transposed,
)

SMALL = tl.constexpr(EPS)
# Chosen by registers and shared memory; what an H200 took of others is in bench/results/recurrent.md.
WITHIN = Block(values=64, warps=4, stages=1)
INVERSE_WARPS = 1
STATES = Block(values=32, warps=4, stages=2)
OUTPUTS = Block(values=64, warps=4, stages=1)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _within_kernel(
    sum_ptr, query_scale_ptr, key_scale_ptr, query, key, g, beta, products_ptr,
    length, heads, keys, values, chunks, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """G, 1 / the lengths of queries (and of sqrt(keys)) and keys, and T^-1 below its diagonal, with zeros elsewhere."""
    place, column_K, i_C = tl.program_id(0), tl.arange(0, K), tl.arange(0, C)
    x, chunk, at_C = place // chunks, place % chunks, place.to(tl.int64) * C + i_C
    query_CK = load_rows(query, x, chunk, length, heads, keys, column_K, C).to(tl.float32)
    tl.store(query_scale_ptr + at_C, 1.0 / tl.sqrt((tl.sum(query_CK * query_CK, axis=1) + SMALL) * keys))
    key_CK = load_rows(key, x, chunk, length, heads, keys, column_K, C)
    square_CK = key_CK.to(tl.float32) * key_CK.to(tl.float32)
    scale_C = 1.0 / tl.sqrt(tl.sum(square_CK, axis=1) + SMALL)
    tl.store(key_scale_ptr + at_C, scale_C)
    # In fp32 a difference of two long sums, where states fade fast, keeps few digits.
    sum_C = tl.cumsum(load_tokens(g, x, chunk, length, heads, C).to(tl.float64), axis=0)
    tl.store(sum_ptr + at_C, sum_C)
    beta_C = load_tokens(beta, x, chunk, length, heads, C)
    fade_CC = faded(sum_C[:, None] - sum_C[None, :], i_C[:, None] > i_C[None, :])
    products_CC = dot(key_CK, tl.trans(key_CK), tl.zeros([C, C], tl.float32))
    products_CC *= fade_CC * (beta_C * scale_C)[:, None] * scale_C[None, :]
    tl.store(of_stack(products_ptr, place, C, C, i_C, i_C)[0], products_CC)


@triton.jit
def _inverse_kernel(products_ptr, inverse_ptr, C: tl.constexpr):
    """T in halves: of both blocks on the diagonal a row after the other, in fp32; of that below them by products."""
    S: tl.constexpr = C // 2
    place, i_S = tl.program_id(0), tl.arange(0, S)
    products_ptr += place.to(tl.int64) * C * C
    inverse_2SS = tl.zeros([2, S, S], tl.float32) + tl.where(i_S[:, None] == i_S[None, :], 1.0, 0.0)[None, :, :]
    row_ptr = products_ptr + (tl.arange(0, 2) * (S * C + S))[:, None] + i_S[None, :]
    row_2S = tl.load(row_ptr + C)
    for row in range(1, S):
        # The next row is on its way meanwhile.
        next_2S = tl.load(row_ptr + tl.minimum(row + 1, S - 1) * C)
        taken_2S = tl.sum(row_2S[:, :, None] * inverse_2SS, axis=1)
        inverse_2SS -= tl.where(i_S[None, :, None] == row, taken_2S[:, None, :], 0.0)
        row_2S = next_2S
    first_SS, last_SS = tl.split(tl.permute(inverse_2SS, (1, 2, 0)))
    below_SS = tl.load(products_ptr + (S + i_S)[:, None] * C + i_S[None, :])
    below_SS = -tl.dot(last_SS, tl.dot(below_SS, first_SS, input_precision="ieee"), input_precision="ieee")
    store_halves(inverse_ptr, place, C, C, i_S, i_S, halves_of(first_SS))
    store_halves(inverse_ptr, place, C, C, i_S, S + i_S, halves_of(tl.zeros([S, S], tl.float32)))
    store_halves(inverse_ptr, place, C, C, S + i_S, i_S, halves_of(below_SS))
    store_halves(inverse_ptr, place, C, C, S + i_S, S + i_S, halves_of(last_SS))


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _states_kernel(
    sum_ptr, scale_ptr, key, value, beta, inverse_ptr, initial_state, written_ptr, states_ptr, final_state,
    length, heads, keys, values, chunks, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """N of each chunk and the state before it, in halves, and the state after the last one."""
    blocks, i_C, row_K = tl.cdiv(values, V), tl.arange(0, C), tl.arange(0, K)
    x, column_V = tl.program_id(0) // blocks, tl.program_id(0) % blocks * V + tl.arange(0, V)
    from_KV, inside_KV = of_states(initial_state, x, heads, keys, values, row_K, column_V)
    state_KV = tl.load(from_KV, mask=inside_KV, other=0.0)
    for chunk in range(chunks):
        place = x * chunks + chunk
        first = place.to(tl.int64) * C
        sum_C, last = tl.load(sum_ptr + first + i_C), tl.load(sum_ptr + first + C - 1)
        scale_C = tl.load(scale_ptr + first + i_C)
        beta_C = load_tokens(beta, x, chunk, length, heads, C)
        key_CK = load_rows(key, x, chunk, length, heads, keys, row_K, C)
        value_CV = load_rows(value, x, chunk, length, heads, values, column_V, C)
        inverse = load_halves(inverse_ptr, place, C, C, i_C, i_C)
        state = halves_of(state_KV)
        read_CV = dot_halves(key_CK, state, tl.zeros([C, V], tl.float32))
        store_halves(states_ptr, place, keys, values, row_K, column_V, state)
        read_C = tl.exp(sum_C.to(tl.float32)) * scale_C
        new_CV = (value_CV.to(tl.float32) - read_CV * read_C[:, None]) * beta_C[:, None]
        written_CV = dot_both(inverse, halves_of(new_CV), tl.zeros([C, V], tl.float32))
        store_halves(written_ptr, place, C, values, i_C, column_V, halves_of(written_CV))
        write_C = tl.exp((last - sum_C).to(tl.float32)) * scale_C
        state_KV *= tl.exp(last.to(tl.float32))
        state_KV = dot_halves(tl.trans(key_CK), halves_of(written_CV * write_C[:, None]), state_KV)
    to_KV, inside_KV = of_states(final_state, x, heads, keys, values, row_K, column_V)
    tl.store(to_KV, state_KV, mask=inside_KV)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _outputs_kernel(
    sum_ptr, query_scale_ptr, key_scale_ptr, query, key, written_ptr, states_ptr, output,
    length, heads, keys, values, chunks, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """What each token's query finds in the state before its chunk, and in what was written since."""
    blocks, i_C, row_K = tl.cdiv(values, V), tl.arange(0, C), tl.arange(0, K)
    place, column_V = tl.program_id(0) // blocks, tl.program_id(0) % blocks * V + tl.arange(0, V)
    x, chunk, at_C = place // chunks, place % chunks, place.to(tl.int64) * C + i_C
    sum_C = tl.load(sum_ptr + at_C)
    query_scale_C, key_scale_C = tl.load(query_scale_ptr + at_C), tl.load(key_scale_ptr + at_C)
    query_KC = tl.trans(load_rows(query, x, chunk, length, heads, keys, row_K, C))
    key_CK = load_rows(key, x, chunk, length, heads, keys, row_K, C)
    state = load_halves(states_ptr, place, keys, values, row_K, column_V)
    written = load_halves(written_ptr, place, C, values, i_C, column_V)
    # [j, i] is what token i's output takes of token j.
    taken_CC = dot(key_CK, query_KC, tl.zeros([C, C], tl.float32)) * key_scale_C[:, None]
    taken_CC *= faded(sum_C[None, :] - sum_C[:, None], i_C[:, None] <= i_C[None, :])
    output_VC = dot(tl.trans(state[0]), query_KC, tl.zeros([V, C], tl.float32))
    output_VC = dot(tl.trans(state[1]), query_KC, output_VC) * tl.exp(sum_C.to(tl.float32))[None, :]
    output_VC = dot_both(transposed(written), halves_of(taken_CC), output_VC) * query_scale_C[None, :]
    to_CV, inside_CV = of_rows(output, x, chunk, length, heads, values, column_V, C)
    tl.store(to_CV, tl.trans(output_VC).to(output[0].dtype.element_ty), mask=inside_CV)


def forward(inputs: Sequence[Tensor], output: Tensor, initial_state: Tensor, final_state: Tensor) -> tuple[Tensor, ...]:
    """Writes the results of `gated_delta_rule`, of which `inputs`, all bfloat16 but g and beta, are the arguments.

    What `backward` needs besides comes back: G, scales of queries and keys, T, states.
    """
    sizes = Sizes.of(inputs[0], inputs[2])
    query, key, value, g, beta = (rows_of(given) for given in inputs)
    scales = sizes.tokens(output, dtype=torch.float64), sizes.tokens(output), sizes.tokens(output)
    products_XCC, inverse_X2CC = sizes.tokens(output, CHUNK), sizes.halves(output, CHUNK, CHUNK)
    launch_for(_within_kernel, WITHIN, sizes, sizes.places, *scales, query, key, g, beta, products_XCC)
    launch(_inverse_kernel, sizes.places, products_XCC, inverse_X2CC, C=CHUNK, num_warps=INVERSE_WARPS)
    del products_XCC
    written_X2CV, states_X2KV = (sizes.halves(output, height, sizes.values) for height in (CHUNK, sizes.keys))
    launch_for(
        _states_kernel, STATES, sizes, sizes.rows * sizes.heads * sizes.blocks(STATES),
        scales[0], scales[2], key, value, beta, inverse_X2CC, states_of(initial_state), written_X2CV, states_X2KV,
        states_of(final_state),
    )  # fmt: skip
    launch_for(
        _outputs_kernel, OUTPUTS, sizes, sizes.places * sizes.blocks(OUTPUTS),
        *scales, query, key, written_X2CV, states_X2KV, (output, output.stride(1)),
    )  # fmt: skip
    return *scales, inverse_X2CC, states_X2KV
