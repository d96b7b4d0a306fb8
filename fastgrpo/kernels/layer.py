"""A decoder layer's norms, MLP and rotation, differentiable, keeping for backward what is dear to compute and no more.

    x, qkv = norm_linear(x, norm, (wq, wk, wv), biases)     keeps x
    q, k, v = rotated(qkv, cos, sin, ...)                   keeps nothing, qkv where heads have norms
    x = norm_mlp(x, norm, gate, up, down)                   keeps x, and gate(x) and up(x) unless they are recomputed

A norm's output and silu(gate) * up are made again in backward, in the passes that compute their gradients, which saves
a third of the activations for three reads of memory. q, k and v, and gate and up, are one matrix product each, on one
matrix where their weights lie one after another. `layer_triton` has the passes on a GPU, `layer_torch` on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fastgrpo.kernels import layer_torch
from fastgrpo.kernels.backend import triton_runs


def norm_linear(
    x_TH: Tensor, norm_H: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """(x, the products of its RMSNorm with all `weights` [., H], side by side, plus `biases`).

    The x that is returned is what the residual branch must go on with: its gradient is added in the norm's.
    """
    out: tuple[Tensor, Tensor] = _NormLinear.apply(x_TH, norm_H, eps, len(weights), *weights, *biases)
    return out


def norm_mlp(
    x_TH: Tensor, norm_H: Tensor, eps: float, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor, *, recompute: bool
) -> Tensor:
    """x + down(silu(gate(h)) * up(h)) with h the RMSNorm of x; `recompute` keeps no product for backward."""
    out: Tensor = _NormMLP.apply(x_TH, norm_H, eps, gate_IH, up_IH, down_HI, recompute)
    return out


def rotated(
    qkv_TF: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    *,
    heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_torch.rotate`, differentiable."""
    query_norm_D, key_norm_D = norms or (None, None)
    out: tuple[Tensor, Tensor, Tensor] = _Rotated.apply(
        qkv_TF, query_norm_D, key_norm_D, eps, cos_TD, sin_TD, heads, kv_heads
    )
    return out


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """All rows of `parts` as one tensor: a view where they lie one after another in memory, else a copy."""
    first, size = parts[0], 0
    for part in parts:
        after = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (after and part.is_contiguous() and part.storage_offset() == first.storage_offset() + size):
            return torch.cat(list(parts))
        size += part.numel()
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, norm_H: Tensor, eps: float, count: int, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, biases = parameters[:count], parameters[count:]
        h_TH, scale_T = passes_on(x_TH.device).rms_norm(x_TH, norm_H, eps)
        ctx.count = count
        ctx.save_for_backward(x_TH, scale_T, norm_H, *parameters)
        return x_TH.view_as(x_TH), linear(h_TH, stacked(weights), stacked(biases) if biases else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TH: Tensor, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, scale_T, norm_H, *parameters = ctx.saved_tensors
        weights, biases = parameters[: ctx.count], parameters[ctx.count :]
        dh_TH = dy_TF @ stacked(weights)
        dx_TH, h_TH, dnorm_H = passes_on(x_TH.device).rms_norm_backward(dh_TH, x_TH, norm_H, scale_T, dx_TH)
        dweights = (dy_TF.mT @ h_TH).split([len(weight) for weight in weights])
        dbiases = dy_TF.sum(0).split([len(bias) for bias in biases]) if biases else ()
        return dx_TH, dnorm_H, None, None, *dweights, *dbiases


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        norm_H: Tensor,
        eps: float,
        gate_IH: Tensor,
        up_IH: Tensor,
        down_HI: Tensor,
        recompute: bool,
    ) -> Tensor:
        passes = passes_on(x_TH.device)
        h_TH, scale_T = passes.rms_norm(x_TH, norm_H, eps)
        gate_up_TF = linear(h_TH, stacked((gate_IH, up_IH)))
        del h_TH
        ctx.eps = eps
        ctx.save_for_backward(x_TH, scale_T, norm_H, gate_IH, up_IH, down_HI, None if recompute else gate_up_TF)
        return linear(passes.swiglu(gate_up_TF), down_HI).add_(x_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, scale_T, norm_H, gate_IH, up_IH, down_HI, gate_up_TF = ctx.saved_tensors
        passes, weight_FH, recomputed = passes_on(x_TH.device), stacked((gate_IH, up_IH)), gate_up_TF is None
        if recomputed:
            gate_up_TF = linear(passes.rms_norm(x_TH, norm_H, ctx.eps)[0], weight_FH)
        dgate_up_TF, product_TI, _ = passes.swiglu_backward(gate_up_TF, dy_TH @ down_HI, reuse=recomputed)
        ddown_HI = dy_TH.mT @ product_TI
        del gate_up_TF, product_TI
        dh_TH = dgate_up_TF @ weight_FH
        dx_TH, h_TH, dnorm_H = passes.rms_norm_backward(dh_TH, x_TH, norm_H, scale_T, dy_TH)
        dgate_IH, dup_IH = (dgate_up_TF.mT @ h_TH).split([len(gate_IH), len(up_IH)])
        return dx_TH, dnorm_H, None, dgate_IH, dup_IH, ddown_HI, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_TF: Tensor,
        query_norm_D: Tensor | None,
        key_norm_D: Tensor | None,
        eps: float,
        cos_TD: Tensor,
        sin_TD: Tensor,
        heads: int,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        norms = None if query_norm_D is None or key_norm_D is None else (query_norm_D, key_norm_D)
        ctx.eps = eps
        ctx.save_for_backward(None if norms is None else qkv_TF, query_norm_D, key_norm_D, cos_TD, sin_TD)
        return passes_on(qkv_TF.device).rotate(qkv_TF, norms, eps, cos_TD, sin_TD, heads, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dquery_THD: Tensor, dkey_TGD: Tensor, dvalue_TGD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TF, query_norm_D, key_norm_D, cos_TD, sin_TD = ctx.saved_tensors
        norms = None if query_norm_D is None else (query_norm_D, key_norm_D)
        gradients = passes_on(cos_TD.device).rotate_backward(
            dquery_THD, dkey_TGD, dvalue_TGD, qkv_TF, norms, ctx.eps, cos_TD, sin_TD
        )
        return *gradients, *[None] * 5


def passes_on(device: torch.device) -> Any:
    """The module that has the row passes for a device."""
    if triton_runs(device):
        from fastgrpo.kernels import layer_triton

        return layer_triton
    return layer_torch
