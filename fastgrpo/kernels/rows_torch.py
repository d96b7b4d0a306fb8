"""Row passes over one chunk of logits in vectorised torch, for training on a CPU; twins of `rows_triton.py`'s."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.reference import (
    LogitTransform,
    LossOptions,
    TokenInputs,
    policy_loss,
    policy_loss_slope,
    scaled_logits,
)


def logprob_rows(
    logits_CV: Tensor, targets_C: Tensor, transform: LogitTransform, logprob_C: Tensor, entropy_C: Tensor | None
) -> Tensor:
    """Writes each row's target logprob and entropy; returns log_softmax [C, V], fp32."""
    logprobs_CV = torch.log_softmax(scaled_logits(logits_CV, transform), dim=-1)
    torch.gather(logprobs_CV, 1, targets_C[:, None], out=logprob_C[:, None])
    if entropy_C is not None:
        torch.sum(logprobs_CV.exp().mul_(logprobs_CV), dim=-1, out=entropy_C).neg_()
    return logprobs_CV


def dlogits_rows(
    logits_CV: Tensor,
    targets_C: Tensor,
    transform: LogitTransform,
    logprob_C: Tensor,
    entropy_C: Tensor | None,
    grad_logprob_C: Tensor,
    grad_entropy_C: Tensor | None,
) -> None:
    """Turns raw logits into their gradient in place: g (1[v = target] - p) - g_entropy p (log p + entropy)."""
    scaled_CV = scaled_logits(logits_CV, transform)
    shift_C = scaled_CV.gather(1, targets_C[:, None]) - logprob_C[:, None]
    logprobs_CV = scaled_CV - shift_C
    _write_dlogits(logits_CV, logprobs_CV, targets_C, transform, entropy_C, grad_logprob_C, grad_entropy_C)


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
    logprob_C, entropy_C = report_FC[0], report_FC[1]
    logprobs_CV = logprob_rows(logits_CV, targets_C, transform, logprob_C, entropy_C)
    torch.stack(policy_loss(logprob_C, tokens, options), out=report_FC[2:])
    if gradient:
        grad_C = policy_loss_slope(logprob_C, tokens, options)
        _write_dlogits(logits_CV, logprobs_CV, targets_C, transform, None, grad_C, None)


def _write_dlogits(
    logits_CV: Tensor,
    logprobs_CV: Tensor,
    targets_C: Tensor,
    transform: LogitTransform,
    entropy_C: Tensor | None,
    grad_logprob_C: Tensor,
    grad_entropy_C: Tensor | None,
) -> None:
    slope_CV = _softcap_slope(logits_CV, transform)
    if grad_entropy_C is None or entropy_C is None:
        grad_CV = logprobs_CV.exp_().mul_(-grad_logprob_C[:, None])
    else:
        weight_CV = grad_logprob_C[:, None] + grad_entropy_C[:, None] * (logprobs_CV + entropy_C[:, None])
        grad_CV = logprobs_CV.exp_().mul_(weight_CV).neg_()
    grad_CV.scatter_add_(1, targets_C[:, None], grad_logprob_C[:, None])
    if transform.temperature != 1.0:
        grad_CV.div_(transform.temperature)
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    logits_CV.copy_(grad_CV)


def _softcap_slope(logits_CV: Tensor, transform: LogitTransform) -> Tensor | None:
    if transform.softcap is None:
        return None
    capped_CV = scaled_logits(logits_CV, transform._replace(temperature=1.0)) / transform.softcap
    return 1.0 - capped_CV.square()
