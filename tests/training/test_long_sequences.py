"""A sequence far longer than a micro-batch trains whole, whatever of it is recomputed, and what cannot fit is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from fastgrpo.config import Grpo
from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.policy.loading import load_policy
from fastgrpo.training.memory import GIB, Workload, plan_memory
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.training.packing import rank_batches
from fastgrpo.training.update import update
from fastgrpo.training.workload import memory_plan
from fastgrpo.types import Sample
from tests.helpers.tiny_model import save_tiny_model

LONG, BUDGET = 4096, 512
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": LONG}
QWEN_1_5B = Qwen2Config(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
QWEN_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
ON_80_GB = Workload(micro_batch_tokens=16384, max_num_seqs=64, max_model_len=32768, layers="fused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("long"), **SHAPE)


def samples() -> list[Sample]:
    """One long answer beside short ones."""
    draw, made = torch.Generator().manual_seed(7), []
    for length, advantage in ((LONG, 1.0), (40, -0.5), (100, 0.5), (300, -1.0)):
        ids = torch.randint(1000, (length,), generator=draw).tolist()
        made.append(Sample(ids, [0] * 20 + [1] * (length - 20), [-6.9] * length, advantage))
    return made


def test_a_step_is_the_same_whatever_is_recomputed(folder: Path) -> None:
    batches = rank_batches(samples(), "token", 1, BUDGET, "cpu")
    assert sorted(len(batch.input_ids_T) for batch in batches) == [440, LONG]
    reports, weights = [], []
    for option in ({}, {"recompute_mlp": True}, {"gradient_checkpointing": True}):
        policy = load_policy(folder, **option)
        optimizer = AdamW(policy.model.parameters(), AdamWOptions(lr=1e-3, eps=1e-4))
        reports.append(update(policy, optimizer, samples(), Grpo(), budget=BUDGET))
        weights.append(dict(policy.model.named_parameters()))
    assert reports[0]["loss_tokens"] == LONG + 440 - 80
    for report, weight in zip(reports[1:], weights[1:], strict=True):
        assert report["grad_norm"] == pytest.approx(reports[0]["grad_norm"], rel=1e-5)
        torch.testing.assert_close(weight, weights[0], atol=1e-6, rtol=1e-5)


def test_its_logprobs_are_those_of_transformers(folder: Path) -> None:
    policy, plain = load_policy(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = samples()[0].token_ids.tolist()
    (ours,) = policy.logprobs([ids])
    with torch.no_grad():
        expected = plain(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])
    torch.testing.assert_close(ours, expected.squeeze(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (QWEN_1_5B, {"recompute_mlp": True}),
        (QWEN_1_5B, {"offload_optimizer": True}),
        (QWEN_1_5B, {"ranks": 2}),
        (QWEN_7B, {"recompute_mlp": True, "ranks": 8}),
        (QWEN_7B, {"gradient_checkpointing": True, "ranks": 4}),
        (QWEN_7B, {"gradient_checkpointing": True, "offload_optimizer": True}),
    ],
)
def test_32_k_tokens_fit_on_a_gpu_of_80_gb(model: Qwen2Config, options: dict[str, object]) -> None:
    """No sequence needs more than one GPU, so that there is no context parallelism."""
    plan_memory(model, replace(ON_80_GB, **options), 71 * GIB).check()


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        (QWEN_1_5B, {}, r"activations, 32768 tokens, 42\.01 GiB: set model\.recompute_mlp or lower engine"),
        (QWEN_7B, {"recompute_mlp": True, "ranks": 4}, r"set model\.gradient_checkpointing or lower engine"),
    ],
)
def test_what_does_not_fit_says_how_it_would(model: Qwen2Config, options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=rf"training needs .* GiB and 71\.0 GiB are free; .*{named}"):
        plan_memory(model, replace(ON_80_GB, **options), 71 * GIB).check()


def test_more_positions_than_the_model_knows_are_refused_at_the_start(folder: Path) -> None:
    model = load_policy(folder).model.config
    keys = {"model.path": str(folder), "engine.kv_cache_gib": 0.1}
    memory_plan(resolve(keys | {"engine.max_model_len": LONG}), model)
    with pytest.raises(UserError, match=r"engine\.max_model_len 8192 is more than the 4096 positions of the model"):
        memory_plan(resolve(keys | {"engine.max_model_len": 8192}), model)
