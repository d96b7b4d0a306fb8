"""Mamba-2's recurrence in chunks is the one that goes from token to token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastgrpo.kernels import mamba2 as module
from fastgrpo.kernels.mamba2 import mamba2
from tests.helpers.random_heads import INTERPRETED

LIMIT = (0.1, 2.0)
# The kernels have bfloat16 alone.
DTYPES = [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16]
# The interpreter cuts bfloat16 off where a GPU rounds.
BFLOAT16_BAR = 8e-3 if INTERPRETED else 4e-3
# B, H, G, N and P.
Shape = tuple[int, int, int, int, int]
SMALL: Shape = (2, 4, 2, 16, 24)


def token_by_token(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    state_BHNP: Tensor,
    limit: tuple[float, float] = LIMIT,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Mamba-2 as it stands, in the type of its arguments."""
    step = softplus(dt + dt_bias).clamp(*limit)
    b, c = (each.repeat_interleave(x.shape[2] // each.shape[2], 2) for each in (b, c))
    outputs = []
    for t in range(x.shape[1]):
        state_BHNP = state_BHNP * (step[:, t] * a).exp()[..., None, None]
        state_BHNP = state_BHNP + (step[:, t, :, None] * b[:, t])[..., None] * x[:, t, :, None]
        outputs.append((c[:, t, :, None] @ state_BHNP).squeeze(2) + d[:, None] * x[:, t])
    return torch.stack(outputs, 1), state_BHNP


def given(device: torch.device, length: int, fade: float, dtype: torch.dtype, shape: Shape = SMALL) -> list[Tensor]:
    """x, dt, a, b, c, d and dt_bias of rows, as a layer gives them, and a state."""
    rows, heads, groups, state, values = shape
    shapes = [(rows, length, heads, values), (rows, length, heads), *[(rows, length, groups, state)] * 2]
    x, dt, b, c = (torch.randn(each).to(dtype) for each in shapes)
    of_heads = torch.rand(heads).to(dtype), torch.randn(heads).to(dtype)
    arguments = [x, dt, -fade * torch.rand(heads), b, c, *of_heads, torch.randn(rows, heads, state, values)]
    return [argument.to(device) for argument in arguments]


def ours(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """`mamba2` with `LIMIT`."""
    *others, state = arguments
    return mamba2(*others, dt_limit=LIMIT, initial_state=state)


def with_gradients(rule, arguments: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Outputs, last states, and gradients of all arguments by way of both."""
    leaves = [argument.to(dtype or argument.dtype).requires_grad_() for argument in arguments]
    results, generator = rule(*leaves), torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
    loss = sum(
        (result.double() * weight.to(result.device)).sum() for result, weight in zip(results, weights, strict=True)
    )
    return [*results, *torch.autograd.grad(loss, leaves)]


def compare(found: list[Tensor], expected: list[Tensor], arguments: list[Tensor]) -> None:
    """Results and gradients are exact but for the rounding of their types, products in halves to 16 bits."""
    for number, (result, exact) in enumerate(zip(found, expected, strict=True)):
        # Results, and the gradients of `a`, a sum over tokens of differences, and of states, are in fp32 always.
        halves = result.is_cuda or INTERPRETED
        single = 4e-5 if halves and arguments[0].dtype == torch.bfloat16 else 2e-6 if number < 2 else 4e-6
        bar = 1e-4 if number == 4 else BFLOAT16_BAR if result.dtype == torch.bfloat16 else single
        least = 1e-5 if number == 4 else 1e-6
        error = float((result - exact).detach().norm())
        assert error <= bar * float(exact.detach().norm()) + least, (number, error)
    assert [result.dtype for result in found] == [torch.float32] * 2 + [argument.dtype for argument in arguments]


@pytest.mark.parametrize("length", [1, 130] if INTERPRETED else [1, 63, 64, 65, 300])
@pytest.mark.parametrize(("fade", "groups"), [(0.01, 1), (3.0, 2), (1000.0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_those_of_one_token_after_the_other(
    device: torch.device, length: int, fade: float, groups: int, dtype: torch.dtype
) -> None:
    arguments = given(device, length, fade, dtype, (2, 4, groups, 16, 24))
    compare(with_gradients(ours, arguments), with_gradients(token_by_token, arguments, torch.float64), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_and_values_of_any_width(device: torch.device, dtype: torch.dtype) -> None:
    """Several blocks of states, of values and of a group's heads, none of them full."""
    arguments = given(device, 70, 1.0, dtype, (1, 9, 1, 136, 72))
    compare(with_gradients(ours, arguments), with_gradients(token_by_token, arguments, torch.float64), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_any_size(device: torch.device, dtype: torch.dtype) -> None:
    """Steps far apart, the smallest of them no more than exp(dt); the last state takes nothing of c and d."""
    x, dt, *others, bias, state = given(device, 70, 1.0, dtype)
    dt = torch.tensor([-80.0, -20.0, -6.0, 0.0, 25.0, 90.0])[torch.randint(6, dt.shape)].to(device, dtype)
    arguments = [x, dt, *others, torch.zeros_like(bias), state]

    def free(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return mamba2(*inputs[:-1], initial_state=inputs[-1])

    exact = with_gradients(partial(token_by_token, limit=(0.0, torch.inf)), arguments, torch.float64)
    compare(with_gradients(free, arguments), exact, arguments)
    leaves = [argument.requires_grad_() for argument in arguments]
    gradients = torch.autograd.grad(free(*leaves)[1].sum(), leaves, materialize_grads=True)
    assert [bool(gradient.any()) for gradient in gradients] == [True] * 4 + [False] * 2 + [True] * 2
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_row_in_two_pieces_is_the_whole_row(device: torch.device) -> None:
    """The second begins with the state after the first, which padding leaves as it is; whole rows begin with zeros."""
    arguments = given(device, 150, 1.0, DTYPES[0])[:-1]

    def pieces(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, a, b, c, *others = inputs
        x_first, dt_first, b_first, c_first = (each[:, :100] for each in (x, dt, b, c))
        dt_first = dt_first.masked_fill((torch.arange(100) >= 70).to(device)[:, None], -torch.inf)
        first, state = mamba2(x_first, dt_first, a, b_first, c_first, *others, LIMIT)
        last, state = mamba2(x[:, 70:], dt[:, 70:], a, b[:, 70:], c[:, 70:], *others, LIMIT, state)
        return torch.cat([first[:, :70], last], 1), state

    whole = with_gradients(partial(mamba2, dt_limit=LIMIT), arguments)
    for apart, together in zip(with_gradients(pieces, arguments), whole, strict=True):
        bar = 1e-5 if apart.dtype == DTYPES[0] == torch.float32 else 1e-4 if apart.dtype == torch.float32 else 2e-2
        assert (apart - together).norm() <= bar * together.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_computed_in_parts_are_the_same(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = given(device, 70, 1.0, dtype)
    together = with_gradients(ours, arguments)
    monkeypatch.setattr(module, "TOGETHER", 1)
    for part, whole in zip(with_gradients(ours, arguments), together, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-2 if part.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="programs of a GPU run at once")
@pytest.mark.parametrize("shape", [(2, 48, 1, 128, 64), (1, 16, 2, 256, 128), (3, 64, 8, 128, 80)])
def test_many_chunks_and_heads_on_a_gpu(shape: Shape) -> None:
    """Of layers' sizes the kernels agree with plain torch, and with themselves bit for bit; columns are read as views
    of one projection, where they are."""
    arguments = given(torch.device("cuda"), 2000, 0.1, torch.bfloat16, shape)
    packed = torch.cat([arguments[number].flatten(2) for number in (0, 1, 3, 4)], 2)
    columns = packed.split([arguments[number][0, 0].numel() for number in (0, 1, 3, 4)], 2)
    for number, column in zip((0, 1, 3, 4), columns, strict=True):
        arguments[number] = column.unflatten(2, arguments[number].shape[2:])
    found, again = (with_gradients(ours, arguments) for _ in range(2))
    compare(found, with_gradients(ours, arguments, torch.float32), arguments)
    assert all(torch.equal(result, same) for result, same in zip(found, again, strict=True))
