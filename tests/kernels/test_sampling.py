"""Drawing tokens: against a Philox of numpy's integers, by frequencies, and at the edges of what a row can hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.random_heads import INTERPRETED

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU, or Triton's interpreter"
)

on_gpu = pytest.mark.skipif(INTERPRETED, reason="many draws; the interpreter's are compared with the definition")


def drawn(logits_NV: Tensor, temperatures: list[float], seeds: list[int], positions: list[int]) -> tuple[Tensor, ...]:
    from fastgrpo.kernels.sampling_triton import sample

    device = logits_NV.device
    temperature_N = torch.tensor(temperatures, device=device)
    seed_N, position_N = (torch.tensor(numbers, device=device) for numbers in (seeds, positions))
    return tuple(found.cpu() for found in sample(logits_NV, temperature_N, seed_N, position_N))


def noise(seed: int, position: int, vocabulary: int) -> np.ndarray:
    """Exponential noise [vocabulary] of Philox4x32-10 (Salmon et al. 2011), four words a counter, in float64."""
    low, count = 0xFFFFFFFF, -(-vocabulary // 4)
    counters = [np.arange(count, dtype=np.uint64)]
    counters += [np.full(count, part & low, np.uint64) for part in (position, position >> 32, 0)]
    keys = [np.uint64(seed & low), np.uint64(seed >> 32 & low)]
    for _ in range(10):
        first, second = counters[0] * np.uint64(0xD2511F53), counters[2] * np.uint64(0xCD9E8D57)
        mask, half = np.uint64(low), np.uint64(32)
        counters = [
            (second >> half) ^ counters[1] ^ keys[0],
            second & mask,
            (first >> half) ^ counters[3] ^ keys[1],
            first & mask,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & mask, (keys[1] + np.uint64(0xBB67AE85)) & mask]
    bits = np.stack(counters, axis=1).reshape(-1)[:vocabulary]
    return -np.log1p(-(bits.astype(np.float64) + 0.5) / 2**32)


@pytest.mark.parametrize("vocabulary", [1, 3, 4096, 4099, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_are_those_of_the_definition(vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    logits_NV = (torch.randn(6, vocabulary, device=device) * 3).to(dtype)
    temperatures, positions = [1.0, 0.7, 1.3, 1.0, 0.0, 1.0], [0, 5, 5, 2**33 + 1, 7, 1023]
    seeds = [0, 1, 2**40 + 3, -5, 9, 2**63 - 1]
    token_N, logprob_N = drawn(logits_NV, temperatures, seeds, positions)
    for row, temperature in enumerate(temperatures):
        z_V = logits_NV[row].double().cpu() / (temperature or 1.0)
        noise_V = torch.from_numpy(noise(seeds[row], positions[row], vocabulary))
        scores_V = z_V - noise_V.log() if temperature else z_V
        assert token_N[row] == scores_V.argmax(), row
        torch.testing.assert_close(logprob_N[row].double(), z_V.log_softmax(0)[token_N[row]], atol=2e-5, rtol=1e-5)


@on_gpu
def test_frequencies_are_the_softmax(device: torch.device) -> None:
    logits_V = torch.tensor([2.0, 0.0, 1.0, -3.0, 0.5, float("-inf"), -1.0], device=device)
    count = 200_000
    found, _ = drawn(logits_V.expand(count, 7), [0.8] * count, list(range(count)), [3] * count)
    expected_V = (logits_V.double().cpu() / 0.8).softmax(0)
    errors_V = (torch.bincount(found, minlength=7) / count - expected_V).abs()
    assert (errors_V <= 5 * (expected_V * (1 - expected_V) / count).sqrt()).all()


def test_a_draw_hangs_on_its_own_row_alone(device: torch.device) -> None:
    """Not on what is beside it, nor on whether the temperature has been applied already."""
    logits_NV = torch.randn(3, 5000, device=device)
    token_N, logprob_N = drawn(logits_NV, [0.5] * 3, [1, 2, 3], [4, 5, 6])
    alone, its_logprob = drawn(logits_NV[1:2] / 0.5, [1.0], [2], [5])
    assert alone[0] == token_N[1]
    torch.testing.assert_close(its_logprob[0], logprob_N[1])


def test_words_beyond_the_vocabulary_are_not_read(device: torch.device) -> None:
    padded_NP = torch.full((2, 4200), 1e4, device=device)
    padded_NP[:, :4100] = torch.randn(2, 4100, device=device)
    token_N, logprob_N = drawn(padded_NP[:, :4100], [1.0, 1.0], [1, 2], [0, 0])
    same_N, its_logprob_N = drawn(padded_NP[:, :4100].contiguous(), [1.0, 1.0], [1, 2], [0, 0])
    assert token_N.equal(same_N)
    assert logprob_N.equal(its_logprob_N)
    assert (token_N < 4100).all()


def test_masked_words_are_never_drawn(device: torch.device) -> None:
    """Whole tiles of them too; and a single word that is left is certain."""
    logits_NV = torch.full((2, 9000), float("-inf"), device=device)
    logits_NV[0, 8999] = -300.0
    logits_NV[1, [5, 8000]] = torch.tensor([1.0, 1.0], device=device)
    token_N, logprob_N = drawn(logits_NV, [1.0, 1.0], [1, 2], [0, 0])
    assert token_N[0] == 8999
    assert token_N[1] in (5, 8000)
    torch.testing.assert_close(logprob_N, torch.tensor([0.0, -0.6931472]))


@on_gpu
def test_far_words_are_drawn_as_seldom_as_they_are_likely(device: torch.device) -> None:
    """20,000 words of 1e-6 each, whose noise has to be finer than a float near 1: 2 % of draws."""
    logits_V = torch.full((20_001,), -13.8155, device=device)
    logits_V[7] = 0.0
    count = 20_000
    found, _ = drawn(logits_V.expand(count, 20_001), [1.0] * count, list(range(count)), [0] * count)
    expected = 1 - 1 / (1 + 20_000 * np.exp(-13.8155))
    assert abs((found != 7).double().mean() - expected) <= 5 * np.sqrt(expected / count)


def test_what_is_no_number_gives_no_logprob(device: torch.device) -> None:
    """A sync's check, and the loss, see it: it is not taken for a likely token."""
    logits_NV = torch.randn(1, 300, device=device)
    logits_NV[0, 17] = float("nan")
    token_N, logprob_N = drawn(logits_NV, [1.0], [1], [0])
    assert 0 <= token_N[0] < 300
    assert logprob_N.isnan().all()
