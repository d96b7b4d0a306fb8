"""Forward logprob and entropy as one product whose epilogue folds the softmax: the logits never reach memory.

Each tile of logits leaves its rows' largest logit, sum and weighted sum, 12 bytes for 256 logits, and the target's
logit where it holds the target; `forward_parts.finish` folds these parts. Logits are rounded to the weight's dtype
first, as the training pass's are, so that a ratio of both passes is 1 for an unchanged policy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from forward_parts import PART_ROWS, ROUND_TO_BF16, finish
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgrpo.kernels.reference import LogitTransform
from fastgrpo.kernels.rows_triton import LOG2_E, PADDING, _capped


class Tile(NamedTuple):
    """Rows, words and hidden dimensions of a tile, stages of its pipeline, warps; blocks of rows walked together."""

    rows: int = 128
    words: int = 256
    depth: int = 64
    stages: int = 4
    warps: int = 8
    group: int = 32
    programs: int = 1  # on each multiprocessor
    rounded: bool = True


DEFAULT_TILE = Tile()


@triton.jit
def _tile_of(number, row_blocks, word_blocks, GROUP: tl.constexpr):
    """(block of rows, block of words) of a tile: rows first within a group, whose hidden states stay in the L2."""
    first = number // (GROUP * word_blocks) * GROUP
    rows = tl.minimum(row_blocks - first, GROUP)
    within = number - first * word_blocks
    return first + within % rows, within // rows


@triton.jit
def _fold_tile(
    logits_RV, first_row, first_word, bias_ptr, targets_ptr, target_ptr, part_ptr, rows, vocabulary, parts,
    softcap, scale, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ROUND: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A tile's largest logit, sum of e = 2^(scale * (x - largest)) and sum of e * log2(e) of each row, and targets."""
    row_R, word_V = first_row + tl.arange(0, ROWS), first_word + tl.arange(0, WORDS)
    if bias_ptr is not None:
        logits_RV += tl.load(bias_ptr + word_V, mask=word_V < vocabulary, other=0.0).to(tl.float32)[None, :]
    if ROUND:
        logits_RV = tl.inline_asm_elementwise(ROUND_TO_BF16, "=r,=r,r,r", [logits_RV], tl.float32, is_pure=True, pack=2)
    x_RV = _capped(logits_RV, softcap, SOFTCAP)
    if first_word + WORDS > vocabulary:
        x_RV = tl.where((word_V < vocabulary)[None, :], x_RV, PADDING)
    inside_R = row_R < rows
    target_R = tl.load(targets_ptr + row_R, mask=inside_R, other=-1).to(tl.int32)
    here_R = (target_R >= first_word) & (target_R < first_word + WORDS)
    if tl.max(here_R.to(tl.int32), axis=0) > 0:
        found_R = tl.sum(tl.where(word_V[None, :] == target_R[:, None], x_RV, 0.0), axis=1)
        tl.store(target_ptr + row_R, found_R, mask=here_R)
    largest_R = tl.max(x_RV, axis=1)
    distance_RV = x_RV * scale - (largest_R * scale)[:, None]
    e_RV = tl.exp2(distance_RV)
    tl.store(part_ptr + row_R, largest_R, mask=inside_R)
    tl.store(part_ptr + parts * rows + row_R, tl.sum(e_RV, axis=1), mask=inside_R)
    if ENTROPY:
        tl.store(part_ptr + 2 * parts * rows + row_R, tl.sum(e_RV * distance_RV, axis=1), mask=inside_R)


@triton.jit(do_not_specialize=["rows", "vocabulary", "hidden"])
def _product_kernel(
    hidden_desc, weight_desc, bias_ptr, targets_ptr, target_ptr, parts_ptr, rows, vocabulary, hidden, softcap, scale,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ROUND: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_blocks, word_blocks = tl.cdiv(rows, ROWS), tl.cdiv(vocabulary, WORDS)
    for number in tl.range(tl.program_id(0), row_blocks * word_blocks, tl.num_programs(0), flatten=True):
        row_block, word_block = _tile_of(number, row_blocks, word_blocks, GROUP)
        logits_RV = tl.zeros([ROWS, WORDS], tl.float32)
        for start in range(0, hidden, DEPTH):
            hidden_RK = hidden_desc.load([row_block * ROWS, start])
            weight_VK = weight_desc.load([word_block * WORDS, start])
            logits_RV = tl.dot(hidden_RK, weight_VK.T, logits_RV)
        part_ptr = parts_ptr + word_block.to(tl.int64) * rows
        _fold_tile(
            logits_RV, row_block * ROWS, word_block * WORDS, bias_ptr, targets_ptr, target_ptr, part_ptr, rows,
            vocabulary, word_blocks.to(tl.int64), softcap, scale, SOFTCAP, ENTROPY, ROUND, ROWS, WORDS,
        )  # fmt: skip


def logprob_forward(
    hidden_NH: Tensor,
    targets_N: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    transform: LogitTransform,
    *,
    entropy: bool = True,
    tile: Tile = DEFAULT_TILE,
) -> tuple[Tensor, Tensor]:
    """Target logprob and, if asked for, entropy in nats, fp32 [N]; 12 bytes for `tile.words` logits are held."""
    vocabulary, hidden = weight_VH.shape
    words = triton.cdiv(vocabulary, tile.words)
    logprob_N = hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32)
    entropy_N = torch.empty_like(logprob_N if entropy else logprob_N[:0])
    softcap, scale = transform.softcap or 0.0, LOG2_E.value / transform.temperature
    for start in range(0, len(hidden_NH), PART_ROWS):
        some = slice(start, start + PART_ROWS)
        hidden_CH, target_C = hidden_NH[some], torch.empty_like(logprob_N[some])
        rows, parts_3PC = len(hidden_CH), target_C.new_empty(3, words, len(hidden_CH))
        programs = min(_multiprocessors(hidden_NH) * tile.programs, triton.cdiv(rows, tile.rows) * words)
        _product_kernel[(programs,)](
            TensorDescriptor.from_tensor(hidden_CH, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(weight_VH, [tile.words, tile.depth]),
            bias_V, targets_N[some], target_C, parts_3PC, rows, vocabulary, hidden, softcap, scale,
            SOFTCAP=bool(softcap), ENTROPY=entropy, ROUND=tile.rounded and hidden_NH.dtype == torch.bfloat16,
            ROWS=tile.rows, WORDS=tile.words, DEPTH=tile.depth, GROUP=tile.group,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        finish(parts_3PC, target_C, (logprob_N[some], entropy_N[some]), scale, entropy=entropy)
    return logprob_N, entropy_N


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
