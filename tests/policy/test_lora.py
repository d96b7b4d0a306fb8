"""LoRA: what vLLM samples from, what is saved and what stays, on the real engine; a resume, without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.engine.engine import Engine
from fastgrpo.errors import UserError
from fastgrpo.policy import lora
from fastgrpo.policy.chat import Chat
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import BasePolicy, Policy
from fastgrpo.record.phases import PhaseTimer
from fastgrpo.rollouts.experience import Experience
from fastgrpo.training.learner import Learner, update
from fastgrpo.training.memory import MemoryPlan
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.types import Sample
from tests.engine.test_engine import PROMPTS, generate
from tests.helpers.marks import exact


def samples(seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(4):
        ids = torch.randint(1000, (20,), generator=generator).tolist()
        made.append(Sample(ids, [0] * 6 + [1] * 14, [-6.0] * 20, advantage=(-1.0) ** number))
    return made


def adapted(folder: Path) -> Policy:
    return load_policy(folder, lora_rank=4, lora_alpha=16.0)


@pytest.mark.engine
@exact
def test_vllm_samples_from_the_merged_weights(engine: Engine, tiny_folder: Path) -> None:
    policy, plain = adapted(tiny_folder), load_policy(tiny_folder)
    optimizer = AdamW(policy.model.parameters(), AdamWOptions(lr=1e-2))
    for step in range(2):
        before = policy.logprobs(PROMPTS)
        update(policy, optimizer, samples(step), Config().grpo, budget=64)
        assert not torch.allclose(torch.cat(before), torch.cat(policy.logprobs(PROMPTS)), atol=1e-2)
        report = engine.sync(policy)
        assert report.parity_max < 1e-4
        assert report.bytes_copied == sum(parameter.nbytes for parameter in plain.model.parameters())
        for completion in generate(engine):
            expected = policy.logprobs([PROMPTS[completion.key] + completion.token_ids])[0][-24:]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
    frozen = {name.replace(".base_layer", ""): value for name, value in policy.model.state_dict().items()}
    for name, value in plain.model.state_dict().items():
        assert torch.equal(frozen[name], value), name


def test_the_base_is_the_reference_and_the_adapters_train_on(tiny_folder: Path) -> None:
    policy, plain = adapted(tiny_folder), load_policy(tiny_folder)
    optimizer = AdamW(policy.model.parameters(), AdamWOptions(lr=1e-2))
    base = BasePolicy(policy.model, policy.tokenizer)
    grpo = resolve({"grpo.kl_weight": 0.1}).grpo
    kl = [update(policy, optimizer, samples(step), grpo, base, budget=64)["kl"] for step in range(2)]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[1] > 1e-3
    for ours, theirs in zip(base.logprobs(PROMPTS), plain.logprobs(PROMPTS), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_of_the_decoder_have_gradients(tiny_folder: Path, checkpointing: bool) -> None:
    policy = load_policy(tiny_folder, lora_rank=4, gradient_checkpointing=checkpointing)
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert trained == lora.adapter_state(policy.model).keys()
    assert len(trained) == 2 * 7 * policy.model.config.num_hidden_layers
    assert not any("head" in name or "embed" in name for name in trained)


def test_the_saved_model_is_plain_and_merged(tiny_folder: Path, tmp_path: Path) -> None:
    policy = adapted(tiny_folder)
    update(policy, AdamW(policy.model.parameters(), AdamWOptions(lr=1e-2)), samples(0), Config().grpo, budget=64)
    policy.save_hf(tmp_path)
    merged = load_policy(tmp_path)
    assert not any(lora.is_adapter(name) for name in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    for ours, theirs in zip(policy.logprobs(PROMPTS), merged.logprobs(PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def learner(folder: Path, runs: Path) -> Learner:
    config = resolve({"model.path": str(folder), "model.lora_rank": 4, "grpo.lr": 1e-2, "runs": str(runs)})
    engine: Any = SimpleNamespace(sleep=lambda: None)
    plan = MemoryPlan((), 0, 0.1, 64)
    policy = adapted(folder)
    return Learner(config, engine, policy, Chat(policy.tokenizer), None, plan)


def steps(learner: Learner, count: int) -> list[float]:
    norms = []
    for step in range(learner.step, learner.step + count):
        learner.experiences = [Experience(samples(step), {}, [])]
        norms.append(learner.update(PhaseTimer())["grad_norm"])
    return norms


def test_two_steps_resumed_for_two_more_are_four_steps(tiny_folder: Path, tmp_path: Path) -> None:
    whole, first, second = (learner(tiny_folder, tmp_path) for _ in range(3))
    norms = steps(whole, 4)
    steps(first, 2)
    first.save()
    latest = first.checkpoints.latest()
    assert latest is not None
    second.restore(latest)
    assert second.step == 2
    assert steps(second, 2) == norms[2:]
    for name, value in lora.adapter_state(whole.policy.model).items():
        assert torch.equal(lora.adapter_state(second.policy.model)[name], value), name


def test_without_peft_one_sentence_says_what_to_install(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"model.lora_rank needs peft.*fastgrpo\[lora\]"):
        adapted(tiny_folder)
