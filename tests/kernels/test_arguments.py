"""Every wrong argument is a ValueError that names it and what it got."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgrpo.kernels import linear_grpo_loss, linear_logprob


def arguments() -> dict[str, object]:
    ones_N = torch.ones(3)
    return {
        "hidden_NH": torch.randn(3, 4),
        "weight_VH": torch.randn(7, 4),
        "targets_N": torch.tensor([0, 6, 3]),
        "advantages_N": ones_N,
        "token_weights_N": ones_N,
    }


HEAD_ERRORS = [
    ({"hidden_NH": torch.randn(3)}, r"hidden_NH: expected 2 dimensions \[N, H\], got \(3,\)"),
    ({"hidden_NH": torch.randn(3, 4).half()}, "hidden_NH: expected float32 or bfloat16, got torch.float16"),
    ({"hidden_NH": torch.randn(3, 4, device="meta")}, "hidden_NH: expected a CPU or CUDA tensor, got meta"),
    ({"weight_VH": torch.randn(7, 5)}, r"weight_VH: expected H = 4, got \(7, 5\)"),
    ({"weight_VH": torch.randn(7, 4).bfloat16()}, "weight_VH: expected hidden_NH's dtype torch.float32"),
    ({"weight_VH": torch.randn(7, 4, device="meta")}, "weight_VH: expected hidden_NH's device cpu, got meta"),
    ({"weight_VH": nn.Linear(4, 7)}, "weight_VH: expected the head's weight tensor, got the module Linear"),
    ({"targets_N": torch.tensor([0, 7, 3])}, r"targets_N: expected token ids in \[0, 7\), got 7"),
    (
        {"targets_N": torch.tensor([0, 6, -100])},
        r"targets_N: expected token ids in \[0, 7\), got -100: leave out tokens that do not count",
    ),
    ({"targets_N": torch.tensor([0, 6])}, r"targets_N: expected shape \[3\], got \(2,\)"),
    ({"targets_N": torch.tensor([0, 6, 3], dtype=torch.int32)}, "targets_N: expected int64, got torch.int32"),
    ({"bias": torch.randn(6)}, r"bias: expected shape \[7\], got \(6,\)"),
    ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
    ({"softcap": -1.0}, "softcap: expected None or a positive number, got -1.0"),
    ({"chunk": 0}, "chunk: expected None or a positive number of rows, got 0"),
]
LOSS_ERRORS = [
    ({"advantages_N": torch.ones(2)}, r"advantages_N: expected shape \[3\], got \(2,\)"),
    ({"token_weights_N": torch.ones(3).double()}, "token_weights_N: expected float32, got torch.float64"),
    ({"old_logprobs_N": torch.ones(3, 1)}, r"old_logprobs_N: expected shape \[3\], got \(3, 1\)"),
    ({"ratio": "tokens"}, "ratio: expected 'token', 'sequence' or 'cispo', got 'tokens'"),
    ({"clip_low": 1.5}, r"clip_low: expected a number in \[0, 1\], got 1.5"),
    ({"clip_dual": 1.0}, r"clip_dual: expected None or a number above 1, got 1.0"),
    ({"clip_high": -0.1}, "clip_high: expected a number of at least 0, got -0.1"),
    ({"kl_weight": 0.1}, "ref_logprobs_N: expected a tensor as kl_weight > 0, got None"),
    ({"kl_weight": float("nan")}, "kl_weight: expected a number of at least 0, got nan"),
    ({"kl_estimator": "k4"}, "kl_estimator: expected 'k1', 'k2', 'k3' or 'unbiased', got 'k4'"),
    ({"entropy_weight": -1.0}, "entropy_weight: expected a number of at least 0, got -1.0"),
    ({"tis_cap": 2.0}, "sampled_logprobs_N: expected a tensor as tis_cap is set, got None"),
    ({"tis_cap": 0.0}, "tis_cap: expected None or a positive number, got 0.0"),
    ({"ratio": "sequence", "old_logprobs_N": torch.ones(3)}, "sequence_log_ratio_N: expected each token's"),
]


@pytest.mark.parametrize(
    ("change", "message"), HEAD_ERRORS + LOSS_ERRORS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_loss_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(**{**arguments(), **change})


@pytest.mark.parametrize(("change", "message"), HEAD_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_logprob_names_the_argument(change, message):
    found = {**arguments(), **change}
    del found["advantages_N"], found["token_weights_N"]
    with pytest.raises(ValueError, match=message):
        linear_logprob(**found)


def test_lora_on_the_head_is_refused():
    head = nn.Linear(4, 7)
    head.lora_A = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="weight_VH: got a head with LoRA adapters; adapt other layers"):
        linear_logprob(torch.randn(3, 4), head, torch.tensor([0, 1, 2]))
