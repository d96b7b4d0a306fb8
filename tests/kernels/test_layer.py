"""A decoder layer's passes beside the same formulas in float64, written as transformers has them; values, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastgrpo.kernels.experts import norm_experts, routed_experts
from fastgrpo.kernels.layer import norm_linear, norm_mlp, rotated, stacked
from tests.helpers.random_heads import INTERPRETED

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def exact_rotation(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    first, second = x_THD.chunk(2, -1)
    return x_THD * cos_TD[:, None] + torch.cat([-second, first], -1) * sin_TD[:, None]


def compare(
    ours: Callable[..., Sequence[Tensor]], exact: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> None:
    """Values and gradients of all `inputs` are about as near to the exact ones as the same in eager torch."""
    results = []
    for function, dtype in ((ours, None), (exact, torch.float64), (exact, None)):
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(out.shape, generator=generator).to(out.device, torch.float64) for out in outputs]
        loss = sum((out * weight.to(out.dtype)).sum() for out, weight in zip(outputs, weights, strict=True))
        results.append([x.detach().double() for x in (*outputs, *torch.autograd.grad(loss, leaves))])
    # The interpreter cuts bf16 off where a GPU rounds.
    unit = 3e-6 if inputs[0].dtype == torch.float32 else 2e-2 if INTERPRETED else 4e-3
    for number, (mine, true, eager) in enumerate(zip(*results, strict=True)):
        error, allowed = (mine - true).norm(), 1.3 * (eager - true).norm() + unit * true.norm()
        assert error <= allowed, (number, float(error / true.norm()), float(allowed / true.norm()))


def drawn(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [(torch.randn(shape) * shape[-1] ** -0.5).to(device, dtype) if len(shape) > 1 else
            (1 + 0.2 * torch.randn(shape)).to(device, dtype) for shape in shapes]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "sizes"), [(37, 48, (32, 16, 16)), (1, 130, (8,)), (5, 4100, (24, 8))])
@pytest.mark.parametrize("biased", [True, False])
def test_norm_and_products(device, dtype: torch.dtype, tokens: int, width: int, sizes, biased: bool) -> None:
    x, norm, *weights = drawn(device, dtype, (tokens, width), (width,), *((size, width) for size in sizes))
    biases = drawn(device, dtype, *((size,) for size in sizes)) if biased else []
    count = len(sizes)

    def ours(x, norm, *parameters):
        passed, y = norm_linear(30 * x, norm, EPS, parameters[:count], parameters[count:])
        return passed + 1.5, y

    def exact(x, norm, *parameters):
        h, bias = exact_norm(30 * x, norm), torch.cat(parameters[count:]) if biased else None
        return 30 * x + 1.5, functional.linear(h, torch.cat(parameters[:count]), bias)

    compare(ours, exact, [x, norm, *weights, *biases])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("tokens", "width", "inner"), [(37, 48, 130), (3, 64, 1100)])
def test_norm_and_mlp(device, dtype: torch.dtype, recompute: bool, tokens: int, width: int, inner: int) -> None:
    x, norm, gate, up, down = drawn(
        device, dtype, (tokens, width), (width,), (inner, width), (inner, width), (width, inner)
    )

    def exact(x, norm, gate, up, down):
        h = exact_norm(10 * x, norm)
        return [10 * x + functional.linear(functional.silu(h @ gate.mT) * (h @ up.mT), down)]

    def ours(x, norm, gate, up, down):
        return [norm_mlp(10 * x, norm, EPS, gate, up, down, recompute=recompute)]

    compare(ours, exact, [x, norm, 3 * gate, 3 * up, down])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "size"), [(70, 4, 2, 32), (3, 3, 1, 24)])
def test_rotation(device, dtype: torch.dtype, normed: bool, tokens: int, heads: int, kv_heads: int, size: int) -> None:
    total = heads + 2 * kv_heads
    qkv, query_norm, key_norm = drawn(device, dtype, (tokens, total * size), (size,), (size,))
    angles = torch.rand(tokens, size // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    weights = [query_norm, key_norm] if normed else []

    def ours(qkv, *norms):
        options = {"heads": heads, "kv_heads": kv_heads, "norms": norms or None, "eps": EPS}
        return rotated(5 * qkv, cos, sin, **options)

    def exact(qkv, *norms):
        query, key, value = (5 * qkv).view(tokens, total, size).split([heads, kv_heads, kv_heads], dim=1)
        if norms:
            query, key = exact_norm(query, norms[0]), exact_norm(key, norms[1])
        turned = [exact_rotation(x, cos.to(x.dtype), sin.to(x.dtype)) for x in (query, key)]
        return [*turned, value]

    compare(ours, exact, [qkv, *weights])


def exact_experts(h: Tensor, weight: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each token's experts one after another; `weight` and `chosen` are [T, k]."""
    tokens = []
    for row, weights, experts in zip(h, weight, chosen, strict=True):
        gates, ups = (gate_up[experts] @ row).chunk(2, -1)
        tokens.append(torch.einsum("k,khi,ki->h", weights, down[experts], functional.silu(gates) * ups))
    return torch.stack(tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("tokens", "width", "inner", "experts", "k"), [(23, 48, 64, 6, 2), (2, 1032, 16, 9, 4)])
def test_norm_and_experts(
    device, dtype: torch.dtype, recompute: bool, renormalise: bool, tokens: int, width: int, inner: int, experts, k
) -> None:
    x, norm, router, gate_up, down = drawn(
        device, dtype, (tokens, width), (width,), (experts, width), (experts, 2 * inner, width), (experts, width, inner)
    )
    # Which experts are chosen must not hang on a rounding; the last one is chosen by nobody.
    wanted = torch.stack([torch.randperm(experts - 1)[:k] for _ in range(tokens)])
    lift = torch.zeros(tokens, experts).scatter_(1, wanted, 1.0)
    basis = torch.linalg.qr(torch.randn(width, experts)).Q.to(device, dtype).mT
    x = x + (lift.to(device, dtype) * width**0.5) @ basis
    router = 3 * basis + 0.1 * router

    def exact(x, norm, router, gate_up, down):
        h = exact_norm(10 * x, norm)
        top, chosen = (h @ router.mT).softmax(-1).topk(k)
        weight = top / top.sum(-1, keepdim=True) if renormalise else top
        return [10 * x + exact_experts(h, weight, chosen, gate_up, down)]

    def ours(x, norm, router, gate_up, down):
        options = {"top_k": k, "renormalise": renormalise, "recompute": recompute}
        return [norm_experts(10 * x, norm, EPS, router, gate_up, down, **options)]

    compare(ours, exact, [x, norm, router, 3 * gate_up, down])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("tokens", "width", "inner", "experts", "k"), [(23, 48, 64, 6, 2), (2, 1032, 16, 9, 4)])
def test_experts_of_a_routers_choices(
    device, dtype: torch.dtype, trained: bool, tokens: int, width: int, inner: int, experts: int, k: int
) -> None:
    h, weight, gate_up, down = drawn(
        device, dtype, (tokens, width), (tokens, k), (experts, 2 * inner, width), (experts, width, inner)
    )
    # The last expert is chosen by nobody.
    chosen = torch.stack([torch.randperm(experts - 1)[:k] for _ in range(tokens)]).to(device)
    if not trained:  # a frozen mixture beside adapters: neither weight has a gradient
        ours = routed_experts(h.requires_grad_(), weight.requires_grad_(), chosen, gate_up, down)
        ours.sum().backward()
        assert h.grad.abs().sum() > 0 < weight.grad.abs().sum()
        assert gate_up.grad is down.grad is None
        return

    def exact(h, weight, gate_up, down):
        return [exact_experts(h, weight, chosen, gate_up, down)]

    compare(lambda h, w, g, d: [routed_experts(h, w, chosen, g, d)], exact, [h, weight, 3 * gate_up, down])


@pytest.mark.parametrize("recompute", [False, True])
def test_what_backward_needs_is_all_that_is_kept(device, recompute: bool) -> None:
    x, norm, gate, up, down = drawn(device, torch.float32, (64, 32), (32,), (96, 32), (96, 32), (32, 96))
    leaves = [leaf.requires_grad_() for leaf in (x, norm, gate, up, down)]
    known, kept = {leaf.untyped_storage().data_ptr() for leaf in leaves}, 0

    def save(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.untyped_storage().data_ptr() in known else tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        norm_mlp(x, norm, EPS, gate, up, down, recompute=recompute)
    assert kept == 64 * 4 * (1 if recompute else 1 + 2 * 96)


def test_no_token_at_all(device) -> None:
    x, norm, gate, up, down = drawn(device, torch.float32, (0, 32), (32,), (96, 32), (96, 32), (32, 96))
    leaves = [leaf.requires_grad_() for leaf in (x, norm, gate, up, down)]
    norm_mlp(*leaves[:2], EPS, *leaves[2:], recompute=False).sum().backward()
    assert all(leaf.grad.abs().sum() == 0 for leaf in leaves)


def test_neighbours_in_memory_are_stacked_without_a_copy() -> None:
    whole = torch.arange(60.0).view(10, 6)
    parts = whole.split([4, 1, 5])
    assert stacked(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(stacked(parts), whole)
    for others in ((parts[1], parts[0]), (parts[0], parts[2]), (parts[0], parts[1].clone()), (whole[:, :3],)):
        assert torch.equal(stacked(others), torch.cat(list(others)))
    assert stacked(parts[1:]).data_ptr() == whole[4:].data_ptr()
