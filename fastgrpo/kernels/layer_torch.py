"""The row passes of a decoder layer in plain torch: what a CPU runs, and in float64 the oracle of the Triton kernels.

T tokens, width H, F = 2 I columns of gate and up, heads of width D. Sums are fp32 (float64 for float64 inputs); a value
is rounded to the inputs' dtype where transformers and vLLM round it, so that all three agree to the last rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(weight * x / rms(x), 1 / rms(x) as [T]); RMSNorm, arXiv 1910.07467, eq. 4."""
    wide_TH = _wide(x_TH)
    scale_T1 = (wide_TH.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide_TH * scale_T1).to(x_TH.dtype) * weight_H, scale_T1.squeeze(-1)


def rms_norm_backward(
    dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, scale_T: Tensor, dresidual_TH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x with `dresidual_TH` added, the norm's output, gradient of the weight); `dy_TH` may be reused."""
    wide_TH, dy, scale_T1 = _wide(x_TH), _wide(dy_TH), scale_T[:, None]
    unit_TH = wide_TH * scale_T1
    rounded_TH = unit_TH.to(x_TH.dtype)
    g_TH = dy * _wide(weight_H)
    dx_TH = scale_T1 * (g_TH - unit_TH * (g_TH * unit_TH).mean(-1, keepdim=True)) + _wide(dresidual_TH)
    return dx_TH.to(x_TH.dtype), rounded_TH * weight_H, (dy * _wide(rounded_TH)).sum(0).to(weight_H.dtype)


def swiglu(gate_up_TF: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """silu(gate) * up, [T, I] (arXiv 2002.05202, eq. 6), each row times its `weight_T` in fp32."""
    gate_TI, up_TI = gate_up_TF.chunk(2, dim=-1)
    product_TI = torch.nn.functional.silu(gate_TI) * up_TI
    return product_TI if weight_T is None else (_wide(product_TI) * weight_T[:, None]).to(gate_up_TF.dtype)


def swiglu_backward(
    gate_up_TF: Tensor, dproduct_TI: Tensor, weight_T: Tensor | None = None, *, reuse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gradient of gate and up, the product once more, gradient of `weight_T`).

    May overwrite `dproduct_TI`, with `reuse` `gate_up_TF` too.
    """
    gate_TI, up_TI = gate_up_TF.chunk(2, dim=-1)
    activated_TI, dproduct = torch.nn.functional.silu(gate_TI), _wide(dproduct_TI)
    product_TI, dgate_up_TF, dweight_T = activated_TI * up_TI, torch.empty_like(gate_up_TF), None
    if weight_T is not None:
        dweight_T = (dproduct * _wide(product_TI)).sum(-1)
        dproduct = dproduct * weight_T[:, None]
        product_TI = (_wide(product_TI) * weight_T[:, None]).to(gate_up_TF.dtype)
    dgate_TI, dup_TI = dgate_up_TF.chunk(2, dim=-1)
    dgate_TI.copy_(torch.ops.aten.silu_backward(dproduct * _wide(up_TI), _wide(gate_TI)))
    dup_TI.copy_(dproduct * _wide(activated_TI))
    return dgate_up_TF, product_TI, dweight_T


def sum_rows(x_TH: Tensor, y_SH: Tensor, row_TK: Tensor) -> Tensor:
    """x and, for each token, the rows `row_TK` of y, added up."""
    return (_wide(x_TH) + _wide(y_SH)[row_TK].sum(1)).to(x_TH.dtype)


def rotate(
    qkv_TF: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_TD: Tensor,
    sin_TD: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(queries [T, heads, D], keys and values [T, kv_heads, D]) of the stacked products `qkv_TF`.

    Queries and keys are normalised head by head, where `norms` has their weights [D] (Qwen3), and rotated by their
    position (arXiv 2104.09864, eq. 34): the second half of a head is the imaginary part of the first.
    """
    query, key, value = _heads(qkv_TF, heads, kv_heads)
    if norms is not None:
        query, key = (rms_norm(x, weight_D, eps)[0] for x, weight_D in zip((query, key), norms, strict=True))
    turned = (_turn(_wide(x), _wide(cos_TD), _wide(sin_TD)).to(qkv_TF.dtype) for x in (query, key))
    return *turned, value.contiguous()  # type: ignore[return-value]


def rotate_backward(
    dquery_THD: Tensor,
    dkey_TGD: Tensor,
    dvalue_TGD: Tensor,
    qkv_TF: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_TD: Tensor,
    sin_TD: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(gradient of `qkv_TF`, of the query norm's and of the key norm's weight); `qkv_TF` is read for norms alone."""
    dtype = dquery_THD.dtype
    turned = [_turn(_wide(dy), _wide(cos_TD), -_wide(sin_TD)) for dy in (dquery_THD, dkey_TGD)]
    dweights: list[Tensor] = []
    if norms is not None and qkv_TF is not None:
        raw = _heads(qkv_TF, dquery_THD.shape[1], dkey_TGD.shape[1])[:2]
        for number, (x_THD, weight_D) in enumerate(zip(raw, norms, strict=True)):
            x_RD, dy_RD = x_THD.reshape(-1, x_THD.shape[-1]), turned[number].flatten(0, 1)
            scale_R = (_wide(x_RD).square().mean(-1) + eps).rsqrt()
            dx_RD, _, dweight_D = rms_norm_backward(dy_RD, x_RD, weight_D, scale_R, torch.zeros_like(x_RD))
            turned[number] = dx_RD.view(x_THD.shape)
            dweights.append(dweight_D)
    parts = [part.flatten(1).to(dtype) for part in (*turned, dvalue_TGD)]
    return torch.cat(parts, dim=-1), *(dweights or (None, None))


def _heads(qkv_TF: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    qkv_TXD = qkv_TF.unflatten(-1, (heads + 2 * kv_heads, -1))
    return qkv_TXD.split([heads, kv_heads, kv_heads], dim=1)


def _turn(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos_TD[:, None] + torch.cat([-second, first], dim=-1) * sin_TD[:, None]
