"""Sums over the copies of gathered rows in Triton: each gradient is read once, no atomics, the same sum every time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_copies_kernel(grad_ptr, copies_ptr, first_ptr, sum_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_B = tl.zeros([BLOCK], tl.float32)
    for number in range(tl.load(first_ptr + row), tl.load(first_ptr + row + 1)):
        copy_ptr = grad_ptr + tl.load(copies_ptr + number).to(tl.int64) * width + column_B
        sum_B += tl.load(copy_ptr, mask=column_B < width, other=0.0).to(tl.float32)
    tl.store(sum_ptr + row * width + column_B, sum_B.to(sum_ptr.dtype.element_ty), mask=column_B < width)


def sum_copies(grad_UGD: Tensor, copies_U: Tensor, first_T: Tensor) -> Tensor:
    """`gather.sum_copies`."""
    rows, width = len(first_T) - 1, grad_UGD[:1].numel()
    sum_TGD = grad_UGD.new_empty(rows, *grad_UGD.shape[1:])
    block = min(triton.next_power_of_2(width), 1024)
    if rows and width:
        grid = (rows, triton.cdiv(width, block))
        _sum_copies_kernel[grid](
            grad_UGD.contiguous(), copies_U, first_T, sum_TGD, width, BLOCK=block, num_warps=max(block // 256, 1)
        )
    return sum_TGD
