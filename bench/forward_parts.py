"""What both fused forward passes share: the parts that tiles of logits leave, folded into logprob and entropy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.rows_triton import LN_2, PADDING

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
def _finish_kernel(
    parts_ptr, target_ptr, logprob_ptr, entropy_ptr, rows, parts, scale,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
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
        if ENTROPY:
            moved_PR = tl.load(cell_PR + 2 * plane, mask=inside_PR, other=0.0) + sum_PR * change_PR
            weighted_R = (weighted_R + total_R * change_R) * tl.exp2(change_R)
            weighted_R += tl.sum(moved_PR * tl.exp2(change_PR), axis=0)
        total_R = total_R * tl.exp2(change_R) + tl.sum(sum_PR * tl.exp2(change_PR), axis=0)
        largest_R = new_largest_R
    target_R = tl.load(target_ptr + row_R, mask=row_R < rows, other=0.0)
    log_total_R = tl.log2(total_R)
    logprob_R = ((target_R - largest_R) * scale - log_total_R) * LN_2
    tl.store(logprob_ptr + row_R, logprob_R, mask=row_R < rows)
    if ENTROPY:
        tl.store(entropy_ptr + row_R, (log_total_R - weighted_R / total_R) * LN_2, mask=row_R < rows)


def fits(hidden_NH: Tensor, weight_VH: Tensor) -> bool:
    """Whether this pass takes them: bf16 on a Hopper GPU, in rows of whole 16 bytes, as its copy engine reads them."""
    if hidden_NH.dtype != torch.bfloat16 or not hidden_NH.is_cuda or torch.cuda.get_device_capability()[0] != 9:
        return False
    return len(hidden_NH) > 0 and all(
        x.stride(0) % 8 == x.data_ptr() % 16 == 0 and x.stride(1) == 1 for x in (hidden_NH, weight_VH)
    )


def finish(parts_3PN: Tensor, target_N: Tensor, outputs: tuple[Tensor, Tensor], scale: float, *, entropy: bool) -> None:
    """Fills logprob and, if asked for, entropy [N] from the tiles' parts."""
    _, parts, rows = parts_3PN.shape
    flags = {"ENTROPY": entropy, "ROWS": 32, "PARTS": 32}
    _finish_kernel[(triton.cdiv(rows, 32),)](parts_3PN, target_N, *outputs, rows, parts, scale, **flags)
