"""Row passes over one chunk of logits in vectorised torch, for training on a CPU; twins of `rows_triton.py`'s."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.reference import (
    LogitTransform,
    LossOptions,
    SoftmaxSums,
    TokenInputs,
    policy_loss,
    policy_loss_slope,
    scaled_logits,
)


def fold_rows(
    logits_CV: Tensor, targets_C: Tensor, transform: LogitTransform, sums: SoftmaxSums, *, entropy: bool
) -> None:
    """Adds a part of each row's logits to its `sums`; a target outside of the part is negative or V and more."""
    capped_CV = scaled_logits(logits_CV, transform._replace(temperature=1.0))
    largest_C = torch.maximum(sums.largest_N, capped_CV.amax(dim=-1))
    inside_C = (targets_C >= 0) & (targets_C < logits_CV.shape[1])
    found_C = capped_CV.gather(1, targets_C.where(inside_C, 0)[:, None])[:, 0]
    sums.target_N.copy_(found_C.where(inside_C, sums.target_N))
    distance_CV = (capped_CV - largest_C[:, None]).div_(transform.temperature)
    change_C = (sums.largest_N - largest_C) / transform.temperature
    e_CV = distance_CV.exp()
    if entropy:
        sums.weighted_N.add_(sums.total_N * change_C).mul_(change_C.exp()).add_((distance_CV.mul_(e_CV)).sum(dim=-1))
    sums.total_N.mul_(change_C.exp()).add_(e_CV.sum(dim=-1))
    sums.largest_N.copy_(largest_C)


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
    logprobs_CV = torch.log_softmax(scaled_logits(logits_CV, transform), dim=-1)
    torch.gather(logprobs_CV, 1, targets_C[:, None], out=logprob_C[:, None])
    torch.sum(logprobs_CV.exp().mul_(logprobs_CV), dim=-1, out=entropy_C).neg_()
    torch.stack(policy_loss(logprob_C, tokens, options), out=report_FC[2:])
    grad_entropy_C = None
    if options.entropy_weight:
        grad_entropy_C = -options.entropy_weight * tokens.token_weights_N
        report_FC[2] += grad_entropy_C * entropy_C
    if gradient:
        grad_C = policy_loss_slope(logprob_C, tokens, options)
        _write_dlogits(logits_CV, logprobs_CV, targets_C, transform, entropy_C, grad_C, grad_entropy_C)


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
    target_C1 = targets_C[:, None]
    grad_CV.scatter_(1, target_C1, grad_CV.gather(1, target_C1) + grad_logprob_C[:, None])  # scatter_add_ is far slower
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
