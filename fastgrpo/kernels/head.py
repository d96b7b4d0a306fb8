"""The loss head: linear layer, softmax and policy loss in one, over any device, in memory independent of N x V."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.kernels import ops, validate
from fastgrpo.kernels.reference import KlEstimator, LossOptions, Ratio, TokenInputs


class LossStatistics(NamedTuple):
    """Sums over computed tokens, 0-d fp32 on the device, so that micro-batches add up."""

    tokens: Tensor
    entropy: Tensor
    kl: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    importance_capped: Tensor

    def merge(self, other: LossStatistics) -> LossStatistics:
        """Statistics of both micro-batches together."""
        return LossStatistics._make(mine + theirs for mine, theirs in zip(self, other, strict=True))


class LossOutput(NamedTuple):
    """loss: 0-d fp32, differentiable; logprobs_N, entropy_N: nats, fp32 [N], detached, NaN for a dropped token."""

    loss: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor
    statistics: LossStatistics


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    entropy: bool = True,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of each row, in nats, without ever holding [N, V].

    hidden_NH [N, H] and weight_VH [V, H]: float32 or bfloat16, one dtype and device; targets_N: int64 in [0, V).
    The logits are `softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature`. `chunk` overrides how many
    rows of logits are held at a time. Returns fp32 [N] logprob and entropy (None with `entropy=False`), both
    differentiable with respect to hidden, weight and bias; the backward pass recomputes the logits.

    Raises ValueError naming the argument for wrong shapes, dtypes, devices or targets outside the vocabulary.
    """
    validate.head_arguments(hidden_NH, weight_VH, targets_N, bias, temperature, softcap, chunk)
    arguments = (hidden_NH, weight_VH, bias, targets_N, float(temperature), softcap, entropy, chunk)
    logprob_N, entropy_N = torch.ops.fastgrpo.linear_logprob(*arguments)
    return logprob_N, entropy_N if entropy else None


def linear_grpo_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    advantages_N: Tensor,
    token_weights_N: Tensor,
    old_logprobs_N: Tensor | None = None,
    ref_logprobs_N: Tensor | None = None,
    sampled_logprobs_N: Tensor | None = None,
    sequence_log_ratio_N: Tensor | None = None,
    ratio: Ratio = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
    tis_cap: float | None = None,
    tis_mask: bool = False,
    entropy_weight: float = 0.0,
    clip_dual: float | None = None,
    kl_estimator: KlEstimator = "k3",
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> LossOutput:
    """Policy loss and its gradients in one pass over token chunks: three matrix products and no recomputation.

    hidden_NH, weight_VH, targets_N, temperature, bias, softcap, chunk: as in `linear_logprob`. The others are fp32 [N].
    loss = sum over tokens of token_weights_N times the token's loss (`reference.policy_loss`), so every normaliser
    (token mean, sequence mean, constant) and every mask is a choice of `token_weights_N`.

    ratio "token": PPO's clipped ratio to `old_logprobs_N` (grpo, dapo, dr_grpo; None means on-policy: ratio 1);
    "sequence": the ratio's value is exp(sequence_log_ratio_N), its gradient each token's (gspo);
    "cispo": clipped and detached ratio times logprob. `kl_weight` weighs `kl_estimator`'s estimate of KL(policy,
    reference) (`reference.kl_estimate`). `tis_cap` caps the detached weight exp(old - sampled) that multiplies the
    policy term; with `tis_mask` one above it is 0. `entropy_weight` times the entropy is a bonus, whose gradient comes
    from the same pass. `clip_dual` bounds the ratio of tokens with a negative advantage, which the clip does not (not
    for "cispo", whose clip does).

    Tokens of zero weight, or of zero advantage where `kl_weight` and `entropy_weight` are 0, cost nothing: they are
    dropped before any product, get no gradient and no statistics, and may have any target. Gradients are made here and
    scaled in backward, which can run once.

    Raises ValueError naming the argument for wrong shapes, dtypes, devices, options or targets outside the vocabulary.
    """
    validate.head_arguments(hidden_NH, weight_VH, targets_N, bias, temperature, softcap, chunk)
    tokens = TokenInputs(
        advantages_N, token_weights_N, old_logprobs_N, ref_logprobs_N, sampled_logprobs_N, sequence_log_ratio_N
    )
    options = LossOptions(
        ratio,
        float(clip_low),
        float(clip_high),
        float(kl_weight),
        tis_cap,
        tis_mask,
        float(entropy_weight),
        clip_dual,
        kl_estimator,
    )
    validate.loss_arguments(hidden_NH, tokens, options)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_NH, weight_VH, bias)]
    loss, report_FN, statistics, *_ = torch.ops.fastgrpo.linear_grpo_loss(
        hidden_NH, weight_VH, bias, targets_N, *tokens, *options, float(temperature), softcap, wanted, chunk
    )
    logprobs_N, entropy_N = report_FN[0].detach(), report_FN[1].detach()
    return LossOutput(loss, logprobs_N, entropy_N, LossStatistics(*statistics.detach().unbind()))


__all__ = ["LossOutput", "LossStatistics", "linear_grpo_loss", "linear_logprob", "ops"]
