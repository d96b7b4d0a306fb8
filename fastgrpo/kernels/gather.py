"""Rows gathered several times each, whose gradient is the sum over their copies: keys and values of a shared prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.kernels.backend import triton_runs


def gather_rows(rows_TGD: Tensor, index_U: Tensor, copies_U: Tensor, first_T: Tensor) -> Tensor:
    """`rows_TGD[index_U]`; `copies_U` and `first_T` are `copies_of(index_U)`. Sums of gradients are fp32, in order."""
    out: Tensor = _Gathered.apply(rows_TGD, index_U, copies_U, first_T)
    return out


def copies_of(index_U: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(where in `index_U` each row is, row after row; the number of the first for each row, of all at the end)."""
    counts = np.bincount(index_U, minlength=rows)
    return np.argsort(index_U, kind="stable"), np.concatenate([[0], np.cumsum(counts)])


@torch.library.custom_op("fastgrpo::sum_copies", mutates_args=())
def sum_copies(grad_UGD: Tensor, index_U: Tensor, copies_U: Tensor, first_T: Tensor) -> Tensor:
    """The gradient of the rows from that of their copies."""
    rows = len(first_T) - 1
    if triton_runs(grad_UGD.device):
        from fastgrpo.kernels import gather_triton

        return gather_triton.sum_copies(grad_UGD, copies_U, first_T)
    sum_TGD = grad_UGD.new_zeros(rows, *grad_UGD.shape[1:], dtype=torch.float32)
    return sum_TGD.index_add_(0, index_U, grad_UGD.float()).to(grad_UGD.dtype)


@sum_copies.register_fake
def _(grad_UGD: Tensor, index_U: Tensor, copies_U: Tensor, first_T: Tensor) -> Tensor:
    return grad_UGD.new_empty(first_T.shape[0] - 1, *grad_UGD.shape[1:])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TGD: Tensor, index_U: Tensor, copies_U: Tensor, first_T: Tensor) -> Tensor:
        ctx.save_for_backward(index_U, copies_U, first_T)
        return rows_TGD.index_select(0, index_U)

    @staticmethod
    def backward(ctx: Any, grad_UGD: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.ops.fastgrpo.sum_copies(grad_UGD.contiguous(), *ctx.saved_tensors), None, None, None
