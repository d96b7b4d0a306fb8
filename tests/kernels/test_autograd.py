"""The head as torch sees it: finite differences, registered operators, a compiled model around it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from fastgrpo.kernels import linear_grpo_loss, reference
from fastgrpo.kernels.reference import KlEstimator, LossOptions
from tests.helpers.random_heads import INTERPRETED, fused_logprob, fused_loss, random_head, random_tokens

OPTIONS = LossOptions("token", kl_weight=0.1, tis_cap=2.0, entropy_weight=0.2)
UNCLIPPED = OPTIONS._replace(clip_low=1.0, clip_high=100.0)  # a clip is a kink
compiled = pytest.mark.skipif(INTERPRETED, reason="traced functions do not see the interpreter")


def slope_by_differences(value_of, leaf, direction, step=3e-3):
    """Central difference of a scalar function along a direction."""
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            leaf += sign * step * direction
            values.append(value_of().double())
            leaf -= sign * step * direction
    return ((values[0] - values[1]) / (2 * step)).item()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("ratio", ["logprob", "token"])
def test_finite_differences(ratio, which, device):
    head = random_head(5, 16, 23, device=device, bias=True, softcap=8.0, temperature=0.8)
    tokens = random_tokens(head, spread=0.05)
    coefficients = torch.randn(2, 5).to(device)

    def value():
        if ratio == "logprob":
            return (torch.stack(fused_logprob(head, chunk=2)) * coefficients).sum()
        return fused_loss(head, tokens, UNCLIPPED, chunk=2).loss

    leaf = head.leaves[which]
    (grad,) = torch.autograd.grad(value(), leaf)
    for _ in range(3):
        direction = torch.randn(leaf.shape).to(device)
        expected = slope_by_differences(value, leaf, direction)
        assert (grad * direction).sum().item() == pytest.approx(expected, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("spread", [0.3, 30.0])
@pytest.mark.parametrize("dual", [None, 1.1, 3.0])
@pytest.mark.parametrize("kl", get_args(KlEstimator))
def test_closed_slope_is_autograds(ratio, spread, mask, dual, kl):
    logprobs_N, *near = (-20 * torch.rand(400, dtype=torch.float64) + spread * torch.randn(4, 400).double()).unbind()
    fields = (torch.randn(400), torch.rand(400), *near, 0.3 * torch.randn(400))
    tokens, options = reference.TokenInputs(*fields), LossOptions(ratio, 0.2, 0.28, 0.1, 2.0, mask, 0.0, dual, kl)
    logprobs_N.requires_grad_()
    (expected_N,) = torch.autograd.grad(reference.policy_loss(logprobs_N, tokens, options).loss_N.sum(), logprobs_N)
    torch.testing.assert_close(reference.policy_loss_slope(logprobs_N.detach(), tokens, options), expected_N)


@compiled
def test_operators_are_registered_rightly(device):
    head = random_head(6, 16, 40, device=device, bias=True)
    tokens = random_tokens(head)
    inputs = (head.hidden_NH, head.weight_VH, head.bias_V, head.targets_N)
    torch.library.opcheck(torch.ops.fastgrpo.linear_logprob.default, (*inputs, 0.9, 5.0, True, 4))
    arguments = (*inputs, *tokens, "token", 0.2, 0.2, 0.1, 2.0, False, 0.2, 3.0, "k3", 0.9, None, [True, True, True], 4)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastgrpo.linear_grpo_loss.default, arguments, test_utils=checks)
    saved = [x.detach() for x in torch.ops.fastgrpo.linear_logprob(*inputs, 0.9, None, True, None)]
    detached = [x.detach() for x in inputs]
    grads = (torch.randn_like(saved[0]), torch.randn_like(saved[0]))
    backward = (*grads, *detached, *saved, 0.9, None, [True, False, True], None)
    torch.library.opcheck(torch.ops.fastgrpo.linear_logprob_backward.default, backward)
    torch.library.opcheck(torch.ops.fastgrpo.scale_.default, (detached[0].clone(), torch.tensor(2.0, device=device)))


@compiled
def test_inside_a_compiled_model(device):
    head = random_head(8, 16, 40, device=device)
    tokens = random_tokens(head)
    layer = torch.nn.Linear(16, 16).to(device)

    def step():
        hidden_NH = torch.tanh(layer(head.hidden_NH))
        output = linear_grpo_loss(hidden_NH, head.weight_VH, head.targets_N, **tokens._asdict(), **OPTIONS._asdict())
        return 3 * output.loss, output.logprobs_N

    leaves = [head.hidden_NH, head.weight_VH, layer.weight]
    expected, logprobs_N = step()
    expected_grads = torch.autograd.grad(expected, leaves)
    loss, compiled_logprobs_N = torch.compile(step, backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(compiled_logprobs_N, logprobs_N)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs)
