"""Plain-torch oracle of the loss head: every formula once, holding the whole [N, V].

The vectorised CPU path calls `scaled_logits`, `policy_loss` and its slope from here chunk by chunk, so the mathematics
exists twice in this project: here, and in `rows_triton.py`, whose tests compare it with this file.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Ratio = Literal["token", "sequence", "cispo"]

# exp() of a log ratio stays finite in fp32 and the gradient stops where a policy has moved by a factor of e^20.
LOG_RATIO_BOUND = 20.0

# Added to grpo's standard deviation of rewards: small beside any spread that is not rounding.
STD_EPSILON = 1e-6


class LogitTransform(NamedTuple):
    """From raw logits to those of the softmax: `softcap * tanh(raw / softcap) / temperature`."""

    temperature: float = 1.0
    softcap: float | None = None


class TokenInputs(NamedTuple):
    """What the loss knows of each token, fp32 [N]; see `fastgrpo.kernels.linear_grpo_loss`."""

    advantages_N: Tensor
    token_weights_N: Tensor
    old_logprobs_N: Tensor | None = None
    ref_logprobs_N: Tensor | None = None
    sampled_logprobs_N: Tensor | None = None
    sequence_log_ratio_N: Tensor | None = None

    def take(self, rows: slice | Tensor) -> TokenInputs:
        """The same record of some of the tokens."""
        return TokenInputs._make(None if field_N is None else field_N[rows] for field_N in self)


class LossOptions(NamedTuple):
    """The loss's constants; see `fastgrpo.kernels.linear_grpo_loss`."""

    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    tis_cap: float | None = None
    tis_mask: bool = False
    entropy_weight: float = 0.0
    clip_dual: float | None = None


class PolicyLoss(NamedTuple):
    """Per token, fp32 [N]: the weighted loss, differentiable, and its detached report (flags are 0 or 1)."""

    loss_N: Tensor
    kl_N: Tensor
    clipped_low_N: Tensor
    clipped_high_N: Tensor
    importance_capped_N: Tensor


class SoftmaxSums(NamedTuple):
    """What is known of each row's softmax after some of its logits x, fp32 [N]; x counts before the temperature t.

    largest: max x. total: sum of e = exp((x - largest) / t). weighted: sum of e (x - largest) / t. target: the
    target's x, 0 until its part has been seen.
    """

    largest_N: Tensor
    total_N: Tensor
    weighted_N: Tensor
    target_N: Tensor

    @classmethod
    def empty(cls, targets_N: Tensor) -> SoftmaxSums:
        """Nothing seen yet. The largest is finite, so that its distance to itself is 0."""
        zeros_3N = targets_N.new_zeros(3, len(targets_N), dtype=torch.float32)
        return cls(zeros_3N.new_full((len(targets_N),), -1e30), *zeros_3N.unbind())

    def rows(self, rows: slice) -> SoftmaxSums:
        """A view of some rows."""
        return SoftmaxSums(*(value_N[rows] for value_N in self))


def scaled_logits(raw_NV: Tensor, transform: LogitTransform) -> Tensor:
    """Softmax inputs in at least fp32 from the raw logits, hidden @ weight.T + bias."""
    logits_NV = raw_NV.to(torch.promote_types(raw_NV.dtype, torch.float32))
    if transform.softcap is not None:
        logits_NV = transform.softcap * torch.tanh(logits_NV / transform.softcap)
    return logits_NV if transform.temperature == 1.0 else logits_NV / transform.temperature


def importance_weight(old_N: Tensor, tokens: TokenInputs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Importance weight w = pi_old / pi_sampler and where w > cap: there it is the cap (Yao et al. 2025, TIS), or 0."""
    if tokens.sampled_logprobs_N is None or options.tis_cap is None:
        return torch.ones_like(old_N), torch.zeros_like(old_N)
    weight_N = (old_N - tokens.sampled_logprobs_N).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    above_N, beyond = weight_N > options.tis_cap, 0.0 if options.tis_mask else options.tis_cap
    return weight_N.masked_fill(above_N, beyond), above_N.to(old_N.dtype)


def policy_ratio(logprobs_N: Tensor, old_N: Tensor, tokens: TokenInputs, options: LossOptions) -> Tensor:
    """pi / pi_old by token, or by sequence with the gradient of each token (GSPO-token, arXiv 2507.18071, eq. 13)."""
    log_ratio_N = logprobs_N - old_N
    if options.ratio == "sequence":
        log_ratio_N = logprobs_N - logprobs_N.detach()
        if tokens.sequence_log_ratio_N is not None:
            log_ratio_N = log_ratio_N + tokens.sequence_log_ratio_N
    return log_ratio_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def policy_loss(logprobs_N: Tensor, tokens: TokenInputs, options: LossOptions) -> PolicyLoss:
    """Loss of each token, times its weight.

    token, sequence: -min(r A, clip(r, 1 - low, 1 + high) A) (PPO; DAPO's clip-higher, arXiv 2503.14476, eq. 10), where
    A < 0 with r at most `clip_dual` (dual-clip PPO, arXiv 1912.09729, eq. 5);
    cispo: -stop_gradient(clip(r, 1 - low, 1 + high)) A log pi (arXiv 2506.13585, eq. 4).
    Both times the truncated importance weight, plus kl_weight * k3, k3 = exp(d) - d - 1 with d = log pi_ref - log pi.
    """
    advantages_N = tokens.advantages_N
    old_N = logprobs_N.detach() if tokens.old_logprobs_N is None else tokens.old_logprobs_N
    ratio_N = policy_ratio(logprobs_N, old_N, tokens, options)
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    below_N, above_N = ratio_N.detach() < low, ratio_N.detach() > high
    if options.ratio == "cispo":
        objective_N = ratio_N.detach().clamp(low, high) * advantages_N * logprobs_N
    else:
        dual = options.clip_dual or 2 * math.exp(LOG_RATIO_BOUND)  # no ratio is above it
        beyond_N = (advantages_N < 0) & (ratio_N.detach() > dual)
        objective_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
        objective_N = torch.where(beyond_N, dual * advantages_N, objective_N)
        below_N, above_N = below_N & (advantages_N < 0), (above_N & (advantages_N > 0)) | beyond_N
    importance_N, capped_N = importance_weight(old_N, tokens, options)
    loss_N, kl_N = -importance_N * objective_N, torch.zeros_like(old_N)
    if tokens.ref_logprobs_N is not None:
        difference_N = (tokens.ref_logprobs_N - logprobs_N).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        kl_N = difference_N.exp() - difference_N - 1.0
        loss_N = loss_N + options.kl_weight * kl_N
    flags = (below_N.to(old_N.dtype), above_N.to(old_N.dtype), capped_N)
    return PolicyLoss(loss_N * tokens.token_weights_N, kl_N.detach(), *flags)


def policy_loss_slope(logprobs_N: Tensor, tokens: TokenInputs, options: LossOptions) -> Tensor:
    """d loss / d logprob of `policy_loss` in closed form, fp32 [N]; autograd's to rounding."""
    old_N = logprobs_N if tokens.old_logprobs_N is None else tokens.old_logprobs_N
    ratio_N = policy_ratio(logprobs_N, old_N, tokens, options)
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    if options.ratio == "cispo":
        slope_N = ratio_N.clamp(low, high) * tokens.advantages_N
    else:
        bound = math.exp(LOG_RATIO_BOUND)
        within_N = (ratio_N >= low) & (ratio_N <= (options.clip_dual or bound))
        unclipped_N = torch.where(tokens.advantages_N > 0, ratio_N <= high, within_N)
        slope_N = ratio_N * tokens.advantages_N * (unclipped_N & (ratio_N < bound) & (ratio_N > 1 / bound))
    slope_N = -slope_N * importance_weight(old_N, tokens, options)[0]
    if tokens.ref_logprobs_N is not None:
        difference_N = tokens.ref_logprobs_N - logprobs_N
        inside_N = difference_N.abs() <= LOG_RATIO_BOUND
        slope_N = slope_N + options.kl_weight * torch.where(inside_N, 1.0 - difference_N.exp(), 0.0)
    return slope_N * tokens.token_weights_N


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    transform: LogitTransform | None = None,
    bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row in nats, in the inputs' dtype promoted to fp32."""
    logits_NV = scaled_logits(F.linear(hidden_NH, weight_VH, bias_V), transform or LogitTransform())
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    logprob_N = logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    return logprob_N, -(logprobs_NV.exp() * logprobs_NV).sum(dim=-1)


def linear_grpo_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    tokens: TokenInputs,
    options: LossOptions,
    transform: LogitTransform | None = None,
    bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, PolicyLoss]:
    """(loss, logprobs_N, entropy_N, per-token report); the loss is the sum of the weighted token losses.

    The bonus, `entropy_weight` times each token's weighted entropy, is in the loss and not in the report.
    """
    logprobs_N, entropy_N = linear_logprob(hidden_NH, weight_VH, targets_N, transform, bias_V)
    report = policy_loss(logprobs_N, tokens, options)
    bonus = options.entropy_weight * (tokens.token_weights_N * entropy_N).sum()
    return report.loss_N.sum() - bonus, logprobs_N.detach(), entropy_N.detach(), report
