"""The step's gradient: independent of the micro-batches, and equal to the textbook formulas."""

from typing import Any, get_args
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest
import torch

from fastgrpo.config import LOSS_PRESETS, Grpo
from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.kernels.reference import KlEstimator, kl_estimate
from fastgrpo.training import advantage
from fastgrpo.training.advantage import less_kl, to_samples
from fastgrpo.training.loss import policy_loss, sft_loss, token_logprobs
from fastgrpo.training.packing import pack, rank_batches, sequence_weights
from fastgrpo.types import UNENDED, Group, Result, Reward, Rollout, Sample

VOCAB, WIDTH = 37, 16


class TinyPolicy:
    """An embedding and a head: enough to see how weights, packing and ratios reach the gradient."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
        self.head_weight = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
        self.device = torch.device("cpu")

    def head(self, temperature: float) -> dict[str, Any]:
        return {"weight_VH": self.head_weight, "temperature": temperature}

    def gathered(self, compute):
        return compute()

    def hidden(self, batch) -> torch.Tensor:
        return self.embedding[batch.input_ids_T] + 0.01 * batch.position_ids_T[:, None]

    def gradient(self) -> torch.Tensor:
        flat = torch.cat([self.embedding.grad.flatten(), self.head_weight.grad.flatten()])
        self.embedding.grad = self.head_weight.grad = None
        return flat


def samples(count: int = 9) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        length = 5 + 3 * number
        ids = torch.randint(VOCAB, (length,), generator=generator).tolist()
        mask = [0, 0] + [1] * (length - 2)
        logprobs = (-3 - torch.rand(length, generator=generator)).tolist()
        made.append(Sample(ids, mask, logprobs, advantage=float(number % 3 - 1) * (1 + number / 10)))
    return made


def step_gradient(policy: TinyPolicy, items: list[Sample], config: Grpo, budget: int) -> torch.Tensor:
    counts = [sample.loss_tokens for sample in items]
    totals = (sum(counts), len(items))
    weights = sequence_weights(counts, config.normaliser, constant=config.max_new_tokens, totals=totals)
    for batch in pack(items, weights, budget, "cpu"):
        batch.old_logprobs_N = token_logprobs(policy, batch, 1.0) + 0.1 * torch.sin(batch.targets_N.float())
        batch.ref_logprobs_N = batch.old_logprobs_N - 0.05
        policy_loss(policy, batch, config).loss.backward()
    return policy.gradient()


@pytest.mark.parametrize("name", sorted(LOSS_PRESETS))
@pytest.mark.parametrize("budget", [1, 40, 64])
def test_the_gradient_does_not_depend_on_how_the_step_is_cut(name: str, budget: int) -> None:
    config = msgspec.structs.replace(Grpo(), kl_weight=0.1, **LOSS_PRESETS[name])
    policy = TinyPolicy()
    whole = step_gradient(policy, samples(), config, 100_000)
    cut = step_gradient(policy, samples(), config, budget)
    assert whole.norm() > 0
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def textbook_loss(policy: TinyPolicy, items: list[Sample], config: Grpo) -> torch.Tensor:
    """The papers' objectives, sequence by sequence, at the old and sampling logprobs of `step_gradient`."""
    tokens = sum(sample.loss_tokens for sample in items)
    total = torch.zeros(())
    for sample in items:
        ids, mask = torch.tensor(sample.token_ids), torch.tensor(sample.loss_mask[1:]).bool()
        logits = (policy.embedding[ids] + 0.01 * torch.arange(len(ids))[:, None]) @ policy.head_weight.T
        everything = logits.log_softmax(-1)[:-1]
        entropy = -(everything.exp() * everything).sum(-1)[mask]
        logp = everything.gather(1, ids[1:, None]).squeeze(1)[mask]
        old = logp.detach() + 0.1 * torch.sin(ids[1:][mask].float())
        sampler = torch.tensor(sample.logprobs)[1:][mask]
        ratio = (logp - old).exp()
        if config.ratio == "sequence":
            ratio = (logp - old).mean().exp().expand(len(logp))
            if config.importance_correction.startswith("token"):
                # Under a weight for each token the two differ, and eq. 13 is what GSPO-token says.
                ratio = ratio.detach() * (logp - logp.detach()).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        objective = torch.minimum(ratio * sample.advantage, clipped * sample.advantage)
        if config.clip_dual and sample.advantage < 0:
            objective = objective.clamp(min=config.clip_dual * sample.advantage)
        if config.ratio == "cispo":
            objective = clipped.detach() * sample.advantage * logp
        distance = old - 0.05 - logp
        mismatch = old - sampler
        unit, beyond = config.importance_correction.split("_")
        if unit == "sequence":
            mismatch = mismatch.mean() if config.ratio == "sequence" else mismatch.sum()
        importance = mismatch.exp()
        importance = torch.where(importance > config.tis_cap, config.tis_cap * (beyond == "truncate"), importance)
        loss = -importance * objective - config.entropy_weight * entropy
        k3 = distance.exp() - distance - 1
        estimates = {"k1": -distance, "k2": distance**2 / 2, "k3": k3, "unbiased": (logp - old).exp() * k3}
        loss = loss + config.kl_weight * estimates[config.kl_estimator]
        divisor = {"token": tokens, "sequence": len(items) * len(logp), "constant": len(items) * config.max_new_tokens}
        total = total + loss.sum() / divisor[config.normaliser]
    return total


@pytest.mark.parametrize("name", sorted(LOSS_PRESETS))
def test_every_loss_has_its_papers_gradient(name: str) -> None:
    """With clips and caps that hold for some of the ratios and weights."""
    clip = 0.02 if name == "gspo" else 0.05
    preset = LOSS_PRESETS[name] | {"clip_low": clip, "clip_high": clip}
    config = msgspec.structs.replace(Grpo(), kl_weight=1e-3, tis_cap=0.5, **preset)
    assert_textbook_gradient(config, samples())


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_a_dual_clip_bounds_what_a_negative_advantage_weighs(name: str) -> None:
    preset = LOSS_PRESETS[name] | {"clip_low": 0.05, "clip_high": 0.05}
    config = msgspec.structs.replace(Grpo(), tis_cap=0.5, clip_dual=1.002, **preset)
    bounded = assert_textbook_gradient(config, samples())
    assert not torch.equal(bounded, assert_textbook_gradient(msgspec.structs.replace(config, clip_dual=0.0), samples()))


def assert_textbook_gradient(config: Grpo, items: list[Sample]) -> torch.Tensor:
    policy = TinyPolicy()
    found = step_gradient(policy, items, config, 64)
    textbook_loss(policy, items, config).backward()
    expected = policy.gradient()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    return found


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("name", sorted(LOSS_PRESETS))
def test_every_importance_correction_has_its_textbook_gradient(name: str, correction: str) -> None:
    """With sampler's logprobs near the old ones, so that some tokens and some sequences are above the cap."""
    preset = LOSS_PRESETS[name] | {"clip_low": 0.5, "clip_high": 0.5}
    preset |= {"importance_correction": correction, "tis_cap": 1.01}
    config = msgspec.structs.replace(Grpo(), **preset)
    items, policy = samples(), TinyPolicy()
    for number, batch in enumerate(pack([item], [1.0], 100, "cpu")[0] for item in items):
        near = token_logprobs(policy, batch, 1.0).numpy() + 0.02 * np.sin(np.arange(len(batch.targets_N)) + number)
        items[number].logprobs[2:] = near
    found = assert_textbook_gradient(config, items)
    unbounded = msgspec.structs.replace(config, tis_cap=1e9)
    assert not torch.equal(found, step_gradient(policy, items, unbounded, 64)), "the cap holds for some"


@pytest.mark.parametrize("name", sorted(LOSS_PRESETS))
def test_the_entropy_bonus_has_its_textbook_gradient(name: str) -> None:
    config = msgspec.structs.replace(Grpo(), entropy_weight=0.05, **LOSS_PRESETS[name])
    assert_textbook_gradient(config, samples())


@pytest.mark.parametrize("estimator", get_args(KlEstimator))
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_every_kl_estimator_has_its_textbook_gradient(name: str, estimator: str) -> None:
    config = msgspec.structs.replace(Grpo(), kl_weight=0.5, kl_estimator=estimator, **LOSS_PRESETS[name])
    assert_textbook_gradient(config, samples())


@pytest.mark.parametrize(("estimator", "off_policy"), [("k2", False), ("unbiased", False), ("unbiased", True)])
def test_the_mean_gradient_over_all_tokens_is_the_reverse_kls(estimator: KlEstimator, off_policy: bool) -> None:
    """Over the tokens that the old policy draws; k1's is none at all, and k3's that of KL(reference, policy)."""

    def mean_gradient(name: KlEstimator, old: torch.Tensor) -> torch.Tensor:
        logprobs = logits.log_softmax(0)
        estimate = kl_estimate(logprobs, reference, old, name)
        return torch.autograd.grad((old.exp() * estimate).sum(), logits)[0]

    draws = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits, reference = draws[0].clone().requires_grad_(), draws[1].log_softmax(0)
    policy = logits.log_softmax(0)
    own, old = policy.detach(), (draws[0] + draws[2]).log_softmax(0)
    reverse, forward = (policy.exp() * (policy - reference)).sum(), (reference.exp() * (reference - policy)).sum()
    reverse_gradient, forward_gradient = (
        torch.autograd.grad(kl, logits, retain_graph=True)[0] for kl in (reverse, forward)
    )
    torch.testing.assert_close(mean_gradient(estimator, old if off_policy else own), reverse_gradient)
    torch.testing.assert_close(mean_gradient("k3", own), forward_gradient)
    torch.testing.assert_close(mean_gradient("k1", own), torch.zeros_like(own))


def test_a_kl_in_the_reward_has_as_mean_gradient_that_of_whole_answers() -> None:
    """Over all answers of two tokens of three words, the second drawn by the first; k2 leaves the second's KL out."""
    draws = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    logits = draws[0].clone().requires_grad_()
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)

    def by_answer(table: torch.Tensor) -> torch.Tensor:
        table = table.log_softmax(-1)
        return torch.stack([table[0, first], table[1 + first, second]], 1)

    ours, reference = by_answer(logits), by_answer(draws[1])
    whole = (ours.sum(1).exp() * (ours - reference).sum(1)).sum()
    (expected,) = torch.autograd.grad(whole, logits, retain_graph=True)
    old, zeros = ours.detach().flatten(), torch.zeros(18)
    batch = Mock(old_logprobs_N=old, ref_logprobs_N=reference.flatten(), advantages_N=zeros)
    batch.sequence_N = torch.arange(9).repeat_interleave(2)
    probability = ours.detach().sum(1).exp().repeat_interleave(2)
    for advantages, same in ((less_kl(batch, 1.0), True), (reference.flatten() - old, False)):
        loss = -(probability * advantages * ours.flatten()).sum()
        (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.allclose(found, expected, atol=1e-6) == same


def test_a_sequence_weight_without_old_logprobs_is_that_of_the_present_policy() -> None:
    """On-policy and all masked, nothing but the sequences at or below the cap is left."""
    config = msgspec.structs.replace(Grpo(), importance_correction="sequence_mask", tis_cap=1.0)
    policy, items = TinyPolicy(), samples(4)
    gradients = []
    for far in (0.5, -0.5):
        for number, batch in enumerate(pack([item], [1.0], 100, "cpu")[0] for item in items):
            items[number].logprobs[2:] = token_logprobs(policy, batch, 1.0).numpy() + far
        for batch in pack(items, [1.0] * 4, 100, "cpu"):
            policy_loss(policy, batch, config).loss.backward()
        gradients.append(policy.gradient())
    assert gradients[0].norm() > 0
    assert gradients[1].norm() == 0


def test_normalisers_weigh_tokens_as_their_papers_do() -> None:
    counts: dict[str, Any] = {"constant": 10, "totals": (8, 2)}
    assert sequence_weights([2, 6], "token", **counts) == [1 / 8, 1 / 8]
    assert sequence_weights([2, 6], "sequence", **counts) == [1 / 4, 1 / 12]
    assert sequence_weights([2, 6], "constant", **counts) == [1 / 20, 1 / 20]


def test_sft_is_the_token_mean_of_the_negative_log_likelihood() -> None:
    policy, items = TinyPolicy(), samples(3)
    counts = [sample.loss_tokens for sample in items]
    weights = sequence_weights(counts, "token", constant=1, totals=(sum(counts), 3))
    loss = sum(sft_loss(policy, batch) for batch in pack(items, weights, 16, "cpu"))
    terms = []
    for sample in items:
        ids = torch.tensor(sample.token_ids)
        logits = (policy.embedding[ids] + 0.01 * torch.arange(len(ids))[:, None]) @ policy.head_weight.T
        logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
        terms.append(logprobs[1:])
    torch.testing.assert_close(loss, -torch.cat(terms).mean(), rtol=1e-5, atol=1e-6)


def rollout(total: float | None) -> Rollout:
    result = UNENDED if total is None else Result(reward=Reward(total=total))
    return Rollout([1, 2, 3], [0, 1, 1], [0.0, -1.0, -1.0], ["x"], result=result)


def uneven() -> list[Group]:
    """A group without variance, and one of which a rollout failed."""
    even = Group(None, "", [rollout(0.5), rollout(0.5), rollout(0.5)])
    return [even, Group(None, "", [rollout(0.0), rollout(None), rollout(1.0)])]


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_a_mean_over_tokens_leaves_groups_without_variance_out(name: str, kl_weight: float) -> None:
    chosen = to_samples(uneven(), resolve({"grpo.loss": name, "grpo.kl_weight": kl_weight}).grpo)
    assert sorted(sample.advantage for sample in chosen) == pytest.approx([-0.7071, 0.7071], abs=1e-3)


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo"])
def test_other_normalisers_count_every_sequence_whatever_the_kl_weight(name: str, kl_weight: float) -> None:
    """GRPO's mean over answers and Dr. GRPO's constant do not depend on how many groups have a variance."""
    config = resolve({"grpo.loss": name, "grpo.kl_weight": kl_weight, "grpo.max_new_tokens": 10}).grpo
    chosen = to_samples(uneven(), config)
    assert [sample.advantage for sample in chosen[:3]] == [0.0, 0.0, 0.0]
    assert [sample.loss_tokens for sample in chosen] == ([2] if kl_weight else [0]) * 3 + [2, 2]
    batches = rank_batches(chosen, config.normaliser, config.max_new_tokens, 100, "cpu")
    weights = torch.cat([batch.weights_N for batch in batches])
    assert len(weights) == (10 if kl_weight else 4)
    expected = 1 / (5 * 10) if name == "dr_grpo" else 1 / (5 * 2)
    torch.testing.assert_close(weights, torch.full_like(weights, expected))


def test_a_step_of_groups_without_variance_has_nothing_to_compute() -> None:
    config = resolve({"grpo.loss": "dr_grpo"}).grpo
    chosen = to_samples(uneven()[:1], config)
    assert rank_batches(chosen, config.normaliser, 10, 100, "cpu") == []


def test_a_rollout_at_its_groups_mean_counts_in_the_normalisers() -> None:
    """DAPO's 1 / sum of |o_i| and GRPO's 1 / G run over all members of a group, also those that move nothing."""
    chosen = to_samples([Group(None, "", [rollout(0.0), rollout(0.5), rollout(1.0)])], Grpo())
    assert [sample.advantage for sample in chosen] == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "scale", "divisor"),
    [("dapo", "advantage", "group"), ("dr_grpo", "advantage", "none"), ("dr_grpo", "group", "group")]
    + [(name, scale, scale) for name in ("dapo", "dr_grpo") for scale in ("batch", "none")],
)
def test_reward_scale_replaces_what_the_preset_divides_by(name: str, scale: str, divisor: str) -> None:
    """Two groups, of which one varies three times as much; a failed rollout counts nowhere."""
    groups = [
        Group(None, "", [rollout(0.0), rollout(1.0)]),
        Group(None, "", [rollout(0.0), rollout(None), rollout(3.0)]),
    ]
    chosen = to_samples(groups, resolve({"grpo.loss": name, "grpo.reward_scale": scale}).grpo)
    centred = np.array([-0.5, 0.5, -1.5, 1.5])
    divisors = {
        "group": np.array([0.5, 0.5, 1.5, 1.5]) * 2**0.5,
        "batch": np.std([0.0, 1.0, 0.0, 3.0], ddof=1),
        "none": 1.0,
    }
    assert [sample.advantage for sample in chosen] == pytest.approx(centred / divisors[divisor], rel=1e-5)


def weighed(terms: dict[str, float] | None) -> Rollout:
    """A rollout with two functions' terms, weighted already: 1 and 0.5."""
    made = rollout(None)
    if terms is not None:
        weights = {"small": 1.0, "large": 0.5}
        made.result = Result(reward=Reward(total=sum(terms.values()), terms=terms, weights=weights))
    return made


def test_each_function_counts_by_its_weight_whatever_its_scale() -> None:
    """GDPO: the large one's thousand is no more than the small one's tenth; where it does not apply it has no part."""
    rows = [{"small": 0.0, "large": 1000.0}, {"small": 0.1, "large": 0.0}, {"small": 0.0}, {"small": 0.1}, None]
    groups = [Group(None, "", [weighed(row) for row in rows[:2]]), Group(None, "", [weighed(row) for row in rows[2:]])]
    chosen = to_samples(groups, resolve({"grpo.reward_scale": "terms"}).grpo)
    half = 0.5**0.5
    sums = np.array([-half + 0.5 * half, half - 0.5 * half, -half, half])
    assert [sample.advantage for sample in chosen] == pytest.approx(sums / np.std(sums, ddof=1), rel=1e-4)


def test_terms_that_are_told_alone_have_no_scale_of_their_own() -> None:
    with pytest.raises(UserError, match="terms are none of functions: set it to group"):
        to_samples([Group(None, "", [rollout(0.0), rollout(1.0)])], resolve({"grpo.reward_scale": "terms"}).grpo)


def test_leave_one_out_is_scaled_by_the_batch_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advantage, "gather_all", lambda mine, what: [mine, [2.0, 4.0]])
    keys = {"grpo.loss": "dr_grpo", "grpo.advantage": "rloo", "grpo.reward_scale": "batch"}
    chosen = to_samples([Group(None, "", [rollout(0.0), rollout(1.0)])], resolve(keys).grpo)
    expected = np.array([-1.0, 1.0]) / np.std([0.0, 1.0, 2.0, 4.0], ddof=1)
    assert [sample.advantage for sample in chosen] == pytest.approx(expected, rel=1e-5)
    assert to_samples([], resolve(keys).grpo) == [], "a rank without rollouts has its part in the collective"


def test_an_infrastructure_failure_does_not_move_its_groups_baseline() -> None:
    with_failure = to_samples([Group(None, "", [rollout(0.2), rollout(None), rollout(0.8)])], Grpo())
    without = to_samples([Group(None, "", [rollout(0.2), rollout(0.8)])], Grpo())
    assert [sample.advantage for sample in with_failure] == [sample.advantage for sample in without]


@pytest.mark.parametrize("name", ["dapo", "grpo", "dr_grpo"])
def test_a_filtered_rollout_leaves_the_loss_and_stays_in_its_groups_baseline(name: str) -> None:
    group = Group(None, "", [rollout(0.0), rollout(0.0), rollout(1.5)])
    group.rollouts[2].truncated = True
    config = resolve({"grpo.loss": name, "grpo.overlong_filter": True, "grpo.max_new_tokens": 10}).grpo
    chosen = to_samples([group], config)
    assert [sample.loss_tokens for sample in chosen] == [2, 2, 0]
    assert chosen[0].advantage == pytest.approx(-0.5 if name == "dr_grpo" else -0.5774, abs=1e-4)
    (batch,) = rank_batches(chosen, config.normaliser, 10, 100, "cpu")
    divisor = {"dapo": 4, "grpo": 3 * 2, "dr_grpo": 3 * 10}[name]
    torch.testing.assert_close(batch.weights_N, torch.full((4,), 1 / divisor))


def test_samples_count_no_token_without_a_prediction() -> None:
    assert Sample([5, 6], [1, 1], [0.0, 0.0]).loss_tokens == 1
    assert Sample([5, 6], [1, 0], [0.0, 0.0]).loss_tokens == 0
