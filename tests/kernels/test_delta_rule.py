"""The gated delta rule in chunks is the one that goes from token to token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from fastgrpo.kernels import delta_rule
from fastgrpo.kernels.delta_rule import gated_delta_rule
from tests.helpers.random_heads import INTERPRETED

# B, L, H, K, V: chunks that are full, nearly so and hardly, columns that fill no block, several blocks, a layer's own.
Shape = tuple[int, int, int, int, int]
SHAPES: list[Shape] = [
    (2, 1, 3, 16, 24),
    (1, 63, 1, 16, 16),
    (1, 64, 2, 20, 72),
    (2, 65, 1, 48, 33),
    (1, 130, 1, 128, 128),
]
# The kernels have bfloat16 alone.
DTYPES = [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16]
# The interpreter cuts bfloat16 off where a GPU rounds, which is at most half of what its 8 bits tell apart.
BFLOAT16_BAR = 8e-3 if INTERPRETED else 4e-3


def token_by_token(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet's equation 10 as it stands, in the type of its arguments."""
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    outputs = []
    for t in range(query.shape[1]):
        k_BHK1, faded_BHKV = key[:, t, ..., None], state_BHKV * g[:, t].exp()[..., None, None]
        old_BH1V = k_BHK1.mT @ faded_BHKV
        state_BHKV = faded_BHKV + k_BHK1 * (beta[:, t, :, None, None] * (value[:, t, :, None] - old_BH1V))
        outputs.append((query[:, t, :, None] @ state_BHKV).squeeze(2) / query.shape[-1] ** 0.5)
    return torch.stack(outputs, 1), state_BHKV


def given(shape: Shape, decay: float, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Query, key, value, g and beta as a layer gives them, columns of a token a row's length apart, and a state."""
    rows, length, heads, keys, values = shape
    columns = [(torch.randn(rows, heads * width, length)).to(device, dtype).mT for width in (keys, keys, values)]
    query, key, value = (each.unflatten(2, (heads, -1)) for each in columns)
    g, beta = torch.rand(2, rows, length, heads).to(device)
    return [query, key, value, -decay * g, beta.to(dtype), torch.randn(rows, heads, keys, values).to(device)]


def with_gradients(rule, arguments: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Outputs, last states, and gradients of all arguments by way of both."""
    leaves = [argument.detach().to(dtype or argument.dtype).requires_grad_() for argument in arguments]
    results = rule(*leaves)
    generator, loss = torch.Generator().manual_seed(1), 0 * leaves[3].sum().double()
    for result in results:
        # Numbers that what comes back for an output, in its type, can hold.
        weights = torch.randn(result.shape, generator=generator).bfloat16()
        loss = loss + (result.double() * weights.to(result.device, torch.float64)).sum()
    return [*results, *torch.autograd.grad(loss, leaves)]


def compare(arguments: list[Tensor], g_bar: float | None = None) -> None:
    """Results and gradients are exact but for the rounding of their types; g's as far as its bar says."""
    found = with_gradients(gated_delta_rule, arguments)
    expected = with_gradients(token_by_token, arguments, torch.float64)
    single = arguments[0].dtype == torch.float32
    # With bfloat16 g and states alone are in fp32, and show that products of kernels have 16 bits.
    low = BFLOAT16_BAR
    bars = [2e-6] * 8 if single else [low, 1e-4, low, low, low, 1e-4, low, 1e-4]
    bars[5] = g_bar or bars[5]
    for number, (ours, exact, bar) in enumerate(zip(found, expected, bars, strict=True)):
        assert (ours - exact).norm() <= bar * exact.norm(), (number, float((ours - exact).norm() / exact.norm()))
    results = [arguments[0].dtype, torch.float32]
    assert [ours.dtype for ours in found] == [*results, *(argument.dtype for argument in arguments)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 10.0] if INTERPRETED else [0.0, 0.1, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_those_of_one_token_after_the_other(
    device: torch.device, shape: Shape, decay: float, dtype: torch.dtype
) -> None:
    compare(given(shape, decay, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_comes_again_and_again_is_overwritten(device: torch.device, dtype: torch.dtype) -> None:
    """Each value replaces most of those before: powers of what T inverts would have numbers of 10^15."""
    query, key, value, g, beta, state = given((1, 80, 1, 16, 16), 0.0, dtype, device)
    # What states had before hardly matters, so that g's gradient is the rest of numbers that cancel.
    compare([query, key[:, :1].expand_as(key), value, g, torch.full_like(beta, 0.9), state], g_bar=1e-2)


def test_outputs_and_gradients_are_those_of_transformers(device: torch.device) -> None:
    """Of rows that begin with zeros, too."""

    def theirs(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        return torch_chunk_gated_delta_rule(query, key, value, g, beta, **options)

    arguments = given((2, 200, 3, 16, 24), 0.1, torch.float32, device)[:-1]
    for ours, other in zip(*(with_gradients(rule, arguments) for rule in (gated_delta_rule, theirs)), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_computed_in_parts_are_the_same(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = given((2, 65, 3, 16, 24), 0.1, dtype, device)
    together = with_gradients(gated_delta_rule, arguments)
    # As views of one projection, which kernels read where they are.
    packed = torch.cat([columns.flatten(2) for columns in arguments[:3]], 2)
    columns = packed.split([3 * 16, 3 * 16, 3 * 24], 2)
    arguments[:3] = [each.unflatten(2, (3, -1)) for each in columns]
    monkeypatch.setattr(delta_rule, "TOGETHER", 2 * 2 * 128 * 24)
    for part, whole in zip(with_gradients(gated_delta_rule, arguments), together, strict=True):
        torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_in_two_pieces_is_the_whole_row(device: torch.device, dtype: torch.dtype) -> None:
    """The second begins with the state after the first, which padding leaves as it is."""
    arguments = given((2, 90, 2, 16, 24), 0.1, dtype, device)

    def pieces(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *columns, state = inputs
        padded = [torch.cat([each[:, :35], each[:, 40:70]], 1) for each in columns]
        for strength in padded[3:]:
            strength[:, 35:] = 0
        first, state = gated_delta_rule(*padded, state)
        last, state = gated_delta_rule(*(each[:, 35:] for each in columns), state)
        return torch.cat([first[:, :35], last], 1), state

    bar = 2e-5 if dtype == torch.float32 else BFLOAT16_BAR
    for apart, whole in zip(*(with_gradients(rule, arguments) for rule in (pieces, gated_delta_rule)), strict=True):
        assert (apart - whole).norm() <= bar * whole.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="programs of a GPU run at once")
def test_many_chunks_and_heads_on_a_gpu() -> None:
    """Of a layer's size the kernels agree with plain torch, and with themselves bit for bit."""
    arguments = given((2, 2000, 32, 128, 128), 0.1, torch.bfloat16, torch.device("cuda"))
    found, again = (with_gradients(gated_delta_rule, arguments) for _ in range(2))
    plain = with_gradients(gated_delta_rule, arguments, torch.float32)
    bars = [4e-3, 1e-4, 4e-3, 4e-3, 4e-3, 1e-4, 4e-3, 1e-4]
    for number, (ours, same, exact, bar) in enumerate(zip(found, again, plain, bars, strict=True)):
        assert torch.equal(ours, same), number
        assert (ours - exact).norm() <= bar * exact.norm(), (number, float((ours - exact).norm() / exact.norm()))
