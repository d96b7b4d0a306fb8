"""Experts that were chosen elsewhere: nothing changes by a layer's own, and others are weighed as the model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close
from transformers import Qwen3MoeConfig

from fastgrpo.config import Grpo
from fastgrpo.kernels import experts as kernels
from fastgrpo.policy import routing_replay
from fastgrpo.policy.fused_layers import restore_layers
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.training.loss import policy_loss
from fastgrpo.training.packing import pack
from fastgrpo.types import Batch, Sample
from tests.helpers.tiny_model import MIXTURES, save_tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QWEN3 = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
KINDS = MIXTURES | {
    "qwen3_moe": (Qwen3MoeConfig, QWEN3 | {"norm_topk_prob": True}),
    "qwen3_moe as it is": (Qwen3MoeConfig, QWEN3 | {"norm_topk_prob": False, "mlp_only_layers": [1]}),
}
if Version(transformers.__version__) < Version("5.18"):
    KINDS.pop("minimax_m2")  # refused
# Written down from the papers: the weights of chosen experts, from all logits.
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "qwen3_moe": lambda logit, chosen: shares(logit.softmax(-1).gather(1, chosen)),
    "qwen3_moe as it is": lambda logit, chosen: logit.softmax(-1).gather(1, chosen),
    "mixtral": lambda logit, chosen: shares(logit.softmax(-1).gather(1, chosen)),
    "granitemoe": lambda logit, chosen: logit.gather(1, chosen).softmax(-1),
    "gpt_oss": lambda logit, chosen: logit.gather(1, chosen).softmax(-1),
    "deepseek_v2 in groups": lambda logit, chosen: 1.5 * logit.softmax(-1).gather(1, chosen),
    "deepseek_v3": lambda logit, chosen: 1.5 * shares(logit.sigmoid().gather(1, chosen)),
    "glm4_moe": lambda logit, chosen: 1.5 * shares(logit.sigmoid().gather(1, chosen)),
    "minimax_m2": lambda logit, chosen: shares(logit.sigmoid().gather(1, chosen)),
    "ernie4_5_moe": lambda logit, chosen: shares(logit.softmax(-1).gather(1, chosen)),
}


def shares(weight_TK: Tensor) -> Tensor:
    return weight_TK / weight_TK.sum(-1, keepdim=True)


def mixtures(policy: Policy) -> list[Any]:
    return [module for module in policy.model.modules() if "replay" in vars(module)]


def batch(routes: Callable[[int], np.ndarray] | None = None) -> Batch:
    """Two completions of one prompt; `routes` of so many tokens for each."""
    draw = torch.Generator().manual_seed(5)
    prompt = torch.randint(1000, (20,), generator=draw).tolist()
    items = []
    for number, length in enumerate((30, 3)):
        ids = prompt + torch.randint(1000, (length,), generator=draw).tolist()
        told = routes(len(ids)) if routes else None
        items.append(Sample(ids, [0] * 20 + [1] * length, [0.0] * len(ids), 0.5 - number, told))
    return pack(items, [0.01] * 2, 1000, DEVICE)[0]


def measured(policy: Policy, given: Batch) -> list[Tensor]:
    """Logprobs and gradients of one loss."""
    policy.model.zero_grad()
    output = policy_loss(policy, given, Grpo(tis_cap=0.0))
    policy.backward(output.loss)
    gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
    return [output.logprobs_N.detach(), *(grad.clone() for grad in gradients)]


def same(one: Tensor, other: Tensor) -> None:
    """Bit for bit on a CPU; a GPU adds the gradients of a row that was copied in any order."""
    assert_close(one, other, **({"rtol": 1e-4, "atol": 1e-6} if one.is_cuda else {"rtol": 0, "atol": 0}))


def own_choices(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """[T, L, K] of `batch()`, as the policy chooses."""
    layers, choices = len(mixtures(policy)), policy.model.config.num_experts_per_tok
    seen: list[Tensor] = []
    choose = kernels.replayed

    def spy(own_TK: Tensor, replay: kernels.Replay) -> Tensor:
        seen.append(own_TK)
        return choose(own_TK, replay)

    with monkeypatch.context() as patch:
        for module in (kernels, routing_replay):
            patch.setattr(module, "replayed", spy)
        unknown = batch(lambda tokens: np.full((tokens, layers, choices), -1, np.int8))
        policy.hidden(unknown)
    assert unknown.replay is not None
    assert unknown.replay.counts_2.tolist() == [0, 0]
    return torch.stack(seen, 1)


@pytest.mark.parametrize("name", [name for name in KINDS if "3_5" not in name])
def test_a_layers_own_experts_change_no_bit_and_unknown_ones_neither(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes = KINDS[name]
    policy = load_policy(save_tiny_model(tmp_path, kind=kind, **changes), device=DEVICE)
    before, given = measured(policy, batch()), batch()
    own_TLK = own_choices(policy, monkeypatch)
    # The last token is one that nobody was told of.
    own_TLK[-1] = -1
    given.replay = routing_replay.RoutingReplay(own_TLK, torch.zeros(2, dtype=torch.int64, device=DEVICE))
    for one, other in zip(before, measured(policy, given), strict=True):
        same(one, other)
    assert given.replay.counts_2.tolist() == [(len(own_TLK) - 1) * own_TLK.shape[1], 0]
    # Nothing is left of it.
    same(before[0], measured(policy, batch())[0])


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name in KINDS])
def test_other_experts_are_weighed_by_the_models_own_scores(name: str, tmp_path: Path) -> None:
    kind, changes = KINDS[name]
    folder = save_tiny_model(tmp_path, kind=kind, **changes)
    policy, forced = load_policy(folder, device=DEVICE), load_policy(folder, device=DEVICE)
    restore_layers(forced.model.base_model)
    given = batch(random_routes(policy))
    assert given.replay is not None
    for number, block in enumerate(mixtures(forced)):
        gate = block.gate if hasattr(block, "gate") else block.router
        forward = forced_gate(given.replay.experts_TLK[:, number], WEIGHTS[name], first=name == "granitemoe")
        gate.forward = MethodType(forward, gate)
    plain = batch()
    for one, other in zip(measured(policy, given), measured(forced, plain), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)
    replayed, changed = given.replay.counts_2.tolist()
    assert replayed == int((given.replay.experts_TLK[..., 0] >= 0).sum())
    assert changed > replayed / 2


def random_routes(policy: Policy) -> Callable[[int], np.ndarray]:
    block = mixtures(policy)[0]
    experts, draw = len(next(block.experts.parameters())), np.random.default_rng(3)
    shape = len(mixtures(policy)), policy.model.config.num_experts_per_tok
    return lambda tokens: draw.random((tokens, shape[0], experts)).argsort(-1)[..., : shape[1]].astype(np.int16)


def forced_gate(
    chosen_TK: Tensor, weights: Callable[[Tensor, Tensor], Tensor], *, first: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A router's `forward`; `first`: it returns the ids first, and not last."""

    def forward(self: Any, hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        logit_TE = linear(hidden.reshape(-1, hidden.shape[-1]), self.weight, getattr(self, "bias", None)).float()
        chosen = chosen_TK.long()
        weight_TK = weights(logit_TE, chosen)
        return (chosen, weight_TK, logit_TE) if first else (logit_TE, weight_TK, chosen)

    return forward


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"recompute_mlp": True}])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_what_is_computed_anew_in_backward_has_the_same_experts(
    name: str, options: dict[str, bool], tmp_path: Path
) -> None:
    kind, changes = KINDS[name]
    folder = save_tiny_model(tmp_path, kind=kind, **changes)
    policy, anew = load_policy(folder, device=DEVICE), load_policy(folder, device=DEVICE, **options)
    given = batch(random_routes(policy))
    for one, other in zip(measured(policy, given), measured(anew, given), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_routes_of_other_layers_are_an_error(tmp_path: Path) -> None:
    policy = load_policy(save_tiny_model(tmp_path, kind=Qwen3MoeConfig, **QWEN3), device=DEVICE)
    wrong = batch(lambda tokens: np.zeros((tokens, 3, 3), np.int8))
    with pytest.raises(ValueError, match="routes of 3 layers for a model of 2 mixtures"):
        policy.hidden(wrong)
