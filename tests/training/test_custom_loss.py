"""A loss named in the configuration: its gradient through the head, and one sentence for what is none."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch

from fastgrpo.config import LOSS_PRESETS, Grpo
from fastgrpo.errors import UserError
from fastgrpo.training.loss import LossTokens, policy_loss, token_logprobs
from fastgrpo.training.packing import pack, sequence_weights
from tests.training.test_loss import TinyPolicy, samples, step_gradient


def ppo(tokens: LossTokens) -> torch.Tensor:
    """DAPO's clipped objective."""
    ratio_N = (tokens.logprobs_N - tokens.old_logprobs_N).exp()
    clipped_N = ratio_N.clamp(0.95, 1.05)
    return -torch.minimum(ratio_N * tokens.advantages_N, clipped_N * tokens.advantages_N)


def by_sequence(tokens: LossTokens) -> torch.Tensor:
    """GSPO's, in which every token's loss holds the logprobs of its whole sequence."""
    _, index_N = tokens.sequence_N.unique(return_inverse=True)
    log_ratio_N = tokens.logprobs_N - tokens.old_logprobs_N
    sums = log_ratio_N.new_zeros(int(index_N.max()) + 1).index_add(0, index_N, log_ratio_N)
    ratio_N = (sums / index_N.bincount()).exp()[index_N]
    clipped_N = ratio_N.clamp(0.95, 1.05)
    return -torch.minimum(ratio_N * tokens.advantages_N, clipped_N * tokens.advantages_N)


def short(tokens: LossTokens) -> torch.Tensor:
    return tokens.logprobs_N[1:]


def number(tokens: LossTokens) -> float:
    return 1.0


def detached(tokens: LossTokens) -> torch.Tensor:
    return tokens.logprobs_N.detach()


def infinite(tokens: LossTokens) -> torch.Tensor:
    return tokens.logprobs_N / 0.0


def steep(tokens: LossTokens) -> torch.Tensor:
    return (tokens.logprobs_N * 0.0).sqrt()


def raising(tokens: LossTokens) -> torch.Tensor:
    raise ZeroDivisionError("by nothing")


def leaving(tokens: LossTokens) -> torch.Tensor:
    raise SystemExit(3)


def configuration(function: str, **keys: object) -> Grpo:
    return msgspec.structs.replace(Grpo(), loss_function=f"{__name__}:{function}", **keys)


@pytest.mark.parametrize("estimator", ["k3", "unbiased"])
@pytest.mark.parametrize(("function", "name"), [("ppo", "dapo"), ("by_sequence", "gspo")])
def test_a_preset_written_as_a_function_has_the_presets_gradient(function: str, name: str, estimator: str) -> None:
    """With the KL term and the entropy bonus, which are the engine's."""
    keys = LOSS_PRESETS[name] | {"clip_low": 0.05, "clip_high": 0.05, "kl_weight": 0.1, "entropy_weight": 0.05}
    keys |= {"kl_estimator": estimator}
    expected = step_gradient(TinyPolicy(), samples(), msgspec.structs.replace(Grpo(), tis_cap=0.0, **keys), 64)
    found = step_gradient(TinyPolicy(), samples(), configuration(function, **keys), 64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def sapo_objective(ratio: torch.Tensor, advantage: float) -> torch.Tensor:
    """arXiv 2511.20347."""
    sharpness = 1.0 if advantage > 0 else 1.05
    return (torch.sigmoid(sharpness * (ratio - 1)) * 4 / sharpness * advantage).mean()


def gmpo_objective(ratio: torch.Tensor, advantage: float) -> torch.Tensor:
    """arXiv 2507.20673: a ratio counts as clipped only where that makes the objective less."""
    clipped = ratio.clamp(math.exp(-0.4), math.exp(0.4))
    worse = torch.minimum(ratio, clipped) if advantage > 0 else torch.maximum(ratio, clipped)
    return worse.prod() ** (1 / len(ratio)) * advantage


def masked_objective(ratio: torch.Tensor, advantage: float) -> torch.Tensor:
    """arXiv 2512.02556, eq. 9."""
    kept = advantage >= 0 or -float(ratio.log().mean()) <= 0.05
    return kept * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


@pytest.mark.parametrize(
    ("name", "objective"),
    [("sapo", sapo_objective), ("gmpo", gmpo_objective), ("off_policy_masked", masked_objective)],
)
def test_the_examples_losses_have_their_papers_gradient(name: str, objective: Any) -> None:
    """Answer by answer, with ratios on both sides of the clip."""
    config = msgspec.structs.replace(Grpo(), loss_function=f"examples.losses:{name}", **LOSS_PRESETS["grpo"])
    policy, items = TinyPolicy(), samples()
    weights = sequence_weights([each.loss_tokens for each in items], "sequence", constant=1, totals=(1, len(items)))
    expected = torch.zeros(())
    for batch in pack(items, weights, 10_000, "cpu"):
        logprobs_N = token_logprobs(policy, batch, 1.0)
        batch.old_logprobs_N = logprobs_N + 0.6 * torch.sin(batch.targets_N.float())
        batch.sampled_logprobs_N = batch.old_logprobs_N
        policy_loss(policy, batch, config).loss.backward()
        found = policy.gradient()
        logits = policy.hidden(batch)[batch.loss_index_N] @ policy.head_weight.T
        ratio_N = (logits.log_softmax(-1).gather(1, batch.targets_N[:, None])[:, 0] - batch.old_logprobs_N).exp()
        for sequence in batch.sequence_N.unique():
            mine_N = batch.sequence_N == sequence
            expected = expected - objective(ratio_N[mine_N], float(batch.advantages_N[mine_N][0])) / len(items)
    expected.backward()
    torch.testing.assert_close(found, policy.gradient(), rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_functions_weighted_sum() -> None:
    policy, items = TinyPolicy(), samples(4)
    (batch,) = pack(items, [0.1, 0.2, 0.3, 0.4], 1000, "cpu")
    loss = policy_loss(policy, batch, configuration("ppo")).loss
    # On-policy: every ratio is 1.
    torch.testing.assert_close(loss, -(batch.advantages_N * batch.weights_N).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", r"short must return a tensor \[\d+\] made of .*, the loss of each .* got shape \[\d+\]"),
        ("number", "number must return a tensor .* got float"),
        ("detached", "detached must return a tensor .* before any mean, got one that they have no part in"),
        ("infinite", "infinite returned a loss that is not finite"),
        ("steep", "the gradient of .*steep is not finite"),
        ("raising", "raising raised ZeroDivisionError: by nothing"),
        ("leaving", "leaving raised SystemExit: 3"),
        ("missing", "the function .*missing cannot be imported"),
    ],
)
def test_what_is_no_loss_is_one_sentence(function: str, message: str) -> None:
    (batch, *_) = pack(samples(2), [1.0, 1.0], 1000, "cpu")
    with pytest.raises(UserError, match=message) as caught:
        policy_loss(TinyPolicy(), batch, configuration(function))
    assert "grpo.loss_function" in str(caught.value)
    assert "\n" not in str(caught.value)
