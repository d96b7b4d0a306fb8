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


def token_by_token(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor, state_BHNP: Tensor
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Mamba-2 as it stands, in the type of its arguments."""
    step = softplus(dt + dt_bias).clamp(*LIMIT)
    b, c = (each.repeat_interleave(x.shape[2] // each.shape[2], 2) for each in (b, c))
    outputs = []
    for t in range(x.shape[1]):
        state_BHNP = state_BHNP * (step[:, t] * a).exp()[..., None, None]
        state_BHNP = state_BHNP + (step[:, t, :, None] * b[:, t])[..., None] * x[:, t, :, None]
        outputs.append((c[:, t, :, None] @ state_BHNP).squeeze(2) + d[:, None] * x[:, t])
    return torch.stack(outputs, 1), state_BHNP


def given(length: int, fade: float, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """x, dt, a, b, c, d and dt_bias of two rows and four heads, as a layer gives them, and a state."""
    torch.manual_seed(length)
    shapes = [(2, length, 4, 24), (2, length, 4), (2, length, groups, 16), (2, length, groups, 16)]
    x, dt, b, c = (torch.randn(shape).to(dtype) for shape in shapes)
    of_heads = torch.rand(4).to(dtype), torch.randn(4).to(dtype)
    return [x, dt, -fade * torch.rand(4), b, c, *of_heads, torch.randn(2, 4, 16, 24)]


def ours(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """`mamba2` with `LIMIT`."""
    *others, state = arguments
    return mamba2(*others, dt_limit=LIMIT, initial_state=state)


def with_gradients(rule, arguments: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Outputs, last states, and gradients of all arguments by way of both."""
    leaves = [argument.to(dtype or argument.dtype).requires_grad_() for argument in arguments]
    results, generator = rule(*leaves), torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
    loss = sum((result.double() * weight).sum() for result, weight in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
@pytest.mark.parametrize(("fade", "groups"), [(0.01, 1), (3.0, 2), (1000.0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_one_token_after_the_other(
    length: int, fade: float, groups: int, dtype: torch.dtype
) -> None:
    arguments = given(length, fade, groups, dtype)
    found = with_gradients(ours, arguments)
    expected = with_gradients(token_by_token, arguments, torch.float64)
    for number, (result, exact) in enumerate(zip(found, expected, strict=True)):
        # Results, and the gradients of `a`, a sum over tokens of differences, and of states, are in fp32 always.
        bar = 2e-6 if number < 2 else 1e-4 if number == 4 else 4e-3 if result.dtype == torch.bfloat16 else 4e-6
        least = 1e-5 if number == 4 else 1e-6
        assert (result - exact).norm() <= bar * exact.norm() + least, (number, length)
    assert [result.dtype for result in found] == [torch.float32] * 2 + [argument.dtype for argument in arguments]


def test_a_row_in_two_pieces_is_the_whole_row() -> None:
    """The second begins with the state after the first, which padding leaves as it is; whole rows begin with zeros."""
    arguments = given(150, 1.0, 2, torch.float32)[:-1]

    def pieces(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, a, b, c, *others = inputs
        x_first, dt_first, b_first, c_first = (each[:, :100] for each in (x, dt, b, c))
        dt_first = dt_first.masked_fill(torch.arange(100)[:, None] >= 70, -torch.inf)
        first, state = mamba2(x_first, dt_first, a, b_first, c_first, *others, LIMIT)
        last, state = mamba2(x[:, 70:], dt[:, 70:], a, b[:, 70:], c[:, 70:], *others, LIMIT, state)
        return torch.cat([first[:, :70], last], 1), state

    whole = with_gradients(partial(mamba2, dt_limit=LIMIT), arguments)
    for apart, together in zip(with_gradients(pieces, arguments), whole, strict=True):
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-4)


def test_rows_computed_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = given(130, 1.0, 2, torch.float32)
    together = with_gradients(ours, arguments)
    monkeypatch.setattr(module, "TOGETHER", 1)
    for part, whole in zip(with_gradients(ours, arguments), together, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-4)
