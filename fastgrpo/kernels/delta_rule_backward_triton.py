"""The gated delta rule backward in Triton, in four launches; `delta_rule_tiles_triton` says how."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.chunks import CHUNK
from fastgrpo.kernels.delta_rule_tiles_triton import UNALIGNED, VARIED, Block, Sizes, launch_for
from fastgrpo.kernels.tiles_triton import (
    dot,
    dot_both,
    dot_halves,
    faded,
    halves_of,
    load_halves,
    load_rows,
    load_stack,
    load_tokens,
    of_rows,
    of_stack,
    of_states,
    rows_of,
    states_of,
    store_halves,
    store_tokens,
    transposed,
)

# Chosen by registers and shared memory; what an H200 took of others is in bench/results/recurrent.md.
D_WITHIN = Block(values=64, warps=4, stages=1)
D_STATES = Block(values=32, warps=4, stages=3)
D_READS = Block(values=64, warps=8, stages=2)
D_WRITES = Block(values=32, warps=4, stages=2)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _d_within_kernel(
    sum_ptr, query_scale_ptr, key_scale_ptr, query, key, value, beta, d_output,
    inverse_ptr, states_ptr, written_ptr, d_written_ptr,
    length, heads, keys, values, chunks, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """N again, in halves, and its gradient by way of its own chunk's outputs, in fp32."""
    blocks, i_C, row_K = tl.cdiv(values, V), tl.arange(0, C), tl.arange(0, K)
    place, column_V = tl.program_id(0) // blocks, tl.program_id(0) % blocks * V + tl.arange(0, V)
    x, chunk, at_C = place // chunks, place % chunks, place.to(tl.int64) * C + i_C
    sum_C, beta_C = tl.load(sum_ptr + at_C), load_tokens(beta, x, chunk, length, heads, C)
    query_scale_C, key_scale_C = tl.load(query_scale_ptr + at_C), tl.load(key_scale_ptr + at_C)
    key_CK = load_rows(key, x, chunk, length, heads, keys, row_K, C)
    value_CV = load_rows(value, x, chunk, length, heads, values, column_V, C)
    state = load_halves(states_ptr, place, keys, values, row_K, column_V)
    inverse = load_halves(inverse_ptr, place, C, C, i_C, i_C)
    read_CV = dot_halves(key_CK, state, tl.zeros([C, V], tl.float32))
    read_C = tl.exp(sum_C.to(tl.float32)) * key_scale_C
    new_CV = (value_CV.to(tl.float32) - read_CV * read_C[:, None]) * beta_C[:, None]
    written_CV = dot_both(inverse, halves_of(new_CV), tl.zeros([C, V], tl.float32))
    store_halves(written_ptr, place, C, values, i_C, column_V, halves_of(written_CV))
    query_CK = load_rows(query, x, chunk, length, heads, keys, row_K, C)
    d_output_CV = load_rows(d_output, x, chunk, length, heads, values, column_V, C)
    attention_CC = dot(query_CK, tl.trans(key_CK), tl.zeros([C, C], tl.float32)) * query_scale_C[:, None]
    attention_CC *= faded(sum_C[:, None] - sum_C[None, :], i_C[:, None] >= i_C[None, :])
    d_written_VC = dot_halves(tl.trans(d_output_CV), halves_of(attention_CC), tl.zeros([V, C], tl.float32))
    to_CV, inside_CV = of_stack(d_written_ptr, place, C, values, i_C, column_V)
    tl.store(to_CV, tl.trans(d_written_VC * key_scale_C[None, :]), mask=inside_CV)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _d_states_kernel(
    sum_ptr, query_scale_ptr, key_scale_ptr, query, key, beta, d_output, inverse_ptr, d_final,
    d_written_ptr, d_new_ptr, d_states_ptr, d_initial,
    length, heads, keys, values, chunks, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Gradients, in halves, of the state after each chunk and of what its T is multiplied with, b v - exp(G) b k S;
    and that of the first state."""
    blocks, i_C, row_K = tl.cdiv(values, V), tl.arange(0, C), tl.arange(0, K)
    x, column_V = tl.program_id(0) // blocks, tl.program_id(0) % blocks * V + tl.arange(0, V)
    from_KV, inside_KV = of_states(d_final, x, heads, keys, values, row_K, column_V)
    d_state_KV = tl.load(from_KV, mask=inside_KV, other=0.0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        place = x * chunks + chunk
        first = place.to(tl.int64) * C
        sum_C, last = tl.load(sum_ptr + first + i_C), tl.load(sum_ptr + first + C - 1)
        query_scale_C, key_scale_C = tl.load(query_scale_ptr + first + i_C), tl.load(key_scale_ptr + first + i_C)
        beta_C = load_tokens(beta, x, chunk, length, heads, C)
        query_CK = load_rows(query, x, chunk, length, heads, keys, row_K, C)
        key_CK = load_rows(key, x, chunk, length, heads, keys, row_K, C)
        d_output_CV = load_rows(d_output, x, chunk, length, heads, values, column_V, C)
        d_written_CV = load_stack(d_written_ptr, place, C, values, i_C, column_V)
        inverse = load_halves(inverse_ptr, place, C, C, i_C, i_C)
        d_state = halves_of(d_state_KV)
        write_C = tl.exp((last - sum_C).to(tl.float32)) * key_scale_C
        d_written_CV += dot_halves(key_CK, d_state, tl.zeros([C, V], tl.float32)) * write_C[:, None]
        store_halves(d_states_ptr, place, keys, values, row_K, column_V, d_state)
        d_new_CV = dot_both(transposed(inverse), halves_of(d_written_CV), tl.zeros([C, V], tl.float32))
        store_halves(d_new_ptr, place, C, values, i_C, column_V, halves_of(d_new_CV))
        since_C = tl.exp(sum_C.to(tl.float32))
        d_read_CV = d_output_CV.to(tl.float32) * (since_C * query_scale_C)[:, None]
        d_reading_CV = d_new_CV * (-since_C * beta_C * key_scale_C)[:, None]
        d_state_KV *= tl.exp(last.to(tl.float32))
        d_state_KV = dot_halves(tl.trans(query_CK), halves_of(d_read_CV), d_state_KV)
        d_state_KV = dot_halves(tl.trans(key_CK), halves_of(d_reading_CV), d_state_KV)
    to_KV, inside_KV = of_states(d_initial, x, heads, keys, values, row_K, column_V)
    tl.store(to_KV, d_state_KV, mask=inside_KV)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _d_reads_kernel(
    sum_ptr, query_scale_ptr, key_scale_ptr, query, key, value, beta, d_output,
    states_ptr, written_ptr, d_new_ptr, d_query, d_value, d_beta, d_g_ptr, d_reading_ptr,
    length, heads, keys, values, chunks, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, values and beta; and of keys and g as far as they go by way of what tokens read.

    The gradient of T^-1 is -T^T dT T^T, and with dT = dN (b v - exp(G) b k S)^T that is -d(b v) N^T.
    """
    place, row_K, i_C = tl.program_id(0), tl.arange(0, K), tl.arange(0, C)
    x, chunk, at_C = place // chunks, place % chunks, place.to(tl.int64) * C + i_C
    beta_C = load_tokens(beta, x, chunk, length, heads, C)
    # [j, i] is of what token i takes of token j.
    d_taken_CC, d_products_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    d_query_KC, d_betas_key_KC = tl.zeros([K, C], tl.float32), tl.zeros([K, C], tl.float32)
    d_beta_C = tl.zeros([C], tl.float32)
    for first in range(0, values, V):
        column_V = first + tl.arange(0, V)
        d_output_VC = tl.trans(load_rows(d_output, x, chunk, length, heads, values, column_V, C))
        d_new = load_halves(d_new_ptr, place, C, values, i_C, column_V)
        written = load_halves(written_ptr, place, C, values, i_C, column_V)
        state = load_halves(states_ptr, place, keys, values, row_K, column_V)
        d_taken_CC = dot(written[0], d_output_VC, dot(written[1], d_output_VC, d_taken_CC))
        d_query_KC = dot(state[0], d_output_VC, dot(state[1], d_output_VC, d_query_KC))
        d_products_CC = dot_both(written, transposed(d_new), d_products_CC)
        d_betas_key_KC = dot_both(state, transposed(d_new), d_betas_key_KC)
        d_new_CV = d_new[0].to(tl.float32) + d_new[1].to(tl.float32)
        value_CV = load_rows(value, x, chunk, length, heads, values, column_V, C).to(tl.float32)
        d_beta_C += tl.sum(d_new_CV * value_CV, axis=1)
        to_CV, inside_CV = of_rows(d_value, x, chunk, length, heads, values, column_V, C)
        tl.store(to_CV, (d_new_CV * beta_C[:, None]).to(d_value[0].dtype.element_ty), mask=inside_CV)
    sum_C = tl.load(sum_ptr + at_C)
    query_scale_C, key_scale_C = tl.load(query_scale_ptr + at_C), tl.load(key_scale_ptr + at_C)
    query_KC = tl.trans(load_rows(query, x, chunk, length, heads, keys, row_K, C))
    key_CK = load_rows(key, x, chunk, length, heads, keys, row_K, C)
    key_KC = tl.trans(key_CK)
    since_C = tl.exp(sum_C.to(tl.float32))
    d_query_KC *= since_C[None, :]
    d_betas_key_KC *= -since_C[None, :]
    reads_C = tl.sum(d_query_KC * query_KC.to(tl.float32), axis=0) * query_scale_C
    reads_C += tl.sum(d_betas_key_KC * key_KC.to(tl.float32), axis=0) * key_scale_C * beta_C
    j_C1, i_1C = i_C[:, None], i_C[None, :]
    fade_CC = faded(sum_C[None, :] - sum_C[:, None], j_C1 <= i_1C) * key_scale_C[:, None]
    d_taken_CC *= fade_CC
    d_products_CC *= tl.where(j_C1 < i_1C, -fade_CC, 0.0)
    zeros_CC = tl.zeros([C, C], tl.float32)
    faded_CC = d_taken_CC * dot(key_CK, query_KC, zeros_CC) * query_scale_C[None, :]
    faded_CC += d_products_CC * dot(key_CK, key_KC, zeros_CC) * (beta_C * key_scale_C)[None, :]
    # A token's g fades all that is from before it and used from it on.
    used_CC = tl.cumsum(tl.where(j_C1 < i_1C, faded_CC, 0.0), axis=1, reverse=True)
    d_g_C = tl.sum(tl.where(j_C1 < i_1C, used_CC, 0.0), axis=0)
    d_g_C += tl.sum(tl.where(j_C1 >= i_1C, reads_C[:, None], 0.0), axis=0)
    tl.store(d_g_ptr + at_C, d_g_C)
    d_query_KC = dot_halves(key_KC, halves_of(d_taken_CC), d_query_KC)
    d_betas_key_KC = dot_halves(key_KC, halves_of(d_products_CC), d_betas_key_KC)
    d_beta_C += tl.sum(d_betas_key_KC * key_KC.to(tl.float32), axis=0) * key_scale_C
    store_tokens(d_beta, x, chunk, length, heads, d_beta_C, C)
    to_KC, inside_KC = of_stack(d_reading_ptr, place, keys, C, row_K, i_C)
    tl.store(to_KC, d_betas_key_KC * beta_C[None, :], mask=inside_KC)
    # Of a vector that is divided by its length only the part across it has a gradient.
    along_C = tl.sum(d_query_KC * query_KC.to(tl.float32), axis=0) * query_scale_C * query_scale_C * keys
    d_query_KC = (d_query_KC - query_KC.to(tl.float32) * along_C[None, :]) * query_scale_C[None, :]
    to_CK, inside_CK = of_rows(d_query, x, chunk, length, heads, keys, row_K, C)
    tl.store(to_CK, tl.trans(d_query_KC).to(d_query[0].dtype.element_ty), mask=inside_CK)


@triton.jit(do_not_specialize=VARIED, do_not_specialize_on_alignment=UNALIGNED)
def _d_writes_kernel(
    sum_ptr, query_scale_ptr, key_scale_ptr, query, key, beta, d_output,
    states_ptr, d_states_ptr, written_ptr, d_new_ptr, d_g_ptr, d_reading_ptr, d_key, d_g,
    length, heads, keys, values, chunks, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, with those of what they read; and that of g, of which a part is there."""
    place, row_K, i_C = tl.program_id(0), tl.arange(0, K), tl.arange(0, C)
    x, chunk, at_C = place // chunks, place % chunks, place.to(tl.int64) * C + i_C
    # [i, j] is of what token i takes of token j.
    d_attention_CC, d_products_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    d_key_KC, both_K = tl.zeros([K, C], tl.float32), tl.zeros([K], tl.float32)
    for first in range(0, values, V):
        column_V = first + tl.arange(0, V)
        d_output_CV = load_rows(d_output, x, chunk, length, heads, values, column_V, C)
        d_new = load_halves(d_new_ptr, place, C, values, i_C, column_V)
        written = transposed(load_halves(written_ptr, place, C, values, i_C, column_V))
        d_state = load_halves(d_states_ptr, place, keys, values, row_K, column_V)
        d_key_KC = dot_both(d_state, written, d_key_KC)
        d_attention_CC = dot_halves(d_output_CV, written, d_attention_CC)
        d_products_CC = dot_both(d_new, written, d_products_CC)
        state = load_halves(states_ptr, place, keys, values, row_K, column_V)
        state_KV = state[0].to(tl.float32) + state[1].to(tl.float32)
        both_K += tl.sum(state_KV * (d_state[0].to(tl.float32) + d_state[1].to(tl.float32)), axis=1)
    sum_C, last = tl.load(sum_ptr + at_C), tl.load(sum_ptr + place.to(tl.int64) * C + C - 1)
    query_scale_C, key_scale_C = tl.load(query_scale_ptr + at_C), tl.load(key_scale_ptr + at_C)
    beta_C = load_tokens(beta, x, chunk, length, heads, C)
    query_KC = tl.trans(load_rows(query, x, chunk, length, heads, keys, row_K, C))
    key_KC = tl.trans(load_rows(key, x, chunk, length, heads, keys, row_K, C))
    d_key_KC *= tl.exp((last - sum_C).to(tl.float32))[None, :]
    writes_C = tl.sum(d_key_KC * key_KC.to(tl.float32), axis=0) * key_scale_C
    i_C1, j_1C = i_C[:, None], i_C[None, :]
    d_g_C = tl.sum(tl.where(i_C1 < j_1C, writes_C[:, None], 0.0), axis=0)
    d_g_C += tl.sum(both_K, axis=0) * tl.exp(last.to(tl.float32))
    store_tokens(d_g, x, chunk, length, heads, tl.load(d_g_ptr + at_C) + d_g_C, C)
    fade_CC = faded(sum_C[:, None] - sum_C[None, :], i_C1 >= j_1C)
    d_attention_CC *= fade_CC * query_scale_C[:, None]
    d_products_CC *= tl.where(i_C1 > j_1C, -fade_CC * (beta_C * key_scale_C)[:, None], 0.0)
    d_key_KC = dot_halves(query_KC, halves_of(d_attention_CC), d_key_KC)
    d_key_KC = dot_halves(key_KC, halves_of(d_products_CC), d_key_KC)
    d_key_KC += load_stack(d_reading_ptr, place, keys, C, row_K, i_C)
    along_C = tl.sum(d_key_KC * key_KC.to(tl.float32), axis=0) * key_scale_C * key_scale_C
    d_key_KC = (d_key_KC - key_KC.to(tl.float32) * along_C[None, :]) * key_scale_C[None, :]
    to_CK, inside_CK = of_rows(d_key, x, chunk, length, heads, keys, row_K, C)
    tl.store(to_CK, tl.trans(d_key_KC).to(d_key[0].dtype.element_ty), mask=inside_CK)


def backward(
    d_output: Tensor,
    inputs: Sequence[Tensor],
    kept: Sequence[Tensor],
    gradients: Sequence[Tensor],
    d_final: Tensor,
    d_initial: Tensor,
) -> None:
    """Writes the `gradients` of `inputs` and that of the initial state, arguments of `forward`, which gave `kept`.

    d_output, d_final: the gradients of what it wrote.
    """
    *scales, inverse_X2CC, states_X2KV = kept
    sum_XC = scales[0]
    sizes = Sizes.of(inputs[0], inputs[2])
    query, key, value, _, beta = (rows_of(given) for given in inputs)
    d_out = rows_of(d_output)
    d_query, d_key, d_value, d_g, d_beta = ((gradient, gradient.stride(1)) for gradient in gradients)
    written_X2CV, d_new_X2CV = (sizes.halves(sum_XC, CHUNK, sizes.values) for _ in range(2))
    d_written_XCV = sizes.tokens(sum_XC, sizes.values)
    launch_for(
        _d_within_kernel, D_WITHIN, sizes, sizes.places * sizes.blocks(D_WITHIN),
        *scales, query, key, value, beta, d_out, inverse_X2CC, states_X2KV, written_X2CV, d_written_XCV,
    )  # fmt: skip
    d_states_X2KV = sizes.halves(sum_XC, sizes.keys, sizes.values)
    launch_for(
        _d_states_kernel, D_STATES, sizes, sizes.rows * sizes.heads * sizes.blocks(D_STATES),
        *scales, query, key, beta, d_out, inverse_X2CC, states_of(d_final), d_written_XCV, d_new_X2CV, d_states_X2KV,
        states_of(d_initial),
    )  # fmt: skip
    del d_written_XCV
    d_g_XC, d_reading_XKC = sizes.tokens(sum_XC), sizes.tokens(sum_XC, sizes.keys)
    launch_for(
        _d_reads_kernel, D_READS, sizes, sizes.places,
        *scales, query, key, value, beta, d_out, states_X2KV, written_X2CV, d_new_X2CV,
        d_query, d_value, d_beta, d_g_XC, d_reading_XKC,
    )  # fmt: skip
    launch_for(
        _d_writes_kernel, D_WRITES, sizes, sizes.places,
        *scales, query, key, beta, d_out, states_X2KV, d_states_X2KV, written_X2CV, d_new_X2CV,
        d_g_XC, d_reading_XKC, d_key, d_g,
    )  # fmt: skip
