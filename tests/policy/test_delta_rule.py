"""The gated delta rule in chunks is the one that goes from token to token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from fastgrpo.policy import delta_rule, recurrent
from fastgrpo.policy.delta_rule import gated_delta_rule


def token_by_token(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Gated DeltaNet's equation 10 as it stands, in the type of its arguments."""
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    state_BHKV = torch.zeros_like(key[:, 0, ..., None] * value[:, 0, :, None])
    outputs = []
    for t in range(query.shape[1]):
        k_BHK1, faded_BHKV = key[:, t, ..., None], state_BHKV * g[:, t].exp()[..., None, None]
        old_BH1V = k_BHK1.mT @ faded_BHKV
        state_BHKV = faded_BHKV + k_BHK1 * (beta[:, t, :, None, None] * (value[:, t, :, None] - old_BH1V))
        outputs.append((query[:, t, :, None] @ state_BHKV).squeeze(2) / query.shape[-1] ** 0.5)
    return torch.stack(outputs, 1)


def given(length: int, decay: float, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value, g and beta of two rows and three heads, as a layer gives them."""
    torch.manual_seed(length)
    shapes = [(2, length, 3, 16), (2, length, 3, 16), (2, length, 3, 24)]
    query, key, value = (torch.randn(shape).to(dtype) for shape in shapes)
    return [query, key, value, -decay * torch.rand(2, length, 3), torch.rand(2, length, 3).to(dtype)]


def with_gradients(rule, arguments: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [argument.to(dtype or argument.dtype).requires_grad_() for argument in arguments]
    output = rule(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad((output.double() * weights).sum() + 0 * leaves[3].sum(), leaves)]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("decay", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_one_token_after_the_other(
    length: int, decay: float, dtype: torch.dtype
) -> None:
    arguments = given(length, decay, dtype)
    found = with_gradients(gated_delta_rule, arguments)
    expected = with_gradients(token_by_token, arguments, torch.float64)
    bar = 2e-6 if dtype == torch.float32 else 4e-3  # in bfloat16 half of what its 8 bits tell apart
    for ours, exact in zip(found, expected, strict=True):
        # With bfloat16 g alone is in fp32, and what comes back for outputs is rounded.
        assert (ours - exact).norm() <= bar * exact.norm(), (length, decay)
    assert [ours.dtype for ours in found] == [dtype, *(argument.dtype for argument in arguments)]


def test_outputs_and_gradients_are_those_of_transformers() -> None:
    def theirs(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return torch_chunk_gated_delta_rule(query, key, value, g, beta, use_qk_l2norm_in_kernel=True)[0]

    arguments = given(200, 0.1, torch.float32)
    for ours, other in zip(*(with_gradients(rule, arguments) for rule in (gated_delta_rule, theirs)), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-5)


def test_heads_computed_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = given(65, 0.1, torch.float32)
    together = with_gradients(gated_delta_rule, arguments)
    monkeypatch.setattr(delta_rule, "TOGETHER", 2 * 2 * 65 * 24)
    for part, whole in zip(with_gradients(gated_delta_rule, arguments), together, strict=True):
        torch.testing.assert_close(part, whole)


@pytest.mark.parametrize(
    ("installed", "hopper", "has"),
    [
        ({}, True, False),
        ({"fla-core": "0.6.0", "triton": "3.7.0"}, True, False),
        ({"fla-core": "0.6.0", "triton": "3.7.0"}, False, True),
        ({"fla-core": "0.6.0", "triton": "3.7.0", "tilelang": "0.1"}, True, True),
        ({"fla-core": "0.6.0", "triton": "3.7.1"}, True, True),
        ({"fla-core": "0.6.0", "triton": "3.3.1"}, True, True),
    ],
)
def test_flash_linear_attention_stays_where_it_has_gradients(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], hopper: bool, has: bool
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise recurrent.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(recurrent, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0) if hopper else (8, 0))
    assert recurrent.fla_has_gradients.__wrapped__() is has
