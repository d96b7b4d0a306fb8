"""From a packed batch to GRPO's loss: the ratio's kind and the normaliser are two independent choices.

`config.LOSS_PRESETS` has what each name in the literature means by them.
The formulas themselves stand in `kernels`, in Triton and in the plain-torch oracle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.errors import UserError, described
from fastgrpo.functions import find_function
from fastgrpo.kernels.head import LossOutput, linear_grpo_loss, linear_logprob
from fastgrpo.ranks.deadlines import within
from fastgrpo.types import Batch

if TYPE_CHECKING:
    from fastgrpo.config import Grpo
    from fastgrpo.policy.model import Policy

# For a loss function's micro-batch, which takes milliseconds, and its compilation, which takes minutes.
LOSS_S = 600.0


def policy_loss(policy: Policy, batch: Batch, config: Grpo) -> LossOutput:
    """The batch's share of the step's GRPO loss; its gradient adds up over batches to the step's.

    Without `batch.old_logprobs_N` the step is on-policy: the old policy is the current one and every ratio is 1.
    """
    return policy.gathered(lambda: _policy_loss(policy, batch, config))


def _policy_loss(policy: Policy, batch: Batch, config: Grpo) -> LossOutput:
    hidden_NH = policy.hidden(batch)[batch.loss_index_N]
    old_N, sampled_N, sequence_log_ratio_N = batch.old_logprobs_N, batch.sampled_logprobs_N, None
    if config.loss_function:
        return _custom_loss(policy, hidden_NH, batch, config)
    corrected = config.tis_cap and config.importance_correction.startswith("sequence")
    if corrected or (config.ratio == "sequence" and old_N is not None):
        old_N, sampled_N, sequence_log_ratio_N = _by_sequence(policy, hidden_NH, batch, config)
    return linear_grpo_loss(
        hidden_NH,
        targets_N=batch.targets_N,
        advantages_N=batch.advantages_N,
        token_weights_N=batch.weights_N,
        old_logprobs_N=old_N,
        sampled_logprobs_N=sampled_N,
        sequence_log_ratio_N=sequence_log_ratio_N,
        ratio=config.ratio,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        tis_cap=config.tis_cap or None,
        tis_mask=config.importance_correction.endswith("mask"),
        entropy_weight=config.entropy_weight,
        clip_dual=config.clip_dual or None,
        **_kl_term(batch, config),
        **policy.head(config.temperature),
    )


def _custom_loss(policy: Policy, hidden_NH: torch.Tensor, batch: Batch, config: Grpo) -> LossOutput:
    """The loss of `grpo.loss_function`: its slope is that of -r A with A = -slope, r = 1: the head's one pass has it.

    The KL term and the entropy bonus are added as ever. Its logprobs cost one more product with the head.
    """
    with torch.no_grad():
        logprobs_N = _head_logprobs(policy, hidden_NH, batch, config.temperature)
    old_N = logprobs_N if batch.old_logprobs_N is None else batch.old_logprobs_N
    loss_N, slope_N = custom_loss(
        config.loss_function,
        LossTokens(logprobs_N, old_N, batch.sampled_logprobs_N, batch.advantages_N, batch.weights_N, batch.sequence_N),
    )
    output = linear_grpo_loss(
        hidden_NH,
        targets_N=batch.targets_N,
        advantages_N=-slope_N,
        token_weights_N=batch.weights_N,
        old_logprobs_N=old_N,
        # Of its own, for which the KL term's may be another.
        sequence_log_ratio_N=torch.zeros_like(old_N),
        ratio="sequence",
        entropy_weight=config.entropy_weight,
        **_kl_term(batch, config),
        **policy.head(config.temperature),
    )
    return output._replace(loss=output.loss + ((loss_N - slope_N) * batch.weights_N).sum())


def _kl_term(batch: Batch, config: Grpo) -> dict[str, Any]:
    """The KL term's arguments of the loss. What is in the advantages already has no weight there, and is told alone."""
    if config.kl_estimator == "k1_reward":
        return {"ref_logprobs_N": batch.ref_logprobs_N, "kl_weight": 0.0, "kl_estimator": "k1"}
    return {
        "ref_logprobs_N": batch.ref_logprobs_N,
        "kl_weight": config.kl_weight,
        "kl_estimator": config.kl_estimator,
    }


def sft_loss(policy: Policy, batch: Batch) -> torch.Tensor:
    """Weighted negative log-likelihood of the batch's loss tokens, a scalar in nats."""
    return policy.gathered(lambda: -(_token_logprobs(policy, batch, 1.0) * batch.weights_N).sum())


@torch.no_grad()
def token_logprobs(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    """logprob_N (fp32) of the batch's loss tokens under `policy` at `temperature`, without gradient."""
    return policy.gathered(lambda: _token_logprobs(policy, batch, temperature))


def _token_logprobs(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    return _head_logprobs(policy, policy.hidden(batch)[batch.loss_index_N], batch, temperature)


def _head_logprobs(policy: Policy, hidden_NH: torch.Tensor, batch: Batch, temperature: float) -> torch.Tensor:
    return linear_logprob(hidden_NH, targets_N=batch.targets_N, entropy=False, **policy.head(temperature))[0]


@torch.no_grad()
def _by_sequence(
    policy: Policy, hidden_NH: torch.Tensor, batch: Batch, config: Grpo
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(old logprobs, sampler's logprobs, log ratio), [N] each: what gives every token its sequence's ratio and weight.

    GSPO's log ratio is the mean over a sequence's tokens (arXiv 2507.18071, eq. 7), and so is then that of a sequence's
    importance weight. Beside other ratios the weight is the sequence's own, the product of its tokens'.
    """
    logprobs_N = _head_logprobs(policy, hidden_NH, batch, config.temperature)
    old_N = logprobs_N if batch.old_logprobs_N is None else batch.old_logprobs_N
    by_mean, sampled_N = config.ratio == "sequence", batch.sampled_logprobs_N
    if config.importance_correction.startswith("sequence"):
        sampled_N = old_N - _over_sequence(old_N - sampled_N, batch.sequence_N, mean=by_mean)
    return old_N, sampled_N, _over_sequence(logprobs_N - old_N, batch.sequence_N, mean=True) if by_mean else None


def _over_sequence(values_N: torch.Tensor, sequence_N: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """The mean or the sum over each token's sequence."""
    sequences, index_N = sequence_N.unique(return_inverse=True)
    sums, counts = values_N.new_zeros(2, len(sequences)).unbind()
    sums.index_add_(0, index_N, values_N)
    counts.index_add_(0, index_N, torch.ones_like(values_N))
    return (sums / counts if mean else sums)[index_N]


class LossTokens(NamedTuple):
    """What `grpo.loss_function` is given of a micro-batch's N loss tokens: whole sequences, in order.

    fp32 [N]: the policy's logprobs, by which the loss is differentiated; those of the old policy (the policy's own
    where the step is on-policy) and the sampler's (vLLM's); the advantages; the normaliser's weights. sequence_N:
    int64, which sequence of the step a token belongs to.
    """

    logprobs_N: Tensor
    old_logprobs_N: Tensor
    sampled_logprobs_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    sequence_N: Tensor


def custom_loss(name: str, tokens: LossTokens) -> tuple[Tensor, Tensor]:
    """(loss, slope), detached fp32 [N] each: what the function `name` says of each token before its weight.

    The slope is that of the weighted sum by the token's logprob, divided by the token's weight: a loss may mix tokens,
    such as those of a sequence. Raises UserError where the function raises, or does not give one finite number for each
    token. The process ends where it hangs.
    """
    logprobs_N = tokens.logprobs_N.detach().requires_grad_()
    function = find_function(name, "grpo.loss_function")
    late = f"grpo.loss_function: {name} has not ended in {LOSS_S:g} s: mend it, then continue with --resume"
    with torch.enable_grad(), within(LOSS_S, late):
        try:
            answer = function(tokens._replace(logprobs_N=logprobs_N))
        except (Exception, SystemExit) as error:
            raise UserError(f"grpo.loss_function: {name} raised {described(error)}") from error
        loss_N = _checked(name, answer, tokens)
        (slope_N,) = torch.autograd.grad((loss_N * tokens.weights_N).sum(), logprobs_N)
    if not slope_N.isfinite().all():
        raise UserError(f"grpo.loss_function: the gradient of {name} is not finite for every token")
    return loss_N.detach(), torch.where(tokens.weights_N != 0, slope_N / tokens.weights_N, 0.0)


def _checked(name: str, loss_N: object, tokens: LossTokens) -> Tensor:
    shape = list(tokens.logprobs_N.shape)
    if not isinstance(loss_N, Tensor) or list(loss_N.shape) != shape or not loss_N.requires_grad:
        got = f"shape {list(loss_N.shape)}" if isinstance(loss_N, Tensor) else type(loss_N).__name__
        if got == f"shape {shape}":
            got = "one that they have no part in"
        raise UserError(
            f"grpo.loss_function: {name} must return a tensor {shape} made of tokens.logprobs_N, the loss of each "
            f"token before any mean, got {got}"
        )
    if not loss_N.isfinite().all():
        raise UserError(f"grpo.loss_function: {name} returned a loss that is not finite")
    return loss_N
