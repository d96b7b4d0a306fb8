"""Mamba-2's recurrence in chunks is the one that goes from token to token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastgrpo.kernels import mamba2 as module
from fastgrpo.kernels.mamba2 import mamba2

LIMIT = (0.1, 2.0)


def token_by_token(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor) -> Tensor:
    """Algorithm 1 of Mamba-2 as it stands, in the type of its arguments."""
    step = softplus(dt + dt_bias).clamp(*LIMIT)
    b, c = (each.repeat_interleave(x.shape[2] // each.shape[2], 2) for each in (b, c))
    state_BHNP = torch.zeros_like(b[:, 0, ..., None] * x[:, 0, :, None])
    outputs = []
    for t in range(x.shape[1]):
        state_BHNP = state_BHNP * (step[:, t] * a).exp()[..., None, None]
        state_BHNP = state_BHNP + (step[:, t, :, None] * b[:, t])[..., None] * x[:, t, :, None]
        outputs.append((c[:, t, :, None] @ state_BHNP).squeeze(2) + d[:, None] * x[:, t])
    return torch.stack(outputs, 1)


def given(length: int, fade: float, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """x, dt, a, b, c, d and dt_bias of two rows and four heads, as a layer gives them."""
    torch.manual_seed(length)
    shapes = [(2, length, 4, 24), (2, length, 4), (2, length, groups, 16), (2, length, groups, 16)]
    x, dt, b, c = (torch.randn(shape).to(dtype) for shape in shapes)
    return [x, dt, -fade * torch.rand(4), b, c, torch.rand(4).to(dtype), torch.randn(4).to(dtype)]


def with_gradients(rule, arguments: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [argument.to(dtype or argument.dtype).requires_grad_() for argument in arguments]
    output = rule(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad((output.double() * weights).sum(), leaves)]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
@pytest.mark.parametrize(("fade", "groups"), [(0.01, 1), (3.0, 2), (1000.0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_one_token_after_the_other(
    length: int, fade: float, groups: int, dtype: torch.dtype
) -> None:
    arguments = given(length, fade, groups, dtype)
    found = with_gradients(partial(mamba2, dt_limit=LIMIT), arguments)
    expected = with_gradients(token_by_token, arguments, torch.float64)
    for number, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        # The output and the gradient of `a`, which is a sum over tokens of differences, are in fp32 always.
        bar = 2e-6 if number == 0 else 1e-4 if number == 3 else 4e-3 if dtype == torch.bfloat16 else 4e-6
        assert (ours - exact).norm() <= bar * exact.norm() + 1e-6, (number, length)
    assert [ours.dtype for ours in found] == [torch.float32, *(argument.dtype for argument in arguments)]


def test_rows_computed_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = given(130, 1.0, 2, torch.float32)
    together = with_gradients(mamba2, arguments)
    monkeypatch.setattr(module, "TOGETHER", 1)
    for part, whole in zip(with_gradients(mamba2, arguments), together, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-4)
