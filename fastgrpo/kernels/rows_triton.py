"""Row passes over one chunk of logits in Triton.

The loss kernel reads a row twice, for its statistics and for its gradient: the second time backwards, with few rows at
work at once, so that most of it is still in the caches.
Exponentials are taken in base 2, the hardware's, as one multiply-add and one instruction for each logit.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.base2 import LN_2, LOG2_E, PADDING
from fastgrpo.kernels.reference import LOG_RATIO_BOUND, LogitTransform, LossOptions, SoftmaxSums, TokenInputs
from fastgrpo.kernels.tuning import RowBlock, loss_row_block, resident_rows, row_block

BOUND = tl.constexpr(LOG_RATIO_BOUND)
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 1024


@triton.jit
def _capped(raw, softcap, SOFTCAP: tl.constexpr):
    x = raw.to(tl.float32)
    if SOFTCAP:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def _fold(x_UL, inside_UL, largest_L, sum_L, weighted_L, scale, MASKED: tl.constexpr, ENTROPY: tl.constexpr):
    """One tile of logits into each lane's largest, sum of e = 2^(scale * (x - largest)) and sum of e * log2(e)."""
    if MASKED:
        x_UL = tl.where(inside_UL, x_UL, PADDING)
    new_largest_L = tl.maximum(largest_L, tl.max(x_UL, axis=0))
    change_L = (largest_L - new_largest_L) * scale
    distance_UL = x_UL * scale - (new_largest_L * scale)[None, :]
    if MASKED:
        # Fused, PADDING * scale - PADDING * scale is the rounding error of 1e30, not 0.
        distance_UL = tl.where(inside_UL, distance_UL, PADDING)
    e_UL = tl.exp2(distance_UL)
    if ENTROPY:
        weighted_L = (weighted_L + sum_L * change_L) * tl.exp2(change_L) + tl.sum(e_UL * distance_UL, axis=0)
    return new_largest_L, sum_L * tl.exp2(change_L) + tl.sum(e_UL, axis=0), weighted_L


@triton.jit
def _row_statistics(
    row_ptr, vocabulary, softcap, scale,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(largest logit, sum of e = 2^(scale * (x - largest)), sum of e * log2(e)), online in each lane."""
    TILE: tl.constexpr = LANES * UNROLL
    tile_UL = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    largest_L = tl.full([LANES], PADDING, tl.float32)
    sum_L = tl.zeros([LANES], tl.float32)
    weighted_L = tl.zeros([LANES], tl.float32)
    whole = vocabulary // TILE * TILE
    for start in range(0, whole, TILE):
        raw_UL = tl.load(row_ptr + start + tile_UL, eviction_policy="evict_last")
        x_UL = _capped(raw_UL, softcap, SOFTCAP)
        largest_L, sum_L, weighted_L = _fold(x_UL, tile_UL, largest_L, sum_L, weighted_L, scale, False, ENTROPY)
    if whole < vocabulary:
        inside_UL = whole + tile_UL < vocabulary
        raw_UL = tl.load(row_ptr + whole + tile_UL, mask=inside_UL, other=0.0, eviction_policy="evict_last")
        x_UL = _capped(raw_UL, softcap, SOFTCAP)
        largest_L, sum_L, weighted_L = _fold(x_UL, inside_UL, largest_L, sum_L, weighted_L, scale, True, ENTROPY)
    largest = tl.max(largest_L, axis=0)
    change_L = (largest_L - largest) * scale
    total = tl.sum(sum_L * tl.exp2(change_L), axis=0)
    weighted = tl.sum((weighted_L + sum_L * change_L) * tl.exp2(change_L), axis=0)
    return largest, total, weighted


@triton.jit
def _dlogits(
    raw_UL, shift, entropy, grad_softmax, grad_entropy, softcap, scale, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr
):
    """-p (grad_softmax + grad_entropy (log p + entropy)) times the softcap's slope, p = 2^(scale * logit - shift)."""
    capped_UL = _capped(raw_UL, softcap, SOFTCAP)
    distance_UL = capped_UL * scale - shift
    weight_UL = grad_softmax
    if ENTROPY:
        weight_UL = grad_softmax + grad_entropy * (distance_UL * LN_2 + entropy)
    grad_UL = tl.exp2(distance_UL) * -weight_UL
    if SOFTCAP:
        grad_UL = grad_UL * (1.0 - (capped_UL / softcap) * (capped_UL / softcap))
    return grad_UL


@triton.jit
def _write_dlogits(
    row_ptr, vocabulary, target, target_raw, shift, total, logprob, entropy, grad_logprob, grad_entropy, softcap, scale,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Raw logits into g (1[v = target] - p) - g_entropy p (log p + entropy), times the transform's slope, in place.

    p = 2^(scale * logit - shift) / total; with ENTROPY, total is 1.
    """
    TILE: tl.constexpr = LANES * UNROLL
    tile_UL = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    slope = scale * LN_2
    grad_softmax, grad_entropy = grad_logprob * slope / total, grad_entropy * slope
    tiles = vocabulary // TILE
    if tiles * TILE < vocabulary:
        inside_UL = tiles * TILE + tile_UL < vocabulary
        tail_ptr = row_ptr + tiles * TILE + tile_UL
        raw_UL = tl.load(tail_ptr, mask=inside_UL, other=0.0, eviction_policy="evict_first")
        grad_UL = _dlogits(raw_UL, shift, entropy, grad_softmax, grad_entropy, softcap, scale, SOFTCAP, ENTROPY)
        tl.store(tail_ptr, grad_UL.to(row_ptr.dtype.element_ty), mask=inside_UL, eviction_policy="evict_first")
    for i in range(0, tiles):
        tile_ptr = row_ptr + (tiles - 1 - i) * TILE + tile_UL
        raw_UL = tl.load(tile_ptr, eviction_policy="evict_first")
        grad_UL = _dlogits(raw_UL, shift, entropy, grad_softmax, grad_entropy, softcap, scale, SOFTCAP, ENTROPY)
        tl.store(tile_ptr, grad_UL.to(row_ptr.dtype.element_ty), eviction_policy="evict_first")
    target_weight = grad_logprob * slope
    if ENTROPY:
        target_weight = grad_logprob * slope + grad_entropy * (logprob + entropy)
    target_grad = grad_logprob * slope - tl.exp(logprob) * target_weight
    if SOFTCAP:
        target_capped = _capped(target_raw, softcap, SOFTCAP) / softcap
        target_grad = target_grad * (1.0 - target_capped * target_capped)
    tl.debug_barrier()  # the target's gradient is written last
    tl.store(row_ptr + target, target_grad.to(row_ptr.dtype.element_ty))


@triton.jit
def _policy_loss(
    logprob, token, advantages_ptr, weights_ptr, old_ptr, ref_ptr, sampled_ptr, sequence_ptr,
    low, high, dual, kl_weight, tis_cap, RATIO: tl.constexpr, MASK: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """`reference.policy_loss` of one token, and its derivative by the token's logprob."""
    advantage, weight = tl.load(advantages_ptr + token), tl.load(weights_ptr + token)
    # 0 as such: a fused multiply-add would make logprob - logprob its rounding error.
    old, log_ratio = logprob, weight * 0.0
    if old_ptr is not None:
        old = tl.load(old_ptr + token)
        log_ratio = logprob - old
    if RATIO == "sequence":
        log_ratio = weight * 0.0
        if sequence_ptr is not None:
            log_ratio = tl.load(sequence_ptr + token)
    ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -BOUND), BOUND))
    clipped = tl.minimum(tl.maximum(ratio, low), high)
    below, above = ratio < low, ratio > high
    if RATIO == "cispo":
        objective, d_objective = clipped * advantage * logprob, clipped * advantage
    else:
        beyond = (advantage < 0) & (ratio > dual)
        objective = tl.where(beyond, dual * advantage, tl.minimum(ratio * advantage, clipped * advantage))
        below, above = below & (advantage < 0), (above & (advantage > 0)) | beyond
        constant = below | above | (tl.abs(log_ratio) > BOUND)
        d_objective = tl.where(constant, 0.0, ratio * advantage)
    importance, capped = weight * 0.0 + 1.0, weight != weight
    if sampled_ptr is not None:
        exact = tl.exp(tl.minimum(tl.maximum(old - tl.load(sampled_ptr + token), -BOUND), BOUND))
        capped = exact > tis_cap
        importance = tl.where(capped, 0.0 if MASK else tis_cap, exact)
    loss, d_loss, kl = -importance * objective, -importance * d_objective, weight * 0.0
    if ref_ptr is not None:
        distance = tl.load(ref_ptr + token) - logprob
        bounded = tl.minimum(tl.maximum(distance, -BOUND), BOUND)
        outside = tl.abs(distance) > BOUND
        kl = tl.exp(bounded) - bounded - 1.0
        if KL == "k1":
            kl, d_kl = -bounded, weight * 0.0 + 1.0
        elif KL == "k2":
            kl, d_kl = 0.5 * bounded * bounded, -bounded
        elif KL == "unbiased":
            moved = logprob - old if old_ptr is not None else weight * 0.0
            token_ratio = tl.exp(tl.minimum(tl.maximum(moved, -BOUND), BOUND))
            kl, d_kl, outside = token_ratio * kl, -token_ratio * bounded, outside | (tl.abs(moved) > BOUND)
        else:
            d_kl = 1.0 - tl.exp(bounded)
        loss += kl_weight * kl
        d_loss += tl.where(outside, 0.0, kl_weight * d_kl)
    return loss * weight, d_loss * weight, kl, below, above, capped


@triton.jit
def _fold_kernel(
    logits_ptr, pitch, vocabulary, targets_ptr, largest_ptr, total_ptr, weighted_ptr, target_ptr, softcap, scale,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row * pitch.to(tl.int64)
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < vocabulary)
    target_raw = tl.load(row_ptr + target, mask=inside, other=0.0)
    tl.store(target_ptr + row, _capped(target_raw, softcap, SOFTCAP), mask=inside)
    largest, total, weighted = _row_statistics(row_ptr, vocabulary, softcap, scale, SOFTCAP, ENTROPY, LANES, UNROLL)
    old_largest, old_total = tl.load(largest_ptr + row), tl.load(total_ptr + row)
    new_largest = tl.maximum(largest, old_largest)
    change, old_change = (largest - new_largest) * scale, (old_largest - new_largest) * scale
    factor, old_factor = tl.exp2(change), tl.exp2(old_change)
    tl.store(largest_ptr + row, new_largest)
    tl.store(total_ptr + row, total * factor + old_total * old_factor)
    if ENTROPY:
        old_weighted = tl.load(weighted_ptr + row) + old_total * old_change * LN_2
        tl.store(weighted_ptr + row, (weighted + total * change) * LN_2 * factor + old_weighted * old_factor)


@triton.jit
def _dlogits_kernel(
    logits_ptr, pitch, vocabulary, targets_ptr, logprob_ptr, entropy_ptr, grad_logprob_ptr, grad_entropy_ptr,
    softcap, scale, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row * pitch.to(tl.int64)
    target = tl.load(targets_ptr + row)
    target_raw = tl.load(row_ptr + target)
    logprob, grad_logprob = tl.load(logprob_ptr + row), tl.load(grad_logprob_ptr + row)
    entropy, grad_entropy = logprob, logprob
    if ENTROPY:
        entropy, grad_entropy = tl.load(entropy_ptr + row), tl.load(grad_entropy_ptr + row)
    shift = _capped(target_raw, softcap, SOFTCAP) * scale - logprob * LOG2_E
    tl.debug_barrier()  # every thread has the target's logit before any overwrites it
    _write_dlogits(
        row_ptr, vocabulary, target, target_raw, shift, 1.0, logprob, entropy, grad_logprob, grad_entropy,
        softcap, scale, SOFTCAP, ENTROPY, LANES, UNROLL,
    )  # fmt: skip


@triton.jit
def _loss_kernel(
    logits_ptr, pitch, vocabulary, targets_ptr, report_ptr, report_pitch,
    advantages_ptr, weights_ptr, old_ptr, ref_ptr, sampled_ptr, sequence_ptr,
    low, high, dual, kl_weight, tis_cap, entropy_weight, softcap, scale, rows,
    RATIO: tl.constexpr, MASK: tl.constexpr, KL: tl.constexpr, BONUS: tl.constexpr, GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row_ptr = logits_ptr + row * pitch.to(tl.int64)
        target = tl.load(targets_ptr + row)
        target_raw = tl.load(row_ptr + target)
        largest, total, weighted = _row_statistics(row_ptr, vocabulary, softcap, scale, SOFTCAP, True, LANES, UNROLL)
        entropy = (tl.log2(total) - weighted / total) * LN_2
        logprob = (_capped(target_raw, softcap, SOFTCAP) - largest) * (scale * LN_2) - tl.log(total)
        loss, d_loss, kl, below, above, capped = _policy_loss(
            logprob, row, advantages_ptr, weights_ptr, old_ptr, ref_ptr, sampled_ptr, sequence_ptr,
            low, high, dual, kl_weight, tis_cap, RATIO, MASK, KL,
        )  # fmt: skip
        shift, grad_entropy = largest * scale, d_loss
        if BONUS:
            grad_entropy = -entropy_weight * tl.load(weights_ptr + row)
            loss += grad_entropy * entropy
            shift, total = shift + tl.log2(total), 1.0
        cell_ptr = report_ptr + row
        tl.store(cell_ptr, logprob)
        tl.store(cell_ptr + report_pitch, entropy)
        tl.store(cell_ptr + 2 * report_pitch, loss)
        tl.store(cell_ptr + 3 * report_pitch, kl)
        tl.store(cell_ptr + 4 * report_pitch, below.to(tl.float32))
        tl.store(cell_ptr + 5 * report_pitch, above.to(tl.float32))
        tl.store(cell_ptr + 6 * report_pitch, capped.to(tl.float32))
        if GRADIENT:
            tl.debug_barrier()  # every thread has the target's logit before any overwrites it
            _write_dlogits(
                row_ptr, vocabulary, target, target_raw, shift, total, logprob, entropy, d_loss, grad_entropy,
                softcap, scale, SOFTCAP, BONUS, LANES, UNROLL,
            )  # fmt: skip


@triton.jit
def _scale_kernel(values_ptr, factor_ptr, size, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, size, PROGRAMS * BLOCK):
            offset_B = start + tl.arange(0, BLOCK)
            values_B = tl.load(values_ptr + offset_B, mask=offset_B < size).to(tl.float32) * factor
            tl.store(values_ptr + offset_B, values_B.to(values_ptr.dtype.element_ty), mask=offset_B < size)


def fold_rows(
    logits_CV: Tensor, targets_C: Tensor, transform: LogitTransform, sums: SoftmaxSums, *, entropy: bool
) -> None:
    """Adds a part of each row's logits to its `sums`; a target outside of the part is negative or V and more."""
    flags = {"SOFTCAP": bool(transform.softcap), "ENTROPY": entropy}
    block = row_block(logits_CV.shape[1])
    _launch_rows(_fold_kernel, len(logits_CV), block, logits_CV, targets_C, *sums, *_constants(transform), **flags)


def dlogits_rows(
    logits_CV: Tensor,
    targets_C: Tensor,
    transform: LogitTransform,
    logprob_C: Tensor,
    entropy_C: Tensor | None,
    grad_logprob_C: Tensor,
    grad_entropy_C: Tensor | None,
) -> None:
    """Turns raw logits into their gradient in place."""
    arguments = (targets_C.contiguous(), logprob_C, entropy_C, grad_logprob_C, grad_entropy_C, *_constants(transform))
    flags = {"SOFTCAP": bool(transform.softcap), "ENTROPY": entropy_C is not None}
    _launch_rows(_dlogits_kernel, len(logits_CV), row_block(logits_CV.shape[1]), logits_CV, *arguments, **flags)


def loss_rows(
    logits_CV: Tensor,
    targets_C: Tensor,
    transform: LogitTransform,
    tokens: TokenInputs,
    options: LossOptions,
    report_FC: Tensor,
    *,
    gradient: bool,
) -> None:
    """Fills `report_FC` (`chunked.REPORT`) and, with `gradient`, turns raw logits into their gradient in place."""
    if options.tis_cap is None:
        tokens = tokens._replace(sampled_logprobs_N=None)
    # The kernel takes a field's elements for neighbours: a column of a matrix, or an expanded number, is copied.
    targets_C, fields = targets_C.contiguous(), [None if x is None else x.contiguous() for x in tokens]
    rows, vocabulary = logits_CV.shape
    bounds = (1.0 - options.clip_low, 1.0 + options.clip_high, options.clip_dual or 2 * math.exp(LOG_RATIO_BOUND))
    weights = (options.kl_weight, options.tis_cap or 0.0, options.entropy_weight)
    arguments = (targets_C, report_FC, report_FC.stride(0), *fields, *bounds, *weights, *_constants(transform), rows)
    constants = {"RATIO": options.ratio, "MASK": options.tis_mask, "KL": options.kl_estimator}
    constants |= {"BONUS": options.entropy_weight > 0, "GRADIENT": gradient, "SOFTCAP": bool(transform.softcap)}
    programs = min(rows, resident_rows(logits_CV.device, vocabulary))
    _launch_rows(_loss_kernel, programs, loss_row_block(vocabulary), logits_CV, *arguments, **constants)


def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor; a factor of 1 is seen on the device and costs one launch."""
    launch(_scale_kernel, SCALE_PROGRAMS, values, factor, values.numel(), PROGRAMS=SCALE_PROGRAMS, BLOCK=SCALE_BLOCK)


def _constants(transform: LogitTransform) -> tuple[float, float]:
    return transform.softcap or 0.0, LOG2_E.value / transform.temperature


def _launch_rows(
    kernel: triton.JITFunction, programs: int, block: RowBlock, logits_CV: Tensor, *arguments: object, **flags: object
) -> None:
    constants = {**flags, "LANES": block.lanes, "UNROLL": block.unroll, "num_warps": block.warps}
    launch(kernel, programs, logits_CV, logits_CV.stride(0), logits_CV.shape[1], *arguments, **constants)
