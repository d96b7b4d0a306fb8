"""The loss head as `torch.library` operators, so that autograd, `torch.compile` and `opcheck` know it.

Values that live on the device (targets in range, which tokens count) are checked here, with one transfer for each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, cast

import torch
from torch import Tensor

from fastgrpo.kernels import chunked, validate
from fastgrpo.kernels.backend import triton_runs
from fastgrpo.kernels.chunked import Head
from fastgrpo.kernels.reference import KlEstimator, LogitTransform, LossOptions, Ratio, TokenInputs

OptionalTensor = Optional[Tensor]  # noqa: UP045 - the operator schema's parser knows this spelling in every version


@torch.library.custom_op("fastgrpo::linear_logprob", mutates_args=())
def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: OptionalTensor,
    targets_N: Tensor,
    temperature: float,
    softcap: Optional[float],  # noqa: UP045
    entropy: bool,
    chunk: Optional[int],  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    finish_check = _begin_target_check(targets_N, len(weight_VH))
    head = Head(weight_VH, bias_V, LogitTransform(temperature, softcap))
    outputs = chunked.logprob_forward(hidden_NH, targets_N, head, entropy=entropy, chunk=chunk)
    finish_check()
    return outputs


def _begin_target_check(targets_N: Tensor, vocabulary: int) -> Callable[[], None]:
    """Starts the check that targets index the vocabulary; the returned function finishes it."""
    if not len(targets_N):
        return lambda: None
    fetch = _begin_fetch(torch.stack(torch.aminmax(targets_N)))

    def finish() -> None:
        lowest, highest = fetch()
        validate.target_range(lowest, highest, vocabulary)

    if not targets_N.is_cuda:
        finish()  # before torch's own gather would complain
    return finish


def _begin_fetch(values: Tensor) -> Callable[[], list[int]]:
    """Starts a copy to the host; the returned function waits for it, but not for work queued after this call."""
    if not values.is_cuda:
        return values.tolist
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))

    def finish() -> list[int]:
        arrived.synchronize()
        return on_host.tolist()

    return finish


@linear_logprob.register_fake
def _(hidden_NH: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    entropy = rest[-2]
    rows = hidden_NH.shape[0]
    return (
        hidden_NH.new_empty(rows, dtype=torch.float32),
        hidden_NH.new_empty(rows if entropy else 0, dtype=torch.float32),
    )


@torch.library.custom_op("fastgrpo::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grad_logprob_N: Tensor,
    grad_entropy_N: OptionalTensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: OptionalTensor,
    targets_N: Tensor,
    logprob_N: Tensor,
    entropy_N: Tensor,
    temperature: float,
    softcap: Optional[float],  # noqa: UP045
    wanted: list[bool],
    chunk: Optional[int],  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor]:
    return chunked.logprob_backward(
        hidden_NH,
        targets_N,
        Head(weight_VH, bias_V, LogitTransform(temperature, softcap)),
        (logprob_N, entropy_N),
        (grad_logprob_N, grad_entropy_N),
        wanted=wanted,
        chunk=chunk,
    )


@linear_logprob_backward.register_fake
def _(
    grad_logprob_N: Tensor,
    grad_entropy_N: Tensor | None,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden_NH, weight_VH, bias_V, rest[-2])


def _fake_gradients(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, ...]:
    pairs = zip((hidden_NH, weight_VH, bias_V), wanted, strict=True)
    return tuple(torch.empty_like(x) if want and x is not None else hidden_NH.new_empty(0) for x, want in pairs)


def _save_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_NH, weight_VH, bias_V, targets_N, ctx.temperature, ctx.softcap, ctx.entropy, ctx.chunk = inputs
    ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, *output)


def _differentiate_logprob(ctx: Any, grad_logprob_N: Tensor, grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
    hidden_NH, weight_VH, bias_V, targets_N, logprob_N, entropy_N = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.fastgrpo.linear_logprob_backward(
        grad_logprob_N.contiguous(),
        grad_entropy_N.contiguous() if ctx.entropy else None,
        hidden_NH,
        weight_VH,
        bias_V,
        targets_N,
        logprob_N,
        entropy_N,
        ctx.temperature,
        ctx.softcap,
        wanted,
        ctx.chunk,
    )
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 5


linear_logprob.register_autograd(_differentiate_logprob, setup_context=_save_logprob)


@torch.library.custom_op("fastgrpo::linear_grpo_loss", mutates_args=())
def linear_grpo_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: OptionalTensor,
    targets_N: Tensor,
    advantages_N: Tensor,
    token_weights_N: Tensor,
    old_logprobs_N: OptionalTensor,
    ref_logprobs_N: OptionalTensor,
    sampled_logprobs_N: OptionalTensor,
    sequence_log_ratio_N: OptionalTensor,
    ratio: str,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    tis_cap: Optional[float],  # noqa: UP045
    tis_mask: bool,
    entropy_weight: float,
    clip_dual: Optional[float],  # noqa: UP045
    kl_estimator: str,
    temperature: float,
    softcap: Optional[float],  # noqa: UP045
    wanted: list[bool],
    chunk: Optional[int],  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, report [F, N], statistics, hidden's, weight's and bias's gradient for a loss gradient of 1)."""
    tokens = TokenInputs(
        advantages_N, token_weights_N, old_logprobs_N, ref_logprobs_N, sampled_logprobs_N, sequence_log_ratio_N
    )
    scalars = (clip_low, clip_high, kl_weight, tis_cap, tis_mask, entropy_weight, clip_dual)
    options = LossOptions(cast(Ratio, ratio), *scalars, cast(KlEstimator, kl_estimator))
    report_FN, gradients = chunked.loss_and_gradients(
        hidden_NH,
        targets_N,
        Head(weight_VH, bias_V, LogitTransform(temperature, softcap)),
        tokens,
        options,
        select=_begin_selection(tokens, options, targets_N, len(weight_VH)),
        wanted=wanted,
        chunk=chunk,
    )
    sums_F = report_FN.nansum(dim=1)
    computed = report_FN[0].isnan().logical_not_().sum().to(torch.float32)
    # Slices, as a list of indices would be copied to the device and wait for it.
    statistics = torch.cat([computed[None], sums_F[1:2], sums_F[3:]])
    # Dropped tokens have a loss of 0: a NaN among the others is not to be summed away.
    return report_FN[2].sum(), report_FN, statistics, *gradients


def _begin_selection(
    tokens: TokenInputs, options: LossOptions, targets_N: Tensor, vocabulary: int
) -> Callable[[], Tensor | None]:
    """Finds the tokens that can move the policy: neither weight nor advantage (or KL or entropy bonus) is zero.

    The returned function gives their indices, None for all, and checks that their targets index the vocabulary.
    """
    if not len(targets_N):
        return lambda: None
    kept_N = tokens.token_weights_N != 0
    if options.kl_weight == options.entropy_weight == 0:
        kept_N &= tokens.advantages_N != 0
    # The others' may be anything, as the -100 that masks a label.
    wanted_N = torch.where(kept_N, targets_N, 0)
    fetch = _begin_fetch(torch.stack([*torch.aminmax(wanted_N), kept_N.sum()]))

    def finish() -> Tensor | None:
        lowest, highest, kept = fetch()
        validate.target_range(lowest, highest, vocabulary)
        return None if kept == len(targets_N) else torch.nonzero_static(kept_N, size=kept)[:, 0]

    return finish


@linear_grpo_loss.register_fake
def _(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    report_FN = hidden_NH.new_empty(len(chunked.REPORT), hidden_NH.shape[0], dtype=torch.float32)
    gradients = _fake_gradients(hidden_NH, weight_VH, bias_V, rest[-2])
    return report_FN.new_empty(()), report_FN, report_FN.new_empty(6), *gradients


@torch.library.custom_op("fastgrpo::scale_", mutates_args=("gradient",))
def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, without touching its memory when the factor, which stays on the device, is 1."""
    if triton_runs(gradient.device):
        from fastgrpo.kernels import rows_triton

        rows_triton.scale_(gradient, factor)
    else:
        gradient.mul_(factor)


@scale_.register_fake
def _(gradient: Tensor, factor: Tensor) -> None:
    return None


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.wanted = inputs[-2]
    ctx.save_for_backward(*output[3:])


def _differentiate_loss(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = ctx.saved_tensors
    for gradient, want in zip(gradients, ctx.wanted, strict=True):
        if want and grad_loss is not None:
            torch.ops.fastgrpo.scale_(gradient, grad_loss)
    usable = [want and grad_loss is not None for want in ctx.wanted]
    return *(grad if use else None for grad, use in zip(gradients, usable, strict=True)), *[None] * 20


linear_grpo_loss.register_autograd(_differentiate_loss, setup_context=_save_loss)
