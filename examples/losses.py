"""Losses of papers that are no preset, written as `grpo.loss_function` takes them; run from the repository's folder:

    python -m fastgrpo.train --grpo.loss grpo --grpo.loss_function examples.losses:sapo ...

Their papers take the mean over each answer's tokens, then over answers, as `grpo.loss` grpo does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.training.loss import LossTokens


def sapo(tokens: LossTokens, positive: float = 1.0, negative: float = 1.05) -> Tensor:
    """SAPO (arXiv 2511.20347): a soft gate in place of the clip, sharper where the advantage is negative."""
    ratio_N = (tokens.logprobs_N - tokens.old_logprobs_N).exp()
    sharpness_N = torch.where(tokens.advantages_N > 0, positive, negative)
    return -4 / sharpness_N * torch.sigmoid(sharpness_N * (ratio_N - 1)) * tokens.advantages_N


def gmpo(tokens: LossTokens, bound: float = 0.4) -> Tensor:
    """GMPO (arXiv 2507.20673): the geometric mean of an answer's ratios, each clipped in the log to `bound`."""
    log_ratio_N, sign_N = tokens.logprobs_N - tokens.old_logprobs_N, tokens.advantages_N.sign()
    clipped_N = sign_N * torch.minimum(sign_N * log_ratio_N, sign_N * log_ratio_N.clamp(-bound, bound))
    return -of_answers(clipped_N, tokens.sequence_N).exp() * tokens.advantages_N


def off_policy_masked(tokens: LossTokens, threshold: float = 0.05, low: float = 0.2, high: float = 0.2) -> Tensor:
    """DeepSeek-V3.2's mask (arXiv 2512.02556, eq. 9) on GRPO's clip: of what was done badly only what is still likely.

    An answer with a negative advantage is left out where its tokens have lost more than `threshold` nats in the mean
    since they were sampled.
    """
    ratio_N = (tokens.logprobs_N - tokens.old_logprobs_N).exp()
    clipped_N = torch.minimum(ratio_N * tokens.advantages_N, ratio_N.clamp(1 - low, 1 + high) * tokens.advantages_N)
    lost_N = of_answers(tokens.sampled_logprobs_N - tokens.logprobs_N.detach(), tokens.sequence_N)
    return -clipped_N * ((tokens.advantages_N >= 0) | (lost_N <= threshold))


def of_answers(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """The mean over each token's answer."""
    _, answer_N = sequence_N.unique(return_inverse=True)
    counts_S = answer_N.bincount()
    return (values_N.new_zeros(len(counts_S)).index_add(0, answer_N, values_N) / counts_S)[answer_N]
