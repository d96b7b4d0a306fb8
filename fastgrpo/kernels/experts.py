"""A decoder layer's mixture of experts, differentiable: x + the weighted sum of each token's `top_k` experts.

    x = norm_experts(x, norm, router, gate_up, down, ...)   keeps x, the choices, and gate(x) and up(x) of each choice

Tokens are sorted by expert, so that the products of all experts are one grouped product (`torch.nn.functional`'s). An
expert's weight is multiplied with silu(gate) * up, before the last product, so that backward needs none of its results.
The norm's output and its copies, one for each choice, are made again in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, linear

from fastgrpo.kernels.layer import passes_on


class Routes(NamedTuple):
    """Where the S = T k choices of T tokens go: one row each, sorted by expert."""

    token_S: Tensor  # the row's token
    choice_S: Tensor  # its place among all choices, [T, k] flattened
    row_TK: Tensor  # the row of each choice
    end_E: Tensor  # int32: the row after each expert's last


def norm_experts(
    x_TH: Tensor,
    norm_H: Tensor,
    eps: float,
    router_EH: Tensor,
    gate_up_EFH: Tensor,
    down_EHI: Tensor,
    *,
    top_k: int,
    renormalise: bool,
    recompute: bool,
) -> Tensor:
    """x + sum_e p_e down_e(silu(gate_e(h)) * up_e(h)) over the `top_k` experts of the largest p, h the RMSNorm of x.

    p = softmax(h router^T) in fp32; with `renormalise` those of a token's experts are divided by their sum. gate_e is
    the first half of `gate_up_EFH`'s rows. `recompute` keeps no product for backward.
    """
    out: Tensor = _NormExperts.apply(x_TH, norm_H, eps, router_EH, gate_up_EFH, down_EHI, top_k, renormalise, recompute)
    return out


def routes_of(expert_TK: Tensor, experts: int) -> Routes:
    """The routes of tokens that chose `expert_TK`; nothing waits for the device."""
    sorted_S, choice_S = expert_TK.flatten().sort(stable=True)
    row_S = torch.empty_like(choice_S)
    row_S[choice_S] = torch.arange(len(choice_S), device=choice_S.device)
    end_E = torch.searchsorted(sorted_S, torch.arange(experts, device=choice_S.device), right=True)
    return Routes(choice_S // expert_TK.shape[1], choice_S, row_S.view(expert_TK.shape), end_E.int())


class _NormExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        norm_H: Tensor,
        eps: float,
        router_EH: Tensor,
        gate_up_EFH: Tensor,
        down_EHI: Tensor,
        top_k: int,
        renormalise: bool,
        recompute: bool,
    ) -> Tensor:
        passes = passes_on(x_TH.device)
        h_TH, scale_T = passes.rms_norm(x_TH, norm_H, eps)
        weight_TK, expert_TK = linear(h_TH, router_EH).float().softmax(-1).topk(top_k)
        if renormalise:
            weight_TK /= weight_TK.sum(-1, keepdim=True)
        routes = routes_of(expert_TK, len(router_EH))
        gate_up_SF = grouped_mm(h_TH[routes.token_S], gate_up_EFH.mT, offs=routes.end_E)
        del h_TH
        ctx.eps, ctx.renormalise = eps, renormalise
        kept = None if recompute else gate_up_SF
        ctx.save_for_backward(x_TH, scale_T, norm_H, router_EH, gate_up_EFH, down_EHI, weight_TK, expert_TK, kept)
        product_SI = passes.swiglu(gate_up_SF, weight_TK.flatten()[routes.choice_S])
        return passes.sum_rows(x_TH, grouped_mm(product_SI, down_EHI.mT, offs=routes.end_E), routes.row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, scale_T, norm_H, router_EH, gate_up_EFH, down_EHI, weight_TK, expert_TK, gate_up_SF = ctx.saved_tensors
        passes, routes, recomputed = passes_on(x_TH.device), routes_of(expert_TK, len(router_EH)), gate_up_SF is None
        h_TH, _ = passes.rms_norm(x_TH, norm_H, ctx.eps)
        h_SH = h_TH[routes.token_S]
        if recomputed:
            gate_up_SF = grouped_mm(h_SH, gate_up_EFH.mT, offs=routes.end_E)
        dy_SH = dy_TH[routes.token_S]
        dgate_up_SF, product_SI, dweight_S = passes.swiglu_backward(
            gate_up_SF,
            grouped_mm(dy_SH, down_EHI, offs=routes.end_E),
            weight_TK.flatten()[routes.choice_S],
            reuse=recomputed,
        )
        ddown_EHI = grouped_mm(dy_SH.mT, product_SI, offs=routes.end_E)
        del gate_up_SF, dy_SH, product_SI
        dgate_up_EFH = grouped_mm(dgate_up_SF.mT, h_SH, offs=routes.end_E)
        del h_SH
        dh_SH = grouped_mm(dgate_up_SF, gate_up_EFH, offs=routes.end_E)
        del dgate_up_SF
        dlogits_TE = _router_backward(h_TH, router_EH, weight_TK, expert_TK, dweight_S[routes.row_TK], ctx.renormalise)
        dh_TH = passes.sum_rows(dlogits_TE @ router_EH, dh_SH, routes.row_TK)
        del dh_SH
        dx_TH, h_TH, dnorm_H = passes.rms_norm_backward(dh_TH, x_TH, norm_H, scale_T, dy_TH)
        return dx_TH, dnorm_H, None, dlogits_TE.mT @ h_TH, dgate_up_EFH, ddown_EHI, None, None, None


def _router_backward(
    h_TH: Tensor, router_EH: Tensor, weight_TK: Tensor, expert_TK: Tensor, dweight_TK: Tensor, renormalise: bool
) -> Tensor:
    """Gradient of the router's logits, [T, E]."""
    along_T1 = (weight_TK * dweight_TK).sum(-1, keepdim=True)
    chosen_TK = weight_TK * (dweight_TK - along_T1 if renormalise else dweight_TK)
    if renormalise:  # a softmax over the chosen ones' logits alone
        dlogits_TE = chosen_TK.new_zeros(len(h_TH), len(router_EH))
    else:
        dlogits_TE = linear(h_TH, router_EH).float().softmax(-1).mul_(-along_T1)
    return dlogits_TE.scatter_add_(1, expert_TK, chosen_TK).to(h_TH.dtype)
