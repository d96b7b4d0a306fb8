"""A random Qwen2-architecture model with a byte-level tokenizer, in Hugging Face format, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from fastgrpo.policy.experts import router_biases, router_biases_as_buffers

# Changes that make hybrids of recurrent layers and attention: Qwen3.5's and Qwen3-Next's, Falcon-H1's, Granite's,
# Nemotron-H's.
DELTA_RULE = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1}
FALCON_H1 = MAMBA | {"mamba_d_ssm": 256}
GRANITE_H = MAMBA | {"num_local_experts": 0, "shared_intermediate_size": 256, "layer_types": ["mamba", "attention"]}
NEMOTRON_H = {
    "layers_block_type": ["mamba", "attention", "mlp"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "ssm_state_size": 16,
    "n_groups": 1,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Multi-head latent attention: of the widths that vLLM's kernel for a CPU takes, with values narrower than keys.
LATENT = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "tie_word_embeddings": False,
    # As transformers has it in some of its norms whatever is said.
    "rms_norm_eps": 1e-6,
}
YARN = {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7}
}
# Mixtures of experts of each kind of router, of files and of experts that all tokens have. Ernie's has a bias and a
# softmax; MiniMax's a bias and a sigmoid; GLM's the same over groups, scaled, after a first layer that is dense.
MIXTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "deepseek_v2": (
        CONFIG_MAPPING["deepseek_v2"],
        EXPERTS
        | LATENT
        | YARN
        | {"q_lora_rank": None, "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v2 in groups": (
        CONFIG_MAPPING["deepseek_v2"],
        EXPERTS
        | LATENT
        | {"q_lora_rank": 96, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | {"num_experts_per_tok": 3},
    ),
    # What files say to vLLM alone.
    "deepseek_v3": (
        CONFIG_MAPPING["deepseek_v3"],
        EXPERTS
        | LATENT
        | YARN
        | {"q_lora_rank": 96, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
        | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
    "glm4_moe_lite": (
        CONFIG_MAPPING["glm4_moe_lite"],
        EXPERTS
        | LATENT
        | {"q_lora_rank": 96, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
    "ernie4_5_moe": (
        CONFIG_MAPPING["ernie4_5_moe"],
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2},
    ),
    "glm4_moe": (
        CONFIG_MAPPING["glm4_moe"],
        EXPERTS
        | {"n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
        | {"first_k_dense_replace": 1, "head_dim": 48, "use_qk_norm": True, "tie_word_embeddings": False},
    ),
    # Attention sinks, in every other layer a window of a few tokens; gate and up column by column, with biases.
    "gpt_oss": (
        CONFIG_MAPPING["gpt_oss"],
        {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64, "head_dim": 32}
        | {"sliding_window": 9, "tie_word_embeddings": False}
        | {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 15e4, "factor": 4.0}
            | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 256}
        },
    ),
    "granitemoe": (
        CONFIG_MAPPING["granitemoe"],
        {"num_local_experts": 6, "intermediate_size": 64, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    ),
    "granitemoeshared": (
        CONFIG_MAPPING["granitemoeshared"],
        {"num_local_experts": 6, "intermediate_size": 64, "shared_intermediate_size": 96},
    ),
    "granitemoehybrid of experts": (
        CONFIG_MAPPING["granitemoehybrid"],
        GRANITE_H
        | {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64, "shared_intermediate_size": 96},
    ),
    "minimax_m2": (
        CONFIG_MAPPING["minimax_m2"],
        {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64, "head_dim": 32, "rotary_dim": 16}
        # What files say to vLLM alone.
        | {"scoring_func": "sigmoid", "use_routing_bias": True, "tie_word_embeddings": False, "bos_token_id": None},
    ),
    # Noise before the router in training, which vLLM has not.
    "mixtral": (CONFIG_MAPPING["mixtral"], {"num_local_experts": 6, "router_jitter_noise": 0.3}),
    "qwen3_5_moe": (
        CONFIG_MAPPING["qwen3_5_moe_text"],
        DELTA_RULE | EXPERTS | {"num_experts": 6, "shared_expert_intermediate_size": 64, "tie_word_embeddings": False},
    ),
}


def save_tiny_model(
    folder: Path, *, kind: type[PretrainedConfig] = Qwen2Config, seed: int = 0, **changes: object
) -> Path:
    """Write a model of 0.3 M parameters (Qwen2: GQA, biases, tied embeddings) and its tokenizer to `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    shape = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**(shape | changes)))
    router_biases_as_buffers(model)
    for parameter in model.parameters():
        # Initial biases are 0 and norms 1: random ones show a mistake in either.
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.data.mul_(2.0)
    for _, bias in router_biases(model):
        bias.add_(0.1 * torch.randn_like(bias))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
