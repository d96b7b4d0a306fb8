"""The short convolution is torch's of each channel, with silu, whatever lies beside its input in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from fastgrpo.kernels.convolution import convolved
from tests.helpers.random_heads import INTERPRETED

DTYPES = [torch.float32, torch.bfloat16]


def exact(x_SLC: Tensor, weight_CW: Tensor, *bias: Tensor) -> Tensor:
    channels, taps = weight_CW.shape
    padded = conv1d(x_SLC.mT, weight_CW[:, None], *bias, padding=taps - 1, groups=channels)
    return silu(padded[..., : x_SLC.shape[1]]).mT


def with_gradients(function, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "length", "channels", "taps"), [(3, 70, 150, 4), (1, 2, 8, 4), (2, 33, 130, 2)])
def test_outputs_and_gradients_are_those_of_torch(
    device: torch.device, dtype: torch.dtype, biased: bool, rows: int, length: int, channels: int, taps: int
) -> None:
    """Of tokens that lie in a wider projection, and of gradients of which each token's lie beside others."""
    wide, dy = torch.randn(2, rows, length, channels + 24).to(device, dtype)
    weight, bias = torch.randn(channels, taps).to(device, dtype), torch.randn(channels).to(device, dtype)
    parameters = [weight, bias] if biased else [weight]
    x, dy = wide[..., 16 : 16 + channels], dy[..., 8 : 8 + channels]
    found = with_gradients(lambda x, *others: convolved(x.mT, *others).mT, [x, *parameters], dy)
    expected = with_gradients(exact, [each.double() for each in (x, *parameters)], dy)
    # The interpreter cuts bf16 off where a GPU rounds.
    bar = 1e-5 if dtype == torch.float32 else 2e-2 if INTERPRETED else 8e-3
    for number, (ours, true) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == dtype
        assert (ours - true).norm() <= bar * true.norm(), (number, float((ours - true).norm() / true.norm()))


def test_rows_do_not_reach_into_each_other(device: torch.device) -> None:
    x, weight = torch.randn(2, 8, 40, device=device), torch.randn(8, 4, device=device)
    together = convolved(x, weight)
    for row, alone in enumerate(x):
        torch.testing.assert_close(together[row : row + 1], convolved(alone[None], weight))


def test_rows_of_one_token_lie_in_memory_as_others_do(device: torch.device) -> None:
    """torch calls them contiguous whatever the stride from one token to the next, of which there is none."""
    inputs = [torch.randn(3, 8, 1).to(device).mT, torch.randn(8, 4).to(device)]
    dy = torch.randn(3, 8, 1).to(device).mT
    assert inputs[0].is_contiguous()
    assert inputs[0].stride() == dy.stride() == (8, 1, 1)
    found = with_gradients(lambda x, w: convolved(x.mT, w).mT, inputs, dy)
    for ours, true in zip(found, with_gradients(exact, [each.double() for each in inputs], dy), strict=True):
        torch.testing.assert_close(ours.double(), true, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="programs of a GPU run at once")
def test_a_layers_size_on_a_gpu() -> None:
    """It agrees with torch in fp32, and with itself bit for bit."""
    x = torch.randn(4, 3000, 8192, device="cuda", dtype=torch.bfloat16)
    weight, dy = torch.randn(8192, 4, device="cuda", dtype=torch.bfloat16), torch.randn_like(x)
    found, again = (with_gradients(lambda x, w: convolved(x.mT, w).mT, [x, weight], dy) for _ in range(2))
    for ours, same, true in zip(found, again, with_gradients(exact, [x.float(), weight.float()], dy), strict=True):
        assert torch.equal(ours, same)
        assert (ours - true).norm() <= 4e-3 * true.norm()
