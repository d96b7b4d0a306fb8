"""The walk over chunks of logits: one product, one row pass, two gradient products each; never [N, V] at once.

Without a gradient, `forward_triton` takes its place for the heads that `product_folds` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.kernels import rows_torch
from fastgrpo.kernels.backend import is_hopper, triton_runs
from fastgrpo.kernels.reference import LogitTransform, LossOptions, SoftmaxSums, TokenInputs
from fastgrpo.kernels.tuning import (
    CHUNK_BYTES,
    COLUMN_MULTIPLE,
    FP32_SUM_BYTES,
    chunk_rows,
    folding_pays,
    forward_chunk,
)

# Rows of a report [F, N], fp32; the last five are the fields of `reference.PolicyLoss`.
REPORT = ("logprob", "entropy", "loss", "kl", "clipped_low", "clipped_high", "importance_capped")


class Gradients(NamedTuple):
    """Gradients asked for, in the dtype of what they belong to; an empty tensor where none was."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor


class Head(NamedTuple):
    """A linear head over V tokens and what happens to its logits before the softmax."""

    weight_VH: Tensor
    bias_V: Tensor | None
    transform: LogitTransform


class _LogitChunk(NamedTuple):
    rows: slice
    columns: slice
    hidden_CH: Tensor
    logits_CV: Tensor


def sum_in_fp32() -> None:
    """Keep partial sums of bf16 products in fp32 from now on: torch lets cuBLAS add the parts of a long one in bf16.

    For the whole process, and never undone: vLLM may decode in another thread, and the flag is torch's for all of them.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def row_passes(device: torch.device) -> ModuleType:
    """The row passes for tensors on this device."""
    if triton_runs(device):
        from fastgrpo.kernels import rows_triton

        return rows_triton
    return rows_torch


def product_folds(hidden_NH: Tensor, head: Head) -> bool:
    """Whether the forward pass is one product that folds its own tiles: bf16 on Hopper, no bias, no cap, whole tiles.

    Its copy engine reads rows of whole 16 bytes. Biases of minus infinity would leave it tiles without a softmax.
    """
    (rows, hidden), vocabulary, tensors = hidden_NH.shape, len(head.weight_VH), (hidden_NH, head.weight_VH)
    return (
        is_hopper(hidden_NH.device)
        and head.bias_V is None
        and head.transform.softcap is None
        and folding_pays(rows, hidden, vocabulary)
        and all(x.dtype == torch.bfloat16 and x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)
    )


def logprob_forward(
    hidden_NH: Tensor, targets_N: Tensor, head: Head, *, entropy: bool, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Target logprob and (empty if not asked for) entropy in nats, fp32 [N]."""
    if chunk is None and product_folds(hidden_NH, head):
        from fastgrpo.kernels import forward_triton

        logprob_N, entropy_N = forward_triton.logprob_forward(
            hidden_NH, targets_N, head.weight_VH, head.transform.temperature
        )
        return logprob_N, entropy_N if entropy else entropy_N.new_empty(0)
    passes, sums = row_passes(hidden_NH.device), SoftmaxSums.empty(targets_N)
    for part in _logit_chunks(hidden_NH, head, None, _forward_chunk(hidden_NH, head, chunk)):
        targets_C = targets_N[part.rows] - part.columns.start
        passes.fold_rows(part.logits_CV, targets_C, head.transform, sums.rows(part.rows), entropy=entropy)
    log_total_N = sums.total_N.log()
    logprob_N = (sums.target_N - sums.largest_N) / head.transform.temperature - log_total_N
    return logprob_N, log_total_N - sums.weighted_N / sums.total_N if entropy else log_total_N[:0]


def logprob_backward(
    hidden_NH: Tensor,
    targets_N: Tensor,
    head: Head,
    saved: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    *,
    wanted: Sequence[bool],
    chunk: int | None,
) -> Gradients:
    """Recomputes each chunk's logits and carries (grad_logprob_N, grad_entropy_N) to hidden, weight and bias."""
    passes, (logprob_N, entropy_N), (grad_logprob_N, grad_entropy_N) = row_passes(hidden_NH.device), saved, grads
    total = _GradientSum(hidden_NH, head, wanted)
    for rows, _, hidden_CH, logits_CV in _logit_chunks(hidden_NH, head, None, _chunk(len(targets_N), head, chunk)):
        entropy = (None, None) if grad_entropy_N is None else (entropy_N[rows], grad_entropy_N[rows])
        passes.dlogits_rows(
            logits_CV, targets_N[rows], head.transform, logprob_N[rows], entropy[0], grad_logprob_N[rows], entropy[1]
        )
        total.add(rows, hidden_CH, logits_CV)
    return total.result()


def loss_and_gradients(
    hidden_NH: Tensor,
    targets_N: Tensor,
    head: Head,
    tokens: TokenInputs,
    options: LossOptions,
    *,
    select: Callable[[], Tensor | None],
    wanted: Sequence[bool],
    chunk: int | None,
) -> tuple[Tensor, Gradients]:
    """One pass: report [F, N] (F as in `REPORT`; dropped tokens NaN in logprob and entropy, else 0) and gradients.

    `select` gives the indices of the tokens to compute, None for all; it may wait for the device, so it comes last.
    """
    passes, total = row_passes(hidden_NH.device), _GradientSum(hidden_NH, head, wanted)
    kept_K = select()
    if kept_K is not None:
        total.only(kept_K)
        targets_N, tokens = targets_N[kept_K], tokens.take(kept_K)
    report_FK = hidden_NH.new_empty(len(REPORT), len(targets_N), dtype=torch.float32)
    for rows, _, hidden_CH, logits_CV in _logit_chunks(hidden_NH, head, kept_K, _chunk(len(targets_N), head, chunk)):
        passes.loss_rows(
            logits_CV,
            targets_N[rows],
            head.transform,
            tokens.take(rows),
            options,
            report_FK[:, rows],
            gradient=any(wanted),
        )
        total.add(rows, hidden_CH, logits_CV)
    if kept_K is None:
        return report_FK, total.result()
    report_FN = report_FK.new_zeros(len(REPORT), len(hidden_NH))
    report_FN[:2] = torch.nan
    return report_FN.index_copy_(1, kept_K, report_FK), total.result()


def _chunk(rows: int, head: Head, chunk: int | None) -> tuple[int, int]:
    """(rows, columns) of each chunk where a gradient is wanted: it needs a row's whole softmax."""
    vocabulary, itemsize = len(head.weight_VH), head.weight_VH.element_size()
    return chunk or chunk_rows(head.weight_VH.device.type, max(rows, 1), vocabulary, itemsize), vocabulary


def _forward_chunk(hidden_NH: Tensor, head: Head, chunk: int | None) -> tuple[int, int]:
    """(rows, columns) of each chunk where none is: of `chunk` rows' size, in another shape."""
    device, vocabulary = hidden_NH.device.type, len(head.weight_VH)
    elements = chunk * vocabulary if chunk else CHUNK_BYTES[device] // hidden_NH.element_size()
    return forward_chunk(device, max(len(hidden_NH), 1), vocabulary, elements)


def _logit_chunks(
    hidden_NH: Tensor, head: Head, kept_K: Tensor | None, chunk: tuple[int, int]
) -> Iterator[_LogitChunk]:
    """Each chunk's logits, row by row of chunks; their buffer is the same memory every time but with a bias."""
    sum_in_fp32()
    rows_total, vocabulary = len(hidden_NH) if kept_K is None else len(kept_K), len(head.weight_VH)
    # Aligned rows: wide loads and the matrix units' fast path for any vocabulary.
    pitch = -(-chunk[1] // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    buffer_CV = hidden_NH.new_empty(min(chunk[0], rows_total) if head.bias_V is None else 0, pitch)
    # oneDNN reads the padding too, and multiplies it by 0, which does not make up for a NaN.
    buffer_CV[:, chunk[1] :].zero_()
    for start in range(0, rows_total, chunk[0]):
        rows = slice(start, min(start + chunk[0], rows_total))
        hidden_CH = hidden_NH[rows] if kept_K is None else hidden_NH[kept_K[rows]]
        for first in range(0, vocabulary, chunk[1]):
            columns = slice(first, min(first + chunk[1], vocabulary))
            weight_CH = head.weight_VH[columns]
            if head.bias_V is not None:
                # Into a buffer of that pitch, cuBLAS would round once before the bias and once after.
                logits_CV = F.linear(hidden_CH, weight_CH, head.bias_V[columns])
            else:
                logits_CV = buffer_CV[: len(hidden_CH), : len(weight_CH)]
                torch.mm(hidden_CH, weight_CH.T, out=logits_CV)
            yield _LogitChunk(rows, columns, hidden_CH, logits_CV)


class _GradientSum:
    """Gradients of the chunks so far: hidden's rows are written once, weight's and bias's are summed over chunks."""

    def __init__(self, hidden_NH: Tensor, head: Head, wanted: Sequence[bool]) -> None:
        weight_VH, bias_V = head.weight_VH, head.bias_V
        self.head, self.wanted, self.first = head, wanted, True
        self.kept_K: Tensor | None = None
        in_fp32 = not weight_VH.is_cuda or weight_VH.numel() * 4 <= FP32_SUM_BYTES
        sum_dtype = torch.float32 if in_fp32 else weight_VH.dtype
        self.hidden_NH = torch.empty_like(hidden_NH) if wanted[0] else hidden_NH.new_empty(0)
        self.weight_VH = torch.empty_like(weight_VH, dtype=sum_dtype) if wanted[1] else hidden_NH.new_empty(0)
        self.bias_V = hidden_NH.new_empty(0)
        if wanted[2] and bias_V is not None:
            self.bias_V = torch.zeros_like(bias_V, dtype=torch.float32)

    def only(self, kept_K: Tensor) -> None:
        """Chunks will hold these tokens; the others' hidden gradient is 0."""
        self.kept_K = kept_K
        self.hidden_NH.zero_()

    def add(self, rows: slice, hidden_CH: Tensor, dlogits_CV: Tensor) -> None:
        if self.wanted[0] and self.kept_K is not None:
            self.hidden_NH.index_copy_(0, self.kept_K[rows], dlogits_CV @ self.head.weight_VH)
        elif self.wanted[0]:
            torch.mm(dlogits_CV, self.head.weight_VH, out=self.hidden_NH[rows])
        if self.wanted[1]:
            _add_product(self.weight_VH, dlogits_CV.T, hidden_CH, overwrite=self.first)
        if self.wanted[2]:
            self.bias_V += dlogits_CV.sum(dim=0, dtype=torch.float32)
        self.first = False

    def result(self) -> Gradients:
        if self.wanted[1] and self.first:
            self.weight_VH.zero_()
        weight_VH = self.weight_VH.to(self.head.weight_VH.dtype)
        return Gradients(self.hidden_NH, weight_VH, self.bias_V.to(self.head.weight_VH.dtype))


def _add_product(sum_VH: Tensor, left_VC: Tensor, right_CH: Tensor, *, overwrite: bool) -> None:
    """sum += left @ right, each product and, where `sum_VH` is fp32, each sum in fp32."""
    if sum_VH.dtype == right_CH.dtype and overwrite:
        torch.mm(left_VC, right_CH, out=sum_VH)
    elif sum_VH.dtype == right_CH.dtype:
        sum_VH.addmm_(left_VC, right_CH)
    else:
        wide = sum_VH.is_cuda
        product_VH = (
            torch.mm(left_VC, right_CH, out_dtype=torch.float32) if wide else left_VC.float() @ right_CH.float()
        )
        torch.add(0.0 if overwrite else sum_VH, product_VH, out=sum_VH)
