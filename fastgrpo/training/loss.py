"""From a packed batch to GRPO's loss: the ratio's kind and the normaliser are two independent choices.

`config.LOSS_PRESETS` has what each name in the literature means by them.
The formulas themselves stand in `kernels`, in Triton and in the plain-torch oracle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastgrpo.kernels import LossOutput, linear_grpo_loss, linear_logprob
from fastgrpo.types import Batch

if TYPE_CHECKING:
    from fastgrpo.config import Grpo
    from fastgrpo.policy.model import Policy


def policy_loss(policy: Policy, batch: Batch, config: Grpo) -> LossOutput:
    """The batch's share of the step's GRPO loss; its gradient adds up over batches to the step's.

    Without `batch.old_logprobs_N` the step is on-policy: the old policy is the current one and every ratio is 1.
    """
    return policy.gathered(lambda: _policy_loss(policy, batch, config))


def _policy_loss(policy: Policy, batch: Batch, config: Grpo) -> LossOutput:
    hidden_NH = policy.hidden(batch)[batch.loss_index_N]
    sequence_log_ratio_N = None
    if config.ratio == "sequence":
        sequence_log_ratio_N = _sequence_log_ratio(policy, hidden_NH, batch, config.temperature)
    return linear_grpo_loss(
        hidden_NH,
        policy.head_weight,
        batch.targets_N,
        advantages_N=batch.advantages_N,
        token_weights_N=batch.weights_N,
        old_logprobs_N=batch.old_logprobs_N,
        ref_logprobs_N=batch.ref_logprobs_N,
        sampled_logprobs_N=batch.sampled_logprobs_N,
        sequence_log_ratio_N=sequence_log_ratio_N,
        ratio=config.ratio,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_weight=config.kl_weight,
        tis_cap=config.tis_cap or None,
        temperature=config.temperature,
    )


def sft_loss(policy: Policy, batch: Batch) -> torch.Tensor:
    """Weighted negative log-likelihood of the batch's loss tokens, a scalar in nats."""
    return policy.gathered(lambda: -(_token_logprobs(policy, batch, 1.0) * batch.weights_N).sum())


@torch.no_grad()
def token_logprobs(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    """logprob_N (fp32) of the batch's loss tokens under `policy` at `temperature`, without gradient."""
    return policy.gathered(lambda: _token_logprobs(policy, batch, temperature))


def _token_logprobs(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    hidden_NH = policy.hidden(batch)[batch.loss_index_N]
    return linear_logprob(hidden_NH, policy.head_weight, batch.targets_N, temperature=temperature, entropy=False)[0]


@torch.no_grad()
def _sequence_log_ratio(policy: Policy, hidden_NH: torch.Tensor, batch: Batch, temperature: float) -> torch.Tensor:
    """GSPO's length-normalised log ratio (arXiv 2507.18071, eq. 7), the same value for all tokens of a sequence."""
    if batch.old_logprobs_N is None:
        return torch.zeros_like(batch.weights_N)
    logprob_N = linear_logprob(hidden_NH, policy.head_weight, batch.targets_N, temperature=temperature, entropy=False)[
        0
    ]
    _, sequence_N = batch.sequence_N.unique(return_inverse=True)
    sums = torch.zeros(int(sequence_N.max()) + 1 if len(sequence_N) else 1, device=logprob_N.device)
    counts = torch.zeros_like(sums)
    sums.index_add_(0, sequence_N, logprob_N - batch.old_logprobs_N)
    counts.index_add_(0, sequence_N, torch.ones_like(logprob_N))
    return (sums / counts.clamp(min=1))[sequence_N]
