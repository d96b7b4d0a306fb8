"""Every loss that TRL has too, by TRL's own trainer on the same tokens: values and gradients. Needs trl."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.config import Grpo
from fastgrpo.config_keys import checked, resolve
from fastgrpo.rollouts.dataset import Example
from fastgrpo.rollouts.reward_functions import RewardFunctions
from fastgrpo.training.advantage import scaled_advantages, to_samples
from fastgrpo.training.loss import policy_loss
from fastgrpo.training.packing import pack, sequence_weights
from fastgrpo.types import Group, Rollout, Sample
from tests.helpers.tiny_model import save_tiny_model

LENGTHS, PROMPT, LIMIT, TEMPERATURE = [9, 5, 7, 1, 9, 3], 3, 9, 0.9
REWARDS = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.25])
# In TRL's names and in ours.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {"loss": "grpo"}),
    "its default": ({}, {"clip_high": 0.2}),
    "dapo": ({"epsilon_high": 0.28}, {"loss": "dapo"}),
    "bnpo": ({"loss_type": "bnpo"}, {"clip_high": 0.2}),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {"loss": "dr_grpo"}),
    "its dr_grpo": ({"loss_type": "dr_grpo"}, {"loss": "dr_grpo", "reward_scale": "group"}),
    "by batch": ({"scale_rewards": "batch"}, {"clip_high": 0.2, "reward_scale": "batch"}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"loss": "gspo"},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, {"loss": "cispo"}),
    "cispo that clips": ({"loss_type": "cispo", "epsilon_high": 1.1}, {"loss": "cispo", "clip_high": 0.1}),
    "its delta": ({"delta": 1.3}, {"clip_high": 0.2, "clip_dual": 1.3}),
    "kl": ({"beta": 0.1, "use_bias_correction_kl": False}, {"clip_high": 0.2, "kl_weight": 0.1}),
    "its kl": ({"beta": 0.1}, {"clip_high": 0.2, "kl_weight": 0.1, "kl_estimator": "unbiased"}),
    "sapo": ({"loss_type": "sapo"}, {"loss": "grpo", "loss_function": "examples.losses:sapo"}),
    "off-policy mask": (
        {"off_policy_mask_threshold": 0.05, "loss_type": "grpo"},
        {"loss": "grpo", "loss_function": "examples.losses:off_policy_masked"},
    ),
    "entropy": ({"entropy_coef": 0.1}, {"clip_high": 0.2, "entropy_weight": 0.1}),
}
for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
    theirs = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.05}
    CASES[mode] = theirs, {"clip_high": 0.2, "importance_correction": mode, "tis_cap": 1.05}


class Tokens:
    """Prompts, completions padded to the right, and three policies' logprobs of them."""

    def __init__(self, model: Any) -> None:
        draw = torch.Generator().manual_seed(0)
        self.ids_BT = torch.randint(1, model.config.vocab_size, (len(LENGTHS), PROMPT + LIMIT), generator=draw)
        self.mask_BT = (torch.arange(LIMIT) < torch.tensor(LENGTHS)[:, None]).long()
        self.attention_BT = torch.cat([torch.ones(len(LENGTHS), PROMPT, dtype=torch.long), self.mask_BT], 1)
        with torch.no_grad():
            logits = model(input_ids=self.ids_BT, attention_mask=self.attention_BT).logits[:, PROMPT - 1 : -1]
        present_BT = (logits / TEMPERATURE).log_softmax(-1).gather(2, self.ids_BT[:, PROMPT:, None])[..., 0]
        noise = [torch.randn(present_BT.shape, generator=draw) for _ in range(3)]
        self.old_BT, self.ref_BT = present_BT + 0.3 * noise[0], present_BT + 0.4 * noise[1]
        self.sampled_BT = self.old_BT + 0.2 * noise[2]


class Head:
    """The model as `policy_loss` wants a policy, with one packed batch of all rows."""

    def __init__(self, model: Any, tokens: Tokens) -> None:
        self._model, self._tokens, self.device = model, tokens, torch.device("cpu")

    def head(self, temperature: float) -> dict[str, Any]:
        return {"weight_VH": self._model.lm_head.weight, "temperature": temperature}

    def gathered(self, compute: Any) -> Any:
        return compute()

    def hidden(self, batch: Any) -> Tensor:
        tokens = self._tokens
        hidden = self._model.model(tokens.ids_BT, attention_mask=tokens.attention_BT).last_hidden_state
        return torch.cat([hidden[row, : PROMPT + LENGTHS[row]] for row in batch.sequence_N.unique_consecutive()])


def gradient(model: Any, loss: Tensor) -> tuple[float, Tensor]:
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), torch.cat([each.grad.flatten() for each in model.parameters()])


def of_trl(trainer: Any, tokens: Tokens, advantages_B: Tensor) -> tuple[float, Tensor]:
    difference_BT = (tokens.old_BT - tokens.sampled_BT) * tokens.mask_BT
    if trainer.args.vllm_importance_sampling_mode.startswith("sequence"):
        difference_BT = difference_BT.sum(-1, keepdim=True)
    weight_BT, cap = difference_BT.exp(), trainer.args.vllm_importance_sampling_clip_max
    masks = trainer.args.vllm_importance_sampling_mode.endswith("mask")
    weight_BT = weight_BT.masked_fill(weight_BT > cap, 0.0 if masks else cap)
    inputs = {
        "prompt_ids": tokens.ids_BT[:, :PROMPT],
        "prompt_mask": tokens.attention_BT[:, :PROMPT],
        "completion_ids": tokens.ids_BT[:, PROMPT:],
        "completion_mask": tokens.mask_BT,
        "advantages": advantages_B,
        "old_per_token_logps": tokens.old_BT,
        "ref_per_token_logps": tokens.ref_BT,
        "sampling_per_token_logps": tokens.sampled_BT,
        "importance_sampling_ratio": weight_BT,
        "num_items_in_batch": tokens.mask_BT.sum(),
    }
    return gradient(trainer.model, trainer.compute_loss(trainer.model, inputs))


def of_ours(model: Any, tokens: Tokens, advantages_B: Tensor, config: Grpo) -> tuple[float, Tensor]:
    samples = [
        Sample(
            tokens.ids_BT[row, : PROMPT + length].tolist(),
            [0] * PROMPT + [1] * length,
            [0.0] * PROMPT + tokens.sampled_BT[row, :length].tolist(),
            float(advantages_B[row]),
        )
        for row, length in enumerate(LENGTHS)
    ]
    weights = sequence_weights(LENGTHS, config.normaliser, constant=LIMIT, totals=(sum(LENGTHS), len(LENGTHS)))
    [batch] = pack(samples, weights, 10_000, "cpu")
    order = batch.sequence_N.unique_consecutive().tolist()

    def packed(values_BT: Tensor) -> Tensor:
        return torch.cat([values_BT[row, : LENGTHS[row]] for row in order])

    batch.old_logprobs_N = packed(tokens.old_BT)
    batch.ref_logprobs_N = packed(tokens.ref_BT) if config.kl_weight else None
    return gradient(model, policy_loss(Head(model, tokens), batch, config).loss)


# By a completion in a row and by a function: None where one does not apply; of one completion none does.
VALUES: list[list[float | None]] = [
    [1.0, 20.0, None], [0.0, 50.0, 0.5], [0.5, 20.0, 0.25],
    [1.0, None, 1.0], [None, None, None], [0.0, 10.0, -3.0],
]  # fmt: skip
WEIGHTS = [1.0, 0.1, -2.0]


@pytest.mark.parametrize(
    ("theirs", "scale"),
    [
        ({"multi_objective_aggregation": "normalize_then_sum"}, "terms"),
        ({"scale_rewards": "group"}, "group"),
        ({"scale_rewards": "batch"}, "batch"),
        ({"scale_rewards": "none"}, "none"),
    ],
)
def test_advantages_of_several_rewards_are_trls(tmp_path: Path, theirs: dict[str, Any], scale: str) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    names = ["first", "second", "third"]
    columns = list(zip(*VALUES, strict=True))

    def reward(number: int) -> Any:
        def values(completions: list[Any], row: list[int], **_: Any) -> list[float | None]:
            return [columns[number][each + index] for index, each in enumerate(row)]

        values.__name__ = names[number]
        return values

    settings = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(VALUES), num_generations=3, report_to=[],
        max_completion_length=4, use_cpu=True, bf16=False, reward_weights=WEIGHTS, **theirs,
    )  # fmt: skip
    inputs = [{"prompt": "x", "row": 0}] * 6
    functions = [reward(number) for number in range(3)]
    trainer = trl.GRPOTrainer(
        str(save_tiny_model(tmp_path / "model")), reward_funcs=functions, args=settings,
        train_dataset=datasets.Dataset.from_list(inputs),
    )  # fmt: skip
    expected = trainer._generate_and_score_completions(inputs)["advantages"].tolist()
    ours = RewardFunctions(functions, WEIGHTS, deadline_s=60)
    groups = []
    for row in (0, 3):
        rollouts = [Rollout([7, 8], [0, 1], [0.0, -1.0], ["y"]) for _ in range(3)]
        example = Example(str(row), "x", {"row": row})
        for rollout, result in zip(rollouts, asyncio.run(ours.results(example, rollouts)), strict=True):
            rollout.result = result
        groups.append(Group(example, "x", rollouts))
    samples = to_samples(groups, resolve({"grpo.reward_scale": scale}).grpo)
    assert expected.pop(4) == 0, "no function applies"
    # It adds 1e-4 to a deviation, which is 1e-6 here.
    assert [sample.advantage for sample in samples] == pytest.approx(expected, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_trls(tmp_path: Path, name: str) -> None:
    """Where its keys mean the same: docs/own-task.md has where they do not."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    theirs, ours = CASES[name]
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(LENGTHS), num_generations=3, report_to=[],
        max_completion_length=LIMIT, temperature=TEMPERATURE, use_cpu=True, bf16=False,
        gradient_checkpointing=False, **theirs,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": "x"}] * len(LENGTHS))
    folder = save_tiny_model(tmp_path / "model")
    trainer = trl.GRPOTrainer(str(folder), reward_funcs=[len], args=settings, train_dataset=rows)
    trainer.use_vllm = "vllm_importance_sampling_mode" in theirs
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.eval()
    keys = {"max_new_tokens": LIMIT, "temperature": TEMPERATURE} | ({} if trainer.use_vllm else {"tis_cap": 0.0}) | ours
    config = resolve(checked({f"grpo.{key}": value for key, value in keys.items()}, source="test")).grpo
    advantages_B = scaled_advantages(REWARDS, torch.tensor([0, 0, 0, 1, 1, 1]), config)
    tokens = Tokens(trainer.model)
    their_loss, their_gradient = of_trl(trainer, tokens, advantages_B)
    our_loss, our_gradient = of_ours(trainer.model, tokens, advantages_B, config)
    assert our_loss == pytest.approx(their_loss, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-3, atol=1e-5 * float(their_gradient.abs().max()))
    assert float(their_gradient.abs().max()) > 0
