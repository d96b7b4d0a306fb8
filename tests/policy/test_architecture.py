"""What a model does to scores and logits is trained as transformers' own forward computes it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeLiteConfig,
    GPTJConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

from fastgrpo.config import Grpo
from fastgrpo.errors import UserError
from fastgrpo.policy import architecture
from fastgrpo.policy.architecture import check_architecture, logit_transform
from fastgrpo.policy.experts import Mixture, mixture, router_biases
from fastgrpo.policy.folder import load_config
from fastgrpo.policy.loading import load_policy
from fastgrpo.training.loss import policy_loss, token_logprobs
from fastgrpo.training.packing import pack
from fastgrpo.types import Sample
from tests.helpers.tiny_model import DELTA_RULE, FALCON_H1, GRANITE_H, MIXTURES, NEMOTRON_H, save_tiny_model

# Small bounds, so that a few tokens of a random model feel them.
GEMMA = {"head_dim": 32, "sliding_window": 9, "final_logit_softcapping": 2.0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
QWEN3_MOE = {"num_experts": 6, "head_dim": 48, "num_hidden_layers": 3, "mlp_only_layers": [1]}
OLMOE = {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64}
RECURRENT: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "qwen3_5": (Qwen3_5TextConfig, DELTA_RULE),
    "qwen3_next": (Qwen3NextConfig, DELTA_RULE | EXPERTS | {"num_experts": 6, "tie_word_embeddings": False}),
    "granitemoehybrid": (GraniteMoeHybridConfig, GRANITE_H),
    "falcon_h1": (FalconH1Config, FALCON_H1 | {"lm_head_multiplier": 0.5}),
    "nemotron_h": (NemotronHConfig, NEMOTRON_H),
}
MODULES_OF_DELTA_RULE = {"qwen3_5": modeling_qwen3_5, "qwen3_next": modeling_qwen3_next}
KINDS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = (
    RECURRENT
    | MIXTURES
    | {
        "gemma2": (Gemma2Config, GEMMA | {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}),
        "gemma3": (Gemma3TextConfig, GEMMA | {"num_hidden_layers": 6, "sliding_window_pattern": 2}),
        "mistral": (MistralConfig, {"sliding_window": 9}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 48}),
        # Of three layers one is dense; an expert's weight is divided by the sum or not.
        "qwen3_moe": (Qwen3MoeConfig, EXPERTS | QWEN3_MOE | {"norm_topk_prob": True}),
        "qwen3_moe undivided": (Qwen3MoeConfig, EXPERTS | QWEN3_MOE | {"norm_topk_prob": False}),
        # Rows of 72 bytes, which grouped products do not take.
        "qwen3_moe of odd width": (Qwen3MoeConfig, EXPERTS | QWEN3_MOE | {"moe_intermediate_size": 18}),
        "qwen2_moe": (Qwen2MoeConfig, EXPERTS | {"num_experts": 6}),
        "olmoe": (OlmoeConfig, OLMOE | {"tie_word_embeddings": False}),
        "llama": (LlamaConfig, {"attention_bias": True}),
        "cohere": (CohereConfig, {"logit_scale": 0.25}),
        "granite": (GraniteConfig, {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
        # A bias in the head, and a dropout that vLLM has not.
        "phi": (PhiConfig, {"tie_word_embeddings": False, "num_key_value_heads": 4, "resid_pdrop": 0.3}),
    }
)
V2, V3, LITE, GPT_OSS = (MIXTURES[name][1] for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gpt_oss"))
PROMPT, ANSWERS = list(range(40, 53)), ([3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8])


def samples() -> list[Sample]:
    """Two answers to one prompt, which is computed once."""
    return [
        Sample(PROMPT + ids, [0] * len(PROMPT) + [1] * len(ids), [0.0] * (len(PROMPT) + len(ids)), advantage=sign)
        for ids, sign in zip(ANSWERS, (1.0, -0.5), strict=True)
    ]


@pytest.mark.parametrize("name", KINDS)
def test_logprobs_and_gradients_are_those_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes = KINDS[name]
    policy = load_policy(save_tiny_model(tmp_path, kind=kind, **changes))
    if name in MODULES_OF_DELTA_RULE:
        # Its function of chunks has gradients of the decay to 2e-4 only, that of one token after the other to 1e-6.
        module = MODULES_OF_DELTA_RULE[name]
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", module.torch_recurrent_gated_delta_rule)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **eager)
    (batch,) = pack(samples(), [1.0, 1.0], 100, "cpu")
    assert batch.runs.key_index_U is not None, "the prompt is shared"
    expected, loss = [], torch.zeros(())
    for answer, sample in zip(ANSWERS, samples(), strict=True):
        logits_TV = plain(torch.tensor([PROMPT + answer])).logits[0, len(PROMPT) - 1 : -1].float() / 0.8
        logprobs = logits_TV.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        expected.append(logprobs.detach())
        loss = loss - sample.advantage * logprobs.sum()
    found = token_logprobs(policy, batch, 0.8)
    by_sample = [found[batch.sequence_N == number] for number in range(2)]
    for ours, theirs in zip(by_sample, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    policy_loss(policy, batch, Grpo(tis_cap=0.0, temperature=0.8)).loss.backward()
    loss.backward()
    theirs = dict(plain.named_parameters())
    for parameter_name, parameter in policy.model.named_parameters():
        gradient = theirs[parameter_name].grad
        assert parameter.grad is not None
        assert gradient is not None
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, parameter_name


def test_sizes_of_a_mixture_are_found_by_whatever_name() -> None:
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
    sizes = {name: mixture(kind(**shape | changes)) for name, (kind, changes) in MIXTURES.items()}
    assert sizes["deepseek_v3"] == Mixture(experts=8, choices=3, columns=64, shared=128, dense=True)
    assert sizes["ernie4_5_moe"] == Mixture(experts=6, choices=2, columns=64, shared=128, dense=True)
    assert sizes["glm4_moe"] == Mixture(experts=8, choices=2, columns=64, shared=128, dense=True)
    assert sizes["gpt_oss"] == sizes["granitemoe"]
    assert (
        sizes["granitemoe"] == sizes["minimax_m2"] == Mixture(experts=6, choices=2, columns=64, shared=0, dense=False)
    )
    assert sizes["granitemoeshared"] == sizes["granitemoehybrid of experts"]
    assert sizes["granitemoeshared"] == Mixture(experts=6, choices=2, columns=64, shared=96, dense=False)
    assert sizes["qwen3_5_moe"] == Mixture(experts=6, choices=2, columns=64, shared=64, dense=False)
    assert mixture(GraniteMoeHybridConfig(**shape | GRANITE_H)) is None


def test_a_routers_bias_is_fp32_whatever_the_weights_are(tmp_path: Path) -> None:
    for name in ("deepseek_v3", "ernie4_5_moe", "glm4_moe", "minimax_m2"):
        kind, changes = MIXTURES[name]
        folder = save_tiny_model(tmp_path / name, kind=kind, **changes)
        rounded, whole = (
            dict(router_biases(load_policy(folder, dtype=d).model)) for d in (torch.bfloat16, torch.float32)
        )
        assert whole
        assert all(torch.equal(bias, whole[key]) and bool(bias.any()) for key, bias in rounded.items())


def test_the_cases_use_what_they_are_for() -> None:
    cases = ((name, *KINDS[name]) for name in ("gemma2", "gemma3", "cohere", "granite", "falcon_h1"))
    transforms = {name: logit_transform(kind(**changes)) for name, kind, changes in cases}
    assert transforms["gemma2"].softcap == transforms["gemma3"].softcap == 2.0
    assert transforms["cohere"].temperature == 4.0
    assert transforms["granite"].temperature == 3.0
    assert transforms["falcon_h1"].temperature == 2.0


def test_a_model_for_which_transformers_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes = MIXTURES["minimax_m2"]
    config = kind(**changes)
    check_architecture(tmp_path, config)
    # As 5.16 and 5.17 read it.
    del config.rope_parameters["partial_rotary_factor"]
    with pytest.raises(UserError, match=r"\(minimax_m2\) transformers .* rotates all columns .* not 16: install"):
        check_architecture(tmp_path, config)
    # These read it by themselves.
    check_architecture(tmp_path, GPTJConfig(n_layer=1, n_embd=64, n_head=4, rotary_dim=8))
    monkeypatch.setattr(architecture.transformers, "__version__", "5.16.1")
    with pytest.raises(UserError, match=r"\(falcon_h1\) transformers 5\.16\.1 does not .*: install 5\.17 or newer$"):
        check_architecture(tmp_path, FalconH1Config(**FALCON_H1))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (GptOssConfig, GPT_OSS | {"rms_norm_eps": 1e-6}, r"\(gpt_oss\) has rms_norm_eps 1e-06 in .* with 1e-05 alone"),
        (GptOssConfig, GPT_OSS | {"layer_types": ["full_attention"] * 2}, r"has layer_types \['full_attention', 'full"),
        (GptOssConfig, GPT_OSS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "with 'yarn' alone"),
        (GptOssConfig, GPT_OSS | {"tie_word_embeddings": True}, "has its embedding as its head"),
        (JambaConfig, {"num_experts": 2, "use_mamba_kernels": False}, "layers of the kind"),
        (OlmoeConfig, OLMOE | {"tie_word_embeddings": True}, r"\(olmoe\) has its embedding as its head, where vLLM"),
        (
            DeepseekV2Config,
            V2 | {"norm_topk_prob": True},
            r"\(deepseek_v2\) has norm_topk_prob True .* does with False",
        ),
        (DeepseekV2Config, V2 | {"n_group": 4}, "has n_group 4 in config.json, where vLLM computes what"),
        (DeepseekV3Config, V3 | {"topk_method": None}, "topk_method None .* with 'noaux_tc' alone"),
        (DeepseekV3Config, V3 | {"tie_word_embeddings": True}, "has its embedding as its head"),
        (Glm4MoeLiteConfig, LITE | {"first_k_dense_replace": 0}, "first_k_dense_replace 0 .* with 1 alone"),
        (
            DeepseekV3Config,
            V3 | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "has rope_type 'linear'",
        ),
        (
            NemotronHConfig,
            NEMOTRON_H | {"layers_block_type": ["mamba", "attention", "moe"], "moe_intermediate_size": 64},
            r"\(nemotron_h\) is a mixture of experts",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    kind: type[PretrainedConfig], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path, kind=kind, **changes)
    for load in (load_config, load_policy):
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match=r"is quantized \(awq\)"):
        load_config(tmp_path)


def test_a_head_that_does_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path, kind=CohereConfig, logit_scale=0.25)
    monkeypatch.setattr("fastgrpo.policy.model.logit_transform", lambda config: logit_transform(MistralConfig()))
    with pytest.raises(UserError, match="CohereForCausalLM does more to its logits"):
        load_policy(tmp_path)
