"""A policy loss of the user's own over the tokens' logprobs, in place of ratio, clips and importance weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.errors import UserError
from fastgrpo.functions import find_function


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
    token.
    """
    logprobs_N = tokens.logprobs_N.detach().requires_grad_()
    function = find_function(name, "grpo.loss_function")
    with torch.enable_grad():
        try:
            answer = function(tokens._replace(logprobs_N=logprobs_N))
        except Exception as error:
            raise UserError(f"grpo.loss_function: {name} raised {type(error).__name__}: {error}") from error
        loss_N = _checked(name, answer, tokens)
        (slope_N,) = torch.autograd.grad((loss_N * tokens.weights_N).sum(), logprobs_N)
    if not slope_N.isfinite().all():
        raise UserError(f"grpo.loss_function: the gradient of {name} is not finite for every token")
    return loss_N.detach(), torch.where(tokens.weights_N != 0, slope_N / tokens.weights_N, 0.0)


def _checked(name: str, loss_N: object, tokens: LossTokens) -> Tensor:
    shape = list(tokens.logprobs_N.shape)
    if not isinstance(loss_N, Tensor) or list(loss_N.shape) != shape or not loss_N.requires_grad:
        got = f"shape {list(loss_N.shape)}" if isinstance(loss_N, Tensor) else type(loss_N).__name__
        raise UserError(f"grpo.loss_function: {name} must return a tensor {shape} made of tokens.logprobs_N, got {got}")
    if not loss_N.isfinite().all():
        raise UserError(f"grpo.loss_function: {name} returned a loss that is not finite")
    return loss_N
