"""LoRA: what vLLM samples from, what is saved and what stays, on the real engine; a resume, without one."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    NemotronHConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.engine.engine import Engine
from fastgrpo.errors import UserError
from fastgrpo.policy import lora
from fastgrpo.policy.chat import Chat
from fastgrpo.policy.hub import with_local_model
from fastgrpo.policy.loading import load_configured, load_policy
from fastgrpo.policy.model import BasePolicy, Policy
from fastgrpo.record.phases import PhaseTimer
from fastgrpo.rollouts.experience import Experience
from fastgrpo.training.learner import Learner, update
from fastgrpo.training.memory import MemoryPlan
from fastgrpo.training.model_sizes import count_adapters
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.types import Sample
from tests.engine.test_engine import PROMPTS, generate
from tests.helpers.marks import exact
from tests.helpers.tiny_model import DELTA_RULE, FALCON_H1, GRANITE_H, MIXTURES, NEMOTRON_H, save_tiny_model

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def samples(seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(4):
        ids = torch.randint(1000, (20,), generator=generator).tolist()
        made.append(Sample(ids, [0] * 6 + [1] * 14, [-6.0] * 20, advantage=(-1.0) ** number))
    return made


def adapted(folder: Path) -> Policy:
    return load_policy(folder, lora_rank=4, lora_alpha=16.0)


def update_once(policy: Policy) -> None:
    optimizer = AdamW(policy.model.parameters(), AdamWOptions(lr=1e-2))
    update(policy, optimizer, samples(0), Config().grpo, budget=64)


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


@pytest.mark.engine
@exact
def test_a_mixture_has_adapters_in_its_attention_and_vllm_samples_from_all_of_it(tmp_path: Path) -> None:
    policy = adapted(save_tiny_model(tmp_path, kind=Qwen3MoeConfig, **MIXTURE))
    with closing(Engine(tmp_path, max_model_len=128, max_num_seqs=4, kv_cache_gib=0.05)) as engine:
        update_once(policy)
        with torch.no_grad():
            for experts in (layer.mlp.experts for layer in policy.model.base_model.layers):
                experts.down_proj.mul_(1.1)
                experts.gate_up_proj.mul_(0.9)
        assert engine.sync(policy).parity_max < 1e-4
        assert policy.copies_weights
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 4 * policy.model.config.num_hidden_layers
    assert all("self_attn" in name for name in trained)


@pytest.mark.engine
@exact
def test_vllm_samples_from_a_hybrids_merged_weights(tmp_path: Path) -> None:
    policy = adapted(save_tiny_model(tmp_path, kind=FalconH1Config, **FALCON_H1))
    with closing(Engine(tmp_path, max_model_len=128, max_num_seqs=4, kv_cache_gib=0.05)) as engine:
        before = policy.logprobs(PROMPTS)
        update_once(policy)
        assert not torch.allclose(torch.cat(before), torch.cat(policy.logprobs(PROMPTS)), atol=1e-2)
        assert engine.sync(policy).parity_max < 1e-4


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
    update_once(policy)
    policy.save_hf(tmp_path)
    merged = load_policy(tmp_path)
    assert not any(lora.is_adapter(name) for name in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    for ours, theirs in zip(policy.logprobs(PROMPTS), merged.logprobs(PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Qwen2Config, {}),
        (GPTNeoXConfig, {}),
        (Qwen3MoeConfig, MIXTURE | {"mlp_only_layers": [1]}),
        (Qwen2MoeConfig, MIXTURE | {"shared_expert_intermediate_size": 32}),
        (OlmoeConfig, MIXTURE | {"tie_word_embeddings": False}),
        (FalconH1Config, FALCON_H1),
        (GraniteMoeHybridConfig, GRANITE_H),
        (NemotronHConfig, NEMOTRON_H),
        (Qwen3_5TextConfig, DELTA_RULE),
        (
            Qwen3NextConfig,
            DELTA_RULE | MIXTURE | {"shared_expert_intermediate_size": 32, "tie_word_embeddings": False},
        ),
        *MIXTURES.values(),
    ],
)
def test_peft_loads_the_saved_adapter_over_the_base(
    kind: type[PretrainedConfig], changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the merged model's logits, whatever the model calls its decoder; so does `--model` on the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_tiny_model(tmp_path / "base", kind=kind, **changes)
    policy, ids = adapted(folder), torch.tensor([PROMPTS[0]])
    trained = [parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad]
    assert sum(trained) == count_adapters(policy.model.config, 4)
    assert len(trained) == 2 * len(lora.adapted_layers(load_policy(folder).model.base_model))
    update_once(policy)
    policy.save_hf(tmp_path / "saved")
    told = json.loads((tmp_path / "saved/adapter/adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["task_type"]) == (4, 16.0, "CAUSAL_LM")
    assert told["base_model_name_or_path"] == str(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = base(ids).logits
    found = PeftModel.from_pretrained(base, tmp_path / "saved/adapter")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits
    assert not torch.allclose(before, merged, atol=1e-2)
    torch.testing.assert_close(found, merged, atol=1e-5, rtol=0)
    again = load_policy(with_local_model(resolve({"model.path": str(tmp_path / "saved/adapter")})).model.path)
    torch.testing.assert_close(again.logprobs(PROMPTS), policy.logprobs(PROMPTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "last"), [(GraniteMoeHybridConfig, GRANITE_H, False), (Qwen3_5TextConfig, DELTA_RULE, True)]
)
def test_what_mamba_multiplies_by_itself_has_no_adapter(
    kind: type[PretrainedConfig], changes: dict[str, Any], last: bool, tmp_path: Path
) -> None:
    policy = adapted(save_tiny_model(tmp_path, kind=kind, **changes))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in lora.adapter_state(policy.model)}
    assert ("out_proj" in names) == last
    assert any(name.startswith("in_proj") for name in names)


@pytest.mark.parametrize(
    ("source", "folder", "named"), [("org/tiny", "a" * 40, True), ("/models/old", "old-1f", False)]
)
def test_a_saved_adapter_names_what_others_load_its_base_by(
    tiny_folder: Path, tmp_path: Path, source: str, folder: str, named: bool
) -> None:
    """The hub's name, and the folder where one was made on this machine, as of .bin files or another adapter."""
    path = shutil.copytree(tiny_folder, tmp_path / folder)
    keys = {"model.path": str(path), "model.source": source, "model.revision": "a" * 40, "model.lora_rank": 2}
    load_configured(path, resolve(keys)).save_hf(tmp_path / "saved")
    told = json.loads((tmp_path / "saved/adapter/adapter_config.json").read_text())
    expected = (source, "a" * 40) if named else (str(path), None)
    assert (told["base_model_name_or_path"], told["revision"]) == expected


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
    assert (latest / "adapter/adapter_model.safetensors").is_file()
    for name, value in lora.adapter_state(whole.policy.model).items():
        assert torch.equal(lora.adapter_state(second.policy.model)[name], value), name


def test_without_peft_one_sentence_says_what_to_install(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"model.lora_rank needs peft.*fastgrpo\[lora\]"):
        adapted(tiny_folder)
