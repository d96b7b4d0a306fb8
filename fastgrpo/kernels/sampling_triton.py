"""Tokens drawn from rows of logits, and their logprobs, in one read of the logits.

The word with the largest p_v / E_v, where E_v is exponential noise, is a draw of softmax p (the Gumbel-max trick). Each
tile of a row leaves its largest logit, its sum of exponentials and its best word; a second kernel folds these parts.
The noise comes from the row's seed and position alone, so that what else is drawn beside it changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.base2 import LN_2, LOG2_E

WORDS = 4096


@triton.jit
def _exponential(bits_V):
    """Exponential noise of 32 random bits, fine where it is small: there draws are decided."""
    u_V = tl.minimum((bits_V.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # below 1
    # 1 - u keeps few digits of a small u.
    series_V = u_V * (1.0 + u_V * (0.5 + u_V * (0.33333334 + u_V * 0.25)))
    return tl.where(u_V < 0.015625, series_V, -tl.log(1.0 - u_V))


@triton.jit(do_not_specialize=["vocabulary", "tiles"])
def _tile_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, part_ptr, word_ptr, stride, vocabulary, tiles,
    WORDS: tl.constexpr,
):  # fmt: skip
    """A tile's largest logit, sum of exponentials and best score, a logarithm, into [3, rows, tiles]; the best word."""
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    temperature, row_ptr = tl.load(temperature_ptr + row), logits_ptr + row * stride
    greedy = temperature == 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    word_V = tile * WORDS + tl.arange(0, WORDS)
    logit_V = tl.load(row_ptr + word_V, mask=word_V < vocabulary, other=float("-inf")).to(tl.float32)
    if temperature != 1.0:
        logit_V = logit_V / temperature
    largest = tl.max(logit_V, axis=0)
    # In a tile of nothing but -inf all are 0.
    e_V = tl.exp2((logit_V - tl.where(largest == float("-inf"), 0.0, largest)) * LOG2_E)
    if greedy:
        best, place = tl.max(logit_V, axis=0, return_indices=True)
    else:
        position = tl.load(position_ptr + row)
        counter_Q = tile * (WORDS // 4) + tl.arange(0, WORDS // 4)
        high_Q, low_Q = counter_Q * 0 + (position >> 32).to(tl.int32), counter_Q * 0 + position.to(tl.int32)
        a_Q, b_Q, c_Q, d_Q = tl.philox(tl.load(seed_ptr + row), counter_Q, low_Q, high_Q, counter_Q * 0)
        bits_V = tl.join(tl.join(a_Q, c_Q), tl.join(b_Q, d_Q)).reshape(WORDS)
        score, place = tl.max(e_V / _exponential(bits_V), axis=0, return_indices=True)
        best = tl.log2(score) * LN_2 + largest
    cell, plane = part_ptr + tl.program_id(0), tl.num_programs(0)
    tl.store(cell, largest)
    tl.store(cell + plane, tl.sum(e_V, axis=0))
    tl.store(cell + 2 * plane, best)
    tl.store(word_ptr + tl.program_id(0), tile * WORDS + place)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _fold_kernel(
    part_ptr, word_ptr, logits_ptr, temperature_ptr, token_ptr, logprob_ptr, stride, rows, tiles, TILES: tl.constexpr
):
    """A row's parts into its token and that token's logprob."""
    row, tile_P = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    inside_P, cell_P, plane = tile_P < tiles, part_ptr + row * tiles + tile_P, rows.to(tl.int64) * tiles
    largest_P = tl.load(cell_P, mask=inside_P, other=float("-inf"))
    largest = tl.max(largest_P, axis=0)
    total_P = tl.load(cell_P + plane, mask=inside_P, other=0.0) * tl.exp2((largest_P - largest) * LOG2_E)
    _, tile = tl.max(tl.load(cell_P + 2 * plane, mask=inside_P, other=float("-inf")), axis=0, return_indices=True)
    word, temperature = tl.load(word_ptr + row * tiles + tile), tl.load(temperature_ptr + row)
    logit = tl.load(logits_ptr + row * stride + word).to(tl.float32) / tl.where(temperature == 0.0, 1.0, temperature)
    tl.store(token_ptr + row, word.to(tl.int64))
    tl.store(logprob_ptr + row, logit - largest - tl.log2(tl.sum(total_P, axis=0)) * LN_2)


def sample(logits_NV: Tensor, temperature_N: Tensor, seed_N: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
    """A token (int64 [N]) drawn from each row of softmax(logits / temperature), and its logprob (fp32 [N], nats).

    Rows may be a part of longer ones; their words are contiguous. Seeds and positions are int64: the same two give the
    same draw from the same row. A temperature of 0 takes the largest logit, with its logprob at temperature 1.
    """
    rows, vocabulary = logits_NV.shape
    tiles = triton.cdiv(vocabulary, WORDS)
    token_N, logprob_N = torch.empty_like(seed_N), temperature_N.new_empty(rows, dtype=torch.float32)
    part_3NP, word_NP = logprob_N.new_empty(3, rows, tiles), seed_N.new_empty(rows, tiles, dtype=torch.int32)
    stride = logits_NV.stride(0)
    launch(
        _tile_kernel, rows * tiles, logits_NV, temperature_N, seed_N, position_N, part_3NP, word_NP, stride, vocabulary,
        tiles, WORDS=WORDS,
    )  # fmt: skip
    launch(
        _fold_kernel, rows, part_3NP, word_NP, logits_NV, temperature_N, token_N, logprob_N, stride, rows, tiles,
        TILES=triton.next_power_of_2(tiles),
    )  # fmt: skip
    return token_N, logprob_N
