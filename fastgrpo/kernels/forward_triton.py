"""Forward logprob and entropy as one product that folds its own tiles: the logits never reach memory.

Each tile of logits leaves its rows' largest logit, sum and weighted sum, 12 bytes for 256 logits, and the target's
logit where it holds the target; a second kernel folds these parts. Logits are rounded to bf16 first, as those of the
training pass are, so that a ratio of both passes is 1 for an unchanged policy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgrpo.kernels.base2 import LN_2, LOG2_E, PADDING
from fastgrpo.kernels.tuning import FORWARD_TILE, multiprocessors

# Rows at once: the parts of 32,768 rows take 0.22 GiB at a vocabulary of 152 k.
PART_ROWS = 32_768
# Two numbers in one conversion: alone, each takes the unit that the exponentials wait for.
ROUND_TO_BF16 = tl.constexpr("""
{
    .reg .b32 both;
    cvt.rn.bf16x2.f32 both, $3, $2;
    shl.b32 $0, both, 16;
    and.b32 $1, both, 0xffff0000;
}
""")


@triton.jit
def _tile_of(number, row_blocks, word_blocks, GROUP: tl.constexpr):
    """(block of rows, block of words) of a tile: rows first within a group, whose hidden states stay in the L2."""
    first = number // (GROUP * word_blocks) * GROUP
    rows = tl.minimum(row_blocks - first, GROUP)
    within = number - first * word_blocks
    return first + within % rows, within // rows


@triton.jit
def _fold_tile(
    x_RV, first_row, first_word, targets_ptr, target_ptr, part_ptr, rows, vocabulary, parts, scale,
    ROUND: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A tile's largest logit, sum of e = 2^(scale * (x - largest)) and sum of e * log2(e) of each row, and targets."""
    row_R, word_V = first_row + tl.arange(0, ROWS), first_word + tl.arange(0, WORDS)
    if ROUND:
        x_RV = tl.inline_asm_elementwise(ROUND_TO_BF16, "=r,=r,r,r", [x_RV], tl.float32, is_pure=True, pack=2)
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
    tl.store(part_ptr + 2 * parts * rows + row_R, tl.sum(e_RV * distance_RV, axis=1), mask=inside_R)


@triton.jit(do_not_specialize=["rows", "vocabulary", "hidden"])
def _product_kernel(
    hidden_desc, weight_desc, targets_ptr, target_ptr, parts_ptr, rows, vocabulary, hidden, scale,
    ROUND: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Each tile of logits, folded where it was made, into `parts_ptr` [3, blocks of words, rows]."""
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
            logits_RV, row_block * ROWS, word_block * WORDS, targets_ptr, target_ptr, part_ptr, rows, vocabulary,
            word_blocks.to(tl.int64), scale, ROUND, ROWS, WORDS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "parts"])
def _finish_kernel(
    parts_ptr, target_ptr, logprob_ptr, entropy_ptr, rows, parts, scale, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """Each row's parts [3, parts, rows] into its logprob and entropy."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest_R = tl.full([ROWS], PADDING, tl.float32)
    total_R = tl.zeros([ROWS], tl.float32)
    weighted_R = tl.zeros([ROWS], tl.float32)
    plane = parts.to(tl.int64) * rows
    for start in range(0, parts, PARTS):
        part_P = start + tl.arange(0, PARTS)
        inside_PR = (part_P < parts)[:, None] & (row_R < rows)[None, :]
        cell_PR = parts_ptr + part_P.to(tl.int64)[:, None] * rows + row_R[None, :]
        part_PR = tl.load(cell_PR, mask=inside_PR, other=PADDING)
        new_largest_R = tl.maximum(largest_R, tl.max(part_PR, axis=0))
        # PADDING - PADDING would be a fused product's rounding error, not 0.
        change_PR = tl.where(inside_PR, (part_PR - new_largest_R[None, :]) * scale, 0.0)
        change_R = (largest_R - new_largest_R) * scale
        sum_PR = tl.load(cell_PR + plane, mask=inside_PR, other=0.0)
        moved_PR = tl.load(cell_PR + 2 * plane, mask=inside_PR, other=0.0) + sum_PR * change_PR
        weighted_R = (weighted_R + total_R * change_R) * tl.exp2(change_R)
        weighted_R += tl.sum(moved_PR * tl.exp2(change_PR), axis=0)
        total_R = total_R * tl.exp2(change_R) + tl.sum(sum_PR * tl.exp2(change_PR), axis=0)
        largest_R = new_largest_R
    target_R = tl.load(target_ptr + row_R, mask=row_R < rows, other=0.0)
    log_total_R = tl.log2(total_R)
    logprob_R = ((target_R - largest_R) * scale - log_total_R) * LN_2
    tl.store(logprob_ptr + row_R, logprob_R, mask=row_R < rows)
    tl.store(entropy_ptr + row_R, (log_total_R - weighted_R / total_R) * LN_2, mask=row_R < rows)


def logprob_forward(
    hidden_NH: Tensor, targets_N: Tensor, weight_VH: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Target logprob and entropy in nats, fp32 [N], of the logits `hidden @ weight.T / temperature`."""
    logprob_N = hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32)
    entropy_N, targets_N, scale = torch.empty_like(logprob_N), targets_N.contiguous(), LOG2_E.value / temperature
    # Even parts of whole blocks: none is but a few rows.
    blocks = triton.cdiv(len(hidden_NH), FORWARD_TILE.rows)
    rows = triton.cdiv(blocks, triton.cdiv(len(hidden_NH), PART_ROWS)) * FORWARD_TILE.rows
    with torch.cuda.device_of(hidden_NH):
        for start in range(0, len(hidden_NH), rows):
            some = slice(start, start + rows)
            _fold_rows(hidden_NH[some], targets_N[some], weight_VH, scale, (logprob_N[some], entropy_N[some]))
    return logprob_N, entropy_N


def _fold_rows(
    hidden_NH: Tensor, targets_N: Tensor, weight_VH: Tensor, scale: float, outputs: tuple[Tensor, Tensor]
) -> None:
    """Fills logprob and entropy [N] of rows whose parts fit at once."""
    (rows, hidden), vocabulary, tile = hidden_NH.shape, len(weight_VH), FORWARD_TILE
    words = triton.cdiv(vocabulary, tile.words)
    target_N, parts_3PN = torch.empty_like(outputs[0]), outputs[0].new_empty(3, words, rows)
    programs = min(multiprocessors(hidden_NH.device), triton.cdiv(rows, tile.rows) * words)
    _product_kernel[(programs,)](
        TensorDescriptor.from_tensor(hidden_NH, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight_VH, [tile.words, tile.depth]),
        targets_N, target_N, parts_3PN, rows, vocabulary, hidden, scale,
        ROUND=hidden_NH.dtype == torch.bfloat16, ROWS=tile.rows, WORDS=tile.words, DEPTH=tile.depth, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _finish_kernel[(triton.cdiv(rows, 32),)](parts_3PN, target_N, *outputs, rows, words, scale, ROWS=32, PARTS=32)
