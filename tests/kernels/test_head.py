"""linear_logprob and linear_grpo_loss against the fp64 oracle: at most eager torch's error in that dtype + 1e-5."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.kernels import LossStatistics, reference, tuning
from fastgrpo.kernels.reference import LossOptions
from tests.helpers.random_heads import (
    INTERPRETED,
    assert_as_good_as_eager,
    dense_logprob,
    dense_loss,
    fused_logprob,
    fused_loss,
    random_head,
    random_tokens,
)

LOSSES = {
    "grpo": LossOptions("token", kl_weight=0.04),
    "dapo": LossOptions("token", clip_low=0.2, clip_high=0.28),
    "dr_grpo": LossOptions("token", tis_cap=2.0),
    "gspo": LossOptions("sequence", clip_low=3e-4, clip_high=4e-4),
    "gspo_wide": LossOptions("sequence", clip_low=0.3, clip_high=0.3, kl_weight=0.1),
    "cispo": LossOptions("cispo", clip_low=1.0, clip_high=0.3, tis_cap=1.1),
    "masked": LossOptions("token", tis_cap=1.1, tis_mask=True),
    "entropy": LossOptions("token", kl_weight=0.04, entropy_weight=0.3),
    "dual": LossOptions("token", clip_dual=1.1),
    "gspo_dual": LossOptions("sequence", clip_low=0.3, clip_high=0.3, clip_dual=1.05, kl_weight=0.1),
    "k1": LossOptions("token", kl_weight=0.1, kl_estimator="k1"),
    "k2": LossOptions("token", kl_weight=0.1, kl_estimator="k2"),
    "unbiased": LossOptions("token", kl_weight=0.1, kl_estimator="unbiased"),
    "gspo_unbiased": LossOptions("sequence", kl_weight=0.1, kl_estimator="unbiased"),
    "entropy_alone": LossOptions("cispo", clip_low=1.0, entropy_weight=2.0),
}
SHAPES = [(1, 64, 1003), (7, 96, 2100), (5, 64, 129), (9, 64, 16)]
ROWS = 7 if INTERPRETED else 23  # the interpreter takes about 10 ms a row
BIG_SHAPES = [(3, 64, 151_936), (5, 4096, 1003), (300, 128, 1003), (130, 1536, 500)]
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


def fused(head, tokens, options, **rest):
    output = fused_loss(head, tokens, options, **rest)
    grads = torch.autograd.grad(output.loss, head.leaves)
    return [output.loss.detach(), output.logprobs_N, output.entropy_N, *grads]


def check_loss(head, tokens, options, **rest) -> None:
    kept_N = tokens.token_weights_N != 0
    if options.kl_weight == options.entropy_weight == 0:
        kept_N &= tokens.advantages_N != 0
    exact, eager = dense_loss(head, tokens, options, torch.float64), dense_loss(head, tokens, options)
    assert_as_good_as_eager(fused(head, tokens, options, **rest), eager, exact, keep=kept_N)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss, dtype, device):
    head = random_head(ROWS, 64, 1003, device=device, dtype=dtype)
    check_loss(head, random_tokens(head), LOSSES[loss], chunk=5)


@pytest.mark.parametrize("normaliser", ["token_mean", "sequence_mean", "constant"])
def test_every_normaliser_with_masked_tokens(normaliser, device):
    head = random_head(ROWS, 64, 300, device=device)
    check_loss(head, random_tokens(head, normaliser=normaliser, masked=0.4), LOSSES["grpo"], chunk=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape, dtype, device):
    head = random_head(*shape, device=device, dtype=dtype)
    check_loss(head, random_tokens(head), LOSSES["grpo"])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter walks a vocabulary of 150 k too slowly")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BIG_SHAPES)
def test_big_shapes(shape, dtype, device):
    head = random_head(*shape, device=device, dtype=dtype)
    check_loss(head, random_tokens(head), LOSSES["grpo"], chunk=128)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuBLAS wants a workspace of its own to be deterministic")
def test_memory_that_nobody_wrote_is_not_read(device):
    """torch then fills it with NaN. A bf16 product over an odd vocabulary reads the padding of its rows."""
    head = random_head(44, 128, 1003, device=device, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        output = fused_loss(head, random_tokens(head), LOSSES["grpo"])
        gradients = torch.autograd.grad(output.loss, head.leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rest",
    [{"temperature": 0.7}, {"softcap": 3.0}, {"bias": True}, {"bias": True, "softcap": 5.0, "temperature": 1.3}],
    ids=str,
)
def test_logit_transforms(rest, dtype, device):
    head = random_head(11, 64, 200, device=device, dtype=dtype, **rest)
    check_loss(head, random_tokens(head), LOSSES["grpo"], chunk=4)
    grads = (torch.randn(2, 11, device=device) / 11).unbind()
    exact, eager = dense_logprob(head, grads, torch.float64), dense_logprob(head, grads)
    outputs = fused_logprob(head, chunk=4)
    assert_as_good_as_eager([*outputs, *torch.autograd.grad(outputs, head.leaves, grads)], eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype, device):
    head = random_head(12, 64, 500, device=device, dtype=dtype, scale=25.0)
    with torch.no_grad():
        largest = (head.hidden_NH @ head.weight_VH.T).abs().max().item()
        head.hidden_NH *= 80.0 / largest
    check_loss(head, random_tokens(head), LOSSES["grpo"], chunk=5)
    far = random_tokens(head, spread=100.0)
    output = fused_loss(head, far, LOSSES["dr_grpo"])
    assert output.loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.loss, head.leaves))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [None, 6] if INTERPRETED else [None, 1, 6, 13])
def test_logprob_and_entropy_gradients(chunk, dtype, device):
    head = random_head(13, 64, 333, device=device, dtype=dtype)
    grads = (torch.randn(13, device=device) / 13, torch.randn(13, device=device) / 13)
    exact, eager = dense_logprob(head, grads, torch.float64), dense_logprob(head, grads)
    outputs = fused_logprob(head, chunk=chunk)
    found = torch.autograd.grad(outputs, head.leaves, grads)
    assert_as_good_as_eager([*(x.detach() for x in outputs), *found], eager, exact)


@pytest.mark.parametrize("rest", [{}, {"bias": True, "softcap": 4.0, "temperature": 0.7}], ids=str)
def test_logprobs_do_not_depend_on_the_parts_of_rows_and_vocabulary(rest, device, monkeypatch):
    head = random_head(11, 64, 1003, device=device, scale=8.0, **rest)
    nothing = (torch.zeros(11, device=device), torch.zeros(11, device=device))
    exact, eager = dense_logprob(head, nothing, torch.float64)[:2], dense_logprob(head, nothing)[:2]
    monkeypatch.setitem(tuning.FORWARD_ROWS, device.type, 4)
    with torch.no_grad():
        assert_as_good_as_eager(list(fused_logprob(head, chunk=1)), eager, exact)


def test_on_policy_is_the_gradient_of_advantage_times_logprob(device):
    head = random_head(9, 64, 100, device=device)
    tokens = random_tokens(head)._replace(old_logprobs_N=None)
    logprobs_N, _ = reference.linear_logprob(head.hidden_NH, head.weight_VH, head.targets_N)
    plain = -(tokens.token_weights_N * tokens.advantages_N * logprobs_N).sum()
    expected = torch.autograd.grad(plain, head.leaves)
    for ratio in ("token", "cispo"):
        output = fused_loss(head, tokens, LossOptions(ratio))
        for mine, theirs in zip(torch.autograd.grad(output.loss, head.leaves), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_on_policy_the_gradient_of_the_unbiased_kl_is_k2s(device):
    head = random_head(9, 64, 100, device=device)
    tokens = random_tokens(head)._replace(old_logprobs_N=None)
    check_loss(head, tokens, LossOptions(kl_weight=0.1, kl_estimator="unbiased"))
    found = [fused_loss(head, tokens, LossOptions(kl_weight=0.1, kl_estimator=name)) for name in ("unbiased", "k2")]
    for mine, theirs in zip(*(torch.autograd.grad(each.loss, head.leaves) for each in found), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rest", [{}, {"bias": True, "softcap": 5.0, "temperature": 1.3}], ids=str)
def test_the_entropy_bonus_with_every_logit_transform(rest, device):
    head = random_head(11, 64, 200, device=device, **rest)
    check_loss(head, random_tokens(head), LOSSES["entropy"], chunk=4)


def test_a_token_without_advantage_still_earns_its_entropy_bonus(device):
    head = random_head(9, 64, 100, device=device)
    tokens = random_tokens(head)._replace(advantages_N=torch.zeros(9, device=device))
    output = fused_loss(head, tokens, LossOptions(entropy_weight=0.5))
    _, entropy_N = fused_logprob(head)
    torch.testing.assert_close(output.loss, -0.5 * (tokens.token_weights_N * entropy_N).sum())
    found = torch.autograd.grad(output.loss, head.leaves)
    expected = torch.autograd.grad(-0.5 * (tokens.token_weights_N * entropy_N).sum(), head.leaves)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_a_masked_importance_weight_takes_the_policy_term_and_leaves_the_kl(device):
    head = random_head(9, 64, 100, device=device)
    tokens = random_tokens(head)
    tokens = tokens._replace(sampled_logprobs_N=tokens.old_logprobs_N - 3.0)
    masked = LossOptions(kl_weight=0.1, tis_cap=2.0, tis_mask=True)
    kl_alone = tokens._replace(advantages_N=torch.zeros(9, device=device))
    output = fused_loss(head, tokens, masked)
    assert output.statistics.importance_capped == 9
    torch.testing.assert_close(output.loss, fused_loss(head, kl_alone, masked).loss)


def test_sequence_ratio_on_policy_is_one(device):
    head = random_head(9, 64, 100, device=device)
    tokens = random_tokens(head)._replace(old_logprobs_N=None, sequence_log_ratio_N=None)
    check_loss(head, tokens, LossOptions("sequence"))


def test_dropped_tokens_cost_nothing_and_get_nothing(device):
    head = random_head(20, 64, 100, device=device)
    tokens = random_tokens(head, spread=0.01)
    tokens.advantages_N[:15] = 0
    output = fused_loss(head, tokens, LOSSES["dapo"], chunk=2)
    hidden_grad_NH, _ = torch.autograd.grad(output.loss, head.leaves)
    assert output.statistics.tokens == 5
    assert output.logprobs_N[:15].isnan().all()
    assert output.logprobs_N[15:].isfinite().all()
    assert (hidden_grad_NH[:15] == 0).all()
    assert (hidden_grad_NH[15:] != 0).any(dim=1).all()
    check_loss(head, tokens, LOSSES["dapo"], chunk=2)


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_a_dropped_token_may_have_any_target(kl_weight, device):
    head = random_head(6, 64, 100, device=device)
    tokens, options = random_tokens(head), LossOptions(kl_weight=kl_weight)
    tokens.token_weights_N[:3] = 0
    loss = fused_loss(head, tokens, options).loss
    head.targets_N[:3] = -100
    assert fused_loss(head, tokens, options).loss == loss


def test_a_value_that_is_none_shows_in_the_loss(device):
    """Summed away it would look like a loss of nothing, beside gradients that are none."""
    head = random_head(6, 64, 100, device=device)
    tokens = random_tokens(head)
    tokens.advantages_N[1], tokens.token_weights_N[0] = torch.nan, 0
    output = fused_loss(head, tokens, LOSSES["dapo"])
    assert output.loss.isnan()
    assert output.statistics.entropy.isfinite()


@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_learn(n, device):
    head = random_head(4, 64, 50, device=device)
    tokens = random_tokens(head)
    tokens.advantages_N.zero_()
    head.hidden_NH = head.hidden_NH.detach()[:n].requires_grad_()
    head.targets_N = head.targets_N[:n]
    output = fused_loss(head, tokens.take(slice(n)), LOSSES["dapo"])
    grads = torch.autograd.grad(output.loss, head.leaves)
    assert output.loss == 0
    assert output.statistics.tokens == 0
    assert all((grad == 0).all() for grad in grads)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in head.leaves]


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_side_gets_no_gradient(frozen, device):
    head = random_head(6, 64, 50, device=device)
    tokens = random_tokens(head)
    expected = dense_loss(head, tokens, LOSSES["grpo"])[3:]
    head.leaves[frozen].requires_grad_(False)
    fused_loss(head, tokens, LOSSES["grpo"]).loss.backward()
    assert head.leaves[frozen].grad is None
    torch.testing.assert_close(head.leaves[1 - frozen].grad, expected[1 - frozen], atol=1e-6, rtol=1e-4)


def test_tied_head_adds_up(device):
    head = random_head(6, 64, 50, device=device)
    tokens, ids_N = random_tokens(head), torch.arange(6, device=device)

    def gradient(loss_of):
        tied_VH = head.weight_VH.detach().clone().requires_grad_()
        loss_of(tied_VH[ids_N] * 2, tied_VH).backward()
        return tied_VH.grad

    def ours(hidden_NH, weight_VH):
        head.hidden_NH, head.weight_VH = hidden_NH, weight_VH
        return fused_loss(head, tokens, LOSSES["grpo"]).loss

    def theirs(hidden_NH, weight_VH):
        return reference.linear_grpo_loss(hidden_NH, weight_VH, head.targets_N, tokens, LOSSES["grpo"])[0]

    torch.testing.assert_close(gradient(ours), gradient(theirs), atol=1e-6, rtol=1e-4)


def test_backward_scales_by_the_incoming_gradient_and_runs_once(device):
    head = random_head(6, 64, 50, device=device)
    tokens = random_tokens(head)
    expected = dense_loss(head, tokens, LOSSES["grpo"])[3:]
    loss = fused_loss(head, tokens, LOSSES["grpo"]).loss * 3.0
    loss.backward(retain_graph=True)
    for leaf, grad in zip(head.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * grad, atol=1e-6, rtol=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bitwise_deterministic(device):
    head = random_head(14, 64, 200, device=device, dtype=torch.bfloat16)
    tokens = random_tokens(head)
    first, second = (fused(head, tokens, LOSSES["grpo"], chunk=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def column(field_N: torch.Tensor) -> torch.Tensor:
    """The same values, one row apart in memory."""
    return torch.stack([field_N, torch.full_like(field_N, -1)], dim=1)[:, 0]


def test_fields_of_any_stride(device):
    head = random_head(9, 16, 37, device=device)
    tokens, grads = random_tokens(head), (torch.randn(9, device=device), torch.randn(9, device=device))
    apart = replace(head, targets_N=column(head.targets_N))
    for loss in ("grpo", "gspo"):
        for mine, theirs in zip(
            fused(apart, tokens._make(map(column, tokens)), LOSSES[loss]),
            fused(head, tokens, LOSSES[loss]),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)
    everyone_the_same = tokens._replace(token_weights_N=torch.tensor(0.1, device=device).expand(9))
    check_loss(head, everyone_the_same, LOSSES["dr_grpo"], chunk=4)
    for mine, theirs in zip(
        torch.autograd.grad(fused_logprob(apart), head.leaves, grads),
        torch.autograd.grad(fused_logprob(head), head.leaves, grads),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_micro_batches_add_up(device):
    head = random_head(14, 64, 200, device=device)
    tokens = random_tokens(head)
    whole = fused_loss(head, tokens, LOSSES["grpo"])
    parts = []
    for rows in (slice(0, 6), slice(6, 14)):
        part = random_head(14, 64, 200, device=device)
        part.hidden_NH, part.weight_VH = head.hidden_NH[rows], head.weight_VH
        part.targets_N = head.targets_N[rows]
        parts.append(fused_loss(part, tokens.take(rows), LOSSES["grpo"]))
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    merged = parts[0].statistics.merge(parts[1].statistics)
    torch.testing.assert_close(torch.stack(merged), torch.stack(whole.statistics))


@pytest.mark.parametrize("loss", LOSSES)
def test_statistics(loss, device):
    rows = 12 if INTERPRETED else 30
    head = random_head(rows, 64, 200, device=device)
    tokens = random_tokens(head, spread=1.0)
    report = reference.linear_grpo_loss(head.hidden_NH, head.weight_VH, head.targets_N, tokens, LOSSES[loss])
    fields, entropy_N = report[3], report[2]
    expected = LossStatistics(
        torch.tensor(float(rows), device=device),
        entropy_N.sum(),
        fields.kl_N.sum(),
        fields.clipped_low_N.sum(),
        fields.clipped_high_N.sum(),
        fields.importance_capped_N.sum(),
    )
    found = fused_loss(head, tokens, LOSSES[loss], chunk=7).statistics
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert expected.clipped_high > 0


@settings(max_examples=4 if INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5 if INTERPRETED else 12),
    v=st.integers(1, 70),
    chunk=st.integers(1, 13),
    seed=st.integers(0, 2**31),
    ratio=st.sampled_from(["token", "sequence", "cispo"]),
    kl_weight=st.sampled_from([0.0, 0.1]),
    tis_cap=st.sampled_from([None, 1.0, 2.0]),
    clip=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    temperature=st.floats(0.3, 3.0),
)
def test_any_head(n, v, chunk, seed, ratio, kl_weight, tis_cap, clip, temperature):
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
    head = random_head(n, 16, v, device=device, temperature=temperature)
    tokens = random_tokens(head, masked=0.2)
    check_loss(head, tokens, LossOptions(ratio, *clip, kl_weight, tis_cap), chunk=chunk)
