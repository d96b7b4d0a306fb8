"""Random heads and losses, their exact (fp64) and eager results, and the bar: no further off than eager torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels import LossOutput, linear_grpo_loss, linear_logprob, reference
from fastgrpo.kernels.reference import LogitTransform, LossOptions, TokenInputs

SLACK = 1e-5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter truncates to bf16 where a GPU rounds to nearest, and has no fused multiply-add.
FACTOR = 6.0 if INTERPRETED else 1.0
# A GPU's products of another shape add in another order, so bf16 logits round elsewhere than eager's: the errors are
# as large, but not the same, and the largest of few scatters.
SCATTER = 1.5 if torch.cuda.is_available() else 1.0


@dataclass
class Head:
    """Leaf tensors of one head and constants of its logits."""

    hidden_NH: Tensor
    weight_VH: Tensor
    targets_N: Tensor
    bias_V: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden_NH, self.weight_VH, self.bias_V) if x is not None]

    @property
    def transform(self) -> LogitTransform:
        return LogitTransform(self.temperature, self.softcap)

    def to(self, dtype: torch.dtype) -> Head:
        hidden_NH, weight_VH, *bias = (x.detach().to(dtype).requires_grad_() for x in self.leaves)
        return Head(hidden_NH, weight_VH, self.targets_N, bias[0] if bias else None, self.temperature, self.softcap)

    def keywords(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "softcap": self.softcap, "bias": self.bias_V}


def random_head(
    n: int, h: int, v: int, *, device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 2.0, **rest: Any
) -> Head:
    """Logits of standard deviation `scale`; targets at both edges of the vocabulary and anywhere between.

    Drawn on the CPU, so that every device is given the same head.
    """
    hidden_NH = (torch.randn(n, h) * scale).to(device, dtype).requires_grad_()
    weight_VH = (torch.randn(v, h) * h**-0.5).to(device, dtype).requires_grad_()
    targets_N = torch.randint(v, (n,))
    targets_N[0], targets_N[-1] = v - 1, 0
    if rest.pop("bias", False):
        rest["bias_V"] = torch.randn(v).to(device, dtype).requires_grad_()
    return Head(hidden_NH, weight_VH, targets_N.to(device), **rest)


def random_tokens(
    head: Head, *, normaliser: str = "token_mean", masked: float = 0.0, spread: float = 0.4
) -> TokenInputs:
    """Loss inputs around the head's own logprobs: some tokens clip low, some high, and none within a bf16 logprob's
    error of a clip, where its gradient would be all or nothing."""
    n, device = len(head.targets_N), head.hidden_NH.device
    with torch.no_grad():
        logprobs_N, _ = reference.linear_logprob(*_tensors(head), head.transform, head.bias_V)
    steps = torch.tensor([-2.5, -0.075, 0.075, 2.5])
    near = [logprobs_N + spread * steps[torch.randint(4, (n,))].to(device) for _ in range(3)]
    sequence_N = torch.arange(n, device=device) // 5
    weights = {
        "token_mean": torch.full((n,), 1.0 / n, device=device),
        "sequence_mean": 1.0 / (torch.bincount(sequence_N)[sequence_N] * (sequence_N[-1] + 1)),
        "constant": torch.full((n,), 1.0 / 4096, device=device),
    }
    weights_N = weights[normaliser].float() * (torch.rand(n) >= masked).to(device)
    sequence_ratio_N = (0.5 * torch.randn(n).to(device))[sequence_N]
    return TokenInputs(torch.randn(n).to(device), weights_N, near[0], near[1], near[2], sequence_ratio_N)


def _tensors(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    return head.hidden_NH, head.weight_VH, head.targets_N


def fused_loss(head: Head, tokens: TokenInputs, options: LossOptions, **rest: Any) -> LossOutput:
    keywords = tokens._asdict() | options._asdict() | head.keywords() | rest
    return linear_grpo_loss(*_tensors(head), **keywords)


def fused_logprob(head: Head, **rest: Any) -> tuple[Tensor, Tensor | None]:
    keywords = head.keywords() | rest
    return linear_logprob(*_tensors(head), **keywords)


def dense_loss(head: Head, tokens: TokenInputs, options: LossOptions, dtype: torch.dtype | None = None) -> list[Tensor]:
    """[loss, logprobs, entropy, *gradients] of the oracle, in another dtype if asked."""
    head = head if dtype is None else head.to(dtype)
    if dtype == torch.float64:
        tokens = TokenInputs._make(None if x is None else x.double() for x in tokens)
    loss, logprobs_N, entropy_N, _ = reference.linear_grpo_loss(
        *_tensors(head), tokens, options, head.transform, head.bias_V
    )
    return [loss.detach(), logprobs_N, entropy_N, *torch.autograd.grad(loss, head.leaves)]


def dense_logprob(head: Head, grads: tuple[Tensor, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """[logprob, entropy, *gradients] of the oracle for incoming gradients `grads`."""
    head = head if dtype is None else head.to(dtype)
    outputs = reference.linear_logprob(*_tensors(head), head.transform, head.bias_V)
    found = torch.autograd.grad(outputs, head.leaves, [g.to(outputs[0].dtype) for g in grads])
    return [x.detach() for x in (*outputs, *found)]


def assert_as_good_as_eager(
    ours: list[Tensor], eager: list[Tensor], exact: list[Tensor], keep: slice | Tensor = slice(None)
) -> None:
    """Largest error at most eager torch's own in the same dtype + 1e-5, for each of the results."""
    assert len(ours) == len(eager) == len(exact)
    dtype = ours[-1].dtype
    for i, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        rows: slice | Tensor | EllipsisType = keep if i in (1, 2) and truth.dim() == 1 else ...
        error, allowed = (_largest((x.double() - truth)[rows]) for x in (mine, theirs))
        if truth.dim() == 0:  # one number's error is luck: a loss may be as far off as one of its logprobs
            allowed = max(allowed, _largest((eager[1].double() - exact[1])[keep]))
        factor = FACTOR * (SCATTER if dtype == torch.bfloat16 else 1.0)
        assert error <= factor * allowed + SLACK, f"result {i}: error {error:.3g}, eager's {allowed:.3g}"


def _largest(errors: Tensor) -> float:
    return errors.abs().max().item() if errors.numel() else 0.0
