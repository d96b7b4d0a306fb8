"""A decoder layer's mixture of experts, differentiable: the weighted sum of each token's experts.

    x = norm_experts(x, norm, router, gate_up, down, ...)   keeps x, the choices, and gate(x) and up(x) of each choice
    y = routed_experts(h, weight, expert, gate_up, down)    the same of choices that a router of any kind has made
    y = biased_experts(h, weight, expert, ...)              the same of gpt-oss's experts, with biases

Tokens are sorted by expert, so that the products of all experts are one grouped product (`torch.nn.functional`'s). An
expert's weight is multiplied with silu(gate) * up, before the last product, so that backward needs none of its results.
The norm's output and its copies, one for each choice, are made again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, linear, one_hot

from fastgrpo.kernels.layer import passes_on

# Rows of choices whose activation is computed at once: what it makes in fp32 is then little beside the whole.
ROWS = 2048


class Replay(NamedTuple):
    """Experts that T tokens are to have in one layer, [T, K] of any signed integers, -1 where nothing is known.

    counts_2: int64, to which each use adds the tokens with known experts, and those of them whose own would be others.
    """

    expert_TK: Tensor
    counts_2: Tensor


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
    replay: Replay | None = None,
) -> Tensor:
    """x + sum_e p_e down_e(silu(gate_e(h)) * up_e(h)) over the `top_k` experts of the largest p, h the RMSNorm of x.

    p = softmax(h router^T) in fp32; with `renormalise` those of a token's experts are divided by their sum. gate_e is
    the first half of `gate_up_EFH`'s rows. `recompute` keeps no product for backward. With `replay` a token's experts
    are those that it names, weighted by p all the same.
    """
    weights = (x_TH, norm_H, eps, router_EH, gate_up_EFH, down_EHI)
    out: Tensor = _NormExperts.apply(*weights, top_k, renormalise, recompute, replay)
    return out


def routed_experts(h_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up_EFH: Tensor, down_EHI: Tensor) -> Tensor:
    """sum_k w_k down_e(silu(gate_e(h)) * up_e(h)) over the experts e of each token, `expert_TK`, and their weights w.

    gate_e is the first half of `gate_up_EFH`'s rows. `h_TH` is kept, and gate(h) and up(h) of each choice.
    """
    out: Tensor = _RoutedExperts.apply(h_TH, weight_TK, expert_TK, gate_up_EFH, down_EHI)
    return out


def biased_experts(
    h_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EHF: Tensor,
    gate_up_bias_EF: Tensor,
    down_EIH: Tensor,
    down_bias_EH: Tensor,
    *,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """sum_k w_k (activation(h gate_up_e + c_e) down_e + d_e), as `routed_experts`, with biases c and d (gpt-oss).

    `activation` makes I columns of F = 2 I; it is computed again in backward. A bias has the gradients of thousands of
    rows: they are summed in products, which add in fp32. Added one by one to a sum in bf16 they stop adding up.
    """
    weights = (gate_up_EHF, gate_up_bias_EF, down_EIH, down_bias_EH)
    out: Tensor = _BiasedExperts.apply(h_TH, weight_TK, expert_TK, *weights, activation)
    return out


def replayed(own_TK: Tensor, replay: Replay) -> Tensor:
    """int64 [T, K]: the experts that `replay` names, and a token's `own_TK` where it names none; counts both."""
    known_T1 = replay.expert_TK[:, :1] >= 0
    chosen_TK = torch.where(known_T1, replay.expert_TK, own_TK)
    other_T = (chosen_TK.sort(-1).values != own_TK.sort(-1).values).any(-1)
    replay.counts_2.add_(torch.stack([known_T1.sum(), other_T.sum()]))
    return chosen_TK


def routes_of(expert_TK: Tensor, experts: int) -> Routes:
    """The routes of tokens that chose `expert_TK`; nothing waits for the device."""
    sorted_S, choice_S = expert_TK.flatten().sort(stable=True)
    row_S = torch.empty_like(choice_S)
    row_S[choice_S] = torch.arange(len(choice_S), device=choice_S.device)
    end_E = torch.searchsorted(sorted_S, torch.arange(experts, device=choice_S.device), right=True)
    return Routes(choice_S // expert_TK.shape[1], choice_S, row_S.view(expert_TK.shape), end_E.int())


def _gate_up(h_TH: Tensor, routes: Routes, gate_up_EFH: Tensor) -> Tensor:
    """gate and up of each choice, [S, F]."""
    return grouped_mm(h_TH[routes.token_S], gate_up_EFH.mT, offs=routes.end_E)


def _down(gate_up_SF: Tensor, weight_TK: Tensor, routes: Routes, down_EHI: Tensor) -> Tensor:
    """What each choice adds to its token, [S, H]."""
    product_SI = passes_on(gate_up_SF.device).swiglu(gate_up_SF, weight_TK.flatten()[routes.choice_S])
    return grouped_mm(product_SI, down_EHI.mT, offs=routes.end_E)


def _choices_backward(
    h_TH: Tensor,
    dy_TH: Tensor,
    gate_up_SF: Tensor | None,
    weight_TK: Tensor,
    routes: Routes,
    gate_up_EFH: Tensor,
    down_EHI: Tensor,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of what enters each choice, [S, H], of `weight_TK`, and of both weights where these are `trained`.

    Without `gate_up_SF` it is computed again.
    """
    h_SH, dy_SH, recomputed = h_TH[routes.token_S], dy_TH[routes.token_S], gate_up_SF is None
    if gate_up_SF is None:
        gate_up_SF = grouped_mm(h_SH, gate_up_EFH.mT, offs=routes.end_E)
    dgate_up_SF, product_SI, dweight_S = passes_on(h_TH.device).swiglu_backward(
        gate_up_SF,
        grouped_mm(dy_SH, down_EHI, offs=routes.end_E),
        weight_TK.flatten()[routes.choice_S],
        reuse=recomputed,
    )
    del gate_up_SF
    ddown_EHI = grouped_mm(dy_SH.mT, product_SI, offs=routes.end_E) if trained else None
    del dy_SH, product_SI
    dgate_up_EFH = grouped_mm(dgate_up_SF.mT, h_SH, offs=routes.end_E) if trained else None
    del h_SH
    dh_SH = grouped_mm(dgate_up_SF, gate_up_EFH, offs=routes.end_E)
    return dh_SH, dweight_S[routes.row_TK], dgate_up_EFH, ddown_EHI


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up_EFH: Tensor, down_EHI: Tensor
    ) -> Tensor:
        routes = routes_of(expert_TK, len(gate_up_EFH))
        gate_up_SF = _gate_up(h_TH, routes, gate_up_EFH)
        ctx.save_for_backward(h_TH, weight_TK, expert_TK, gate_up_EFH, down_EHI, gate_up_SF)
        y_SH = _down(gate_up_SF, weight_TK.float(), routes, down_EHI)
        return passes_on(h_TH.device).sum_rows(torch.zeros_like(h_TH), y_SH, routes.row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        h_TH, weight_TK, expert_TK, gate_up_EFH, down_EHI, gate_up_SF = ctx.saved_tensors
        routes, trained = routes_of(expert_TK, len(gate_up_EFH)), ctx.needs_input_grad[3]
        dh_SH, dweight_TK, dgate_up_EFH, ddown_EHI = _choices_backward(
            h_TH, dy_TH.contiguous(), gate_up_SF, weight_TK.float(), routes, gate_up_EFH, down_EHI, trained
        )
        dh_TH = passes_on(h_TH.device).sum_rows(torch.zeros_like(h_TH), dh_SH, routes.row_TK)
        return dh_TH, dweight_TK.to(weight_TK.dtype), None, dgate_up_EFH, ddown_EHI


class _BiasedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TH: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        gate_up_EHF: Tensor,
        gate_up_bias_EF: Tensor,
        down_EIH: Tensor,
        down_bias_EH: Tensor,
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        routes, ctx.activation = routes_of(expert_TK, len(gate_up_EHF)), activation
        gate_up_SF = grouped_mm(h_TH[routes.token_S], gate_up_EHF, offs=routes.end_E)
        gate_up_SF += gate_up_bias_EF[expert_TK.flatten()[routes.choice_S]]
        ctx.save_for_backward(h_TH, weight_TK, expert_TK, gate_up_EHF, down_EIH, down_bias_EH, gate_up_SF)
        product_SI = _weighted(activation, gate_up_SF, weight_TK.flatten()[routes.choice_S])
        y_SH = grouped_mm(product_SI, down_EIH, offs=routes.end_E)
        del product_SI
        biases_TH = _dense(weight_TK, expert_TK, down_bias_EH) @ down_bias_EH
        return passes_on(h_TH.device).sum_rows(biases_TH, y_SH, routes.row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        h_TH, weight_TK, expert_TK, gate_up_EHF, down_EIH, down_bias_EH, gate_up_SF = ctx.saved_tensors
        dy_TH, experts, trained = dy_TH.contiguous(), len(gate_up_EHF), ctx.needs_input_grad[3]
        routes = routes_of(expert_TK, experts)
        dy_SH = dy_TH[routes.token_S]
        dgate_up_SF, product_SI, dweight_S = _weighted_backward(
            ctx.activation,
            gate_up_SF,
            weight_TK.flatten()[routes.choice_S],
            grouped_mm(dy_SH, down_EIH.mT, offs=routes.end_E),
        )
        dweight_TK = dweight_S[routes.row_TK] + (dy_TH @ down_bias_EH.mT).float().gather(1, expert_TK)
        dweights: tuple[Tensor | None, ...] = (None,) * 4
        if trained:
            chosen_ES = one_hot(expert_TK.flatten()[routes.choice_S], experts).to(dy_TH.dtype).mT
            dweights = (
                grouped_mm(h_TH[routes.token_S].mT, dgate_up_SF, offs=routes.end_E),
                chosen_ES @ dgate_up_SF,
                grouped_mm(product_SI.mT, dy_SH, offs=routes.end_E),
                _dense(weight_TK, expert_TK, down_bias_EH).mT @ dy_TH,
            )
        del product_SI, dy_SH
        dh_SH = grouped_mm(dgate_up_SF, gate_up_EHF.mT, offs=routes.end_E)
        dh_TH = passes_on(h_TH.device).sum_rows(torch.zeros_like(h_TH), dh_SH, routes.row_TK)
        return dh_TH, dweight_TK.to(weight_TK.dtype), None, *dweights, None


def _weighted(activation: Callable[[Tensor], Tensor], gate_up_SF: Tensor, weight_S: Tensor) -> Tensor:
    """activation(gate_up) * weight, [S, I], in fp32 for some rows after the other."""
    product_SI = gate_up_SF.new_empty(len(gate_up_SF), gate_up_SF.shape[1] // 2)
    for into, rows, weight in zip(*(each.split(ROWS) for each in (product_SI, gate_up_SF, weight_S)), strict=True):
        into.copy_(activation(rows.float()) * weight[:, None])
    return product_SI


def _weighted_backward(
    activation: Callable[[Tensor], Tensor], gate_up_SF: Tensor, weight_S: Tensor, dproduct_SI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of gate_up, what `_weighted` returns, and the gradient of the weights in fp32."""
    dgate_up_SF, product_SI = torch.empty_like(gate_up_SF), torch.empty_like(dproduct_SI)
    dweight_S = weight_S.new_empty(len(weight_S), dtype=torch.float32)
    for start in range(0, len(gate_up_SF), ROWS):
        rows = slice(start, start + ROWS)
        with torch.enable_grad():
            leaves = [each[rows].detach().float().requires_grad_() for each in (gate_up_SF, weight_S)]
            product = activation(leaves[0]) * leaves[1][:, None]
        dgate_up_SF[rows], dweight_S[rows] = torch.autograd.grad(product, leaves, dproduct_SI[rows].float())
        product_SI[rows] = product.detach()
    return dgate_up_SF, product_SI, dweight_S


def _dense(weight_TK: Tensor, expert_TK: Tensor, like_EH: Tensor) -> Tensor:
    """The weights of all experts, [T, E], in the dtype of `like_EH`."""
    return like_EH.new_zeros(len(weight_TK), len(like_EH)).scatter_(1, expert_TK, weight_TK.to(like_EH.dtype))


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
        replay: Replay | None,
    ) -> Tensor:
        passes = passes_on(x_TH.device)
        h_TH, scale_T = passes.rms_norm(x_TH, norm_H, eps)
        weight_TE = linear(h_TH, router_EH).float().softmax(-1)
        weight_TK, expert_TK = weight_TE.topk(top_k)
        if replay is not None:
            expert_TK = replayed(expert_TK, replay)
            weight_TK = weight_TE.gather(1, expert_TK)
        del weight_TE
        if renormalise:
            weight_TK /= weight_TK.sum(-1, keepdim=True)
        routes = routes_of(expert_TK, len(router_EH))
        gate_up_SF = _gate_up(h_TH, routes, gate_up_EFH)
        del h_TH
        ctx.eps, ctx.renormalise = eps, renormalise
        kept = None if recompute else gate_up_SF
        ctx.save_for_backward(x_TH, scale_T, norm_H, router_EH, gate_up_EFH, down_EHI, weight_TK, expert_TK, kept)
        return passes.sum_rows(x_TH, _down(gate_up_SF, weight_TK, routes, down_EHI), routes.row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, scale_T, norm_H, router_EH, gate_up_EFH, down_EHI, weight_TK, expert_TK, gate_up_SF = ctx.saved_tensors
        passes, routes = passes_on(x_TH.device), routes_of(expert_TK, len(router_EH))
        h_TH, _ = passes.rms_norm(x_TH, norm_H, ctx.eps)
        dh_SH, dweight_TK, dgate_up_EFH, ddown_EHI = _choices_backward(
            h_TH, dy_TH, gate_up_SF, weight_TK, routes, gate_up_EFH, down_EHI, trained=True
        )
        dlogits_TE = _router_backward(h_TH, router_EH, weight_TK, expert_TK, dweight_TK, ctx.renormalise)
        dh_TH = passes.sum_rows(dlogits_TE @ router_EH, dh_SH, routes.row_TK)
        del dh_SH
        dx_TH, h_TH, dnorm_H = passes.rms_norm_backward(dh_TH, x_TH, norm_H, scale_T, dy_TH)
        return dx_TH, dnorm_H, None, dlogits_TE.mT @ h_TH, dgate_up_EFH, ddown_EHI, None, None, None, None


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
