"""gpt-oss's experts, whose biases have the gradients of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastgrpo.policy.fused_layers import GROUPED, fuse_experts
from tests.helpers.tiny_model import MIXTURES

CHOICES = 2


def experts_in(dtype: torch.dtype) -> Any:
    """A layer's experts, of the same numbers in each dtype."""
    kind, changes = MIXTURES["gpt_oss"]
    config = kind(**changes | {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2})
    torch.manual_seed(0)
    found: Any = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    for parameter in found.parameters():
        # Gate and up reach their bounds.
        parameter.data.add_(0.5 * torch.randn_like(parameter)).copy_(parameter.data.bfloat16())
    return found.to(dtype)


def gradients(experts: Any, x_TH: Tensor, choice_TK: Tensor, weight_TK: Tensor, grad_TH: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x, of the choices' weights and of the experts."""
    dtype = experts.gate_up_proj.dtype
    leaves = {"x": x_TH.to(dtype).requires_grad_(), "weights": weight_TK.to(dtype).requires_grad_()}
    output = experts(leaves["x"], choice_TK, leaves["weights"])
    leaves |= dict(experts.named_parameters())
    found = torch.autograd.grad(output, list(leaves.values()), grad_TH.to(dtype))
    return {"output": output, **dict(zip(leaves, found, strict=True))}


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_biases_have_the_sums_of_all_their_gradients(dtype: torch.dtype, bar: float) -> None:
    plain, ours = experts_in(torch.float32), experts_in(dtype)
    plain.config._experts_implementation = "eager"
    fuse_experts(ours)
    assert ours.config._experts_implementation == GROUPED
    x_TH, grad_TH = torch.randn(4096, 64).bfloat16(), (0.1 * torch.randn(4096, 64) + 0.05).bfloat16()
    # Not the last expert, which then has no row.
    choice_TK = torch.rand(4096, len(ours.down_proj) - 1).topk(CHOICES).indices
    given = x_TH, choice_TK, torch.rand(4096, CHOICES).bfloat16(), grad_TH
    found, wanted = gradients(ours, *given), gradients(plain, *given)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Of x in bf16 some of gate and up are rounded to the other side of their bounds.
        assert (found[name] - value).norm() < (bar / 3 if "bias" in name else bar) * value.norm(), name
