"""Shapes of Qwen2.5 and of a mixture of experts with random weights, and a clock: what benchmarks need that start no
engine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import cpu_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from fastgrpo.policy.packed_attention import PACKED
from fastgrpo.training import flops
from fastgrpo.types import Sample

DENSE: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
# Qwen3-30B-A3B with so many of its 48 layers, which are all alike: 4.4 B parameters with six, of which 0.96 B compute.
MIXTURES: dict[str, dict[str, Any]] = {
    f"30b-a3b/{layers}": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }
    for layers in (6, 16, 48)
} | {
    "tiny-mixture": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
}
# Models of other kinds at their own widths, with a few of their layers and experts: some 1 B parameters each.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Three layers of the gated delta rule, then one of attention; 512 experts in the whole model.
    "qwen3-next/8": (
        "qwen3_next",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "num_experts": 32,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
    ),
    # Router of sigmoids with a bias, one dense layer first, one expert that all tokens have; 128 in the whole model.
    "glm-4.5-air/3": (
        "glm4_moe",
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "num_hidden_layers": 3,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "attention_bias": True,
        },
    ),
    # A router of the same kind; 256 experts in the whole model.
    "minimax-m2/3": (
        "minimax_m2",
        {
            "vocab_size": 32768,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_hidden_layers": 3,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rotary_dim": 64,
            "num_local_experts": 16,
            "num_experts_per_tok": 8,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "mixtral-8x7b/1": (
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 1,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    # Latent attention with keys of 192 columns and values of 128, one dense layer first; 64 experts in the whole model.
    "deepseek-v2-lite/4": (
        "deepseek_v2",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    # gpt-oss-20b with four of its 24 layers: sinks, windows in every other layer; 1.1 of 4.5 B compute.
    "gpt-oss/4": (
        "gpt_oss",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "max_position_embeddings": 131072,
        },
    ),
    # Latent attention with keys and values of 256 columns, GLM-4.5's router; 64 experts in the whole model.
    "glm-4.7-flash/4": (
        "glm4_moe_lite",
        {
            "vocab_size": 32768,
            "num_hidden_layers": 4,
            "n_routed_experts": 16,
            "first_k_dense_replace": 1,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    # Nine layers of Mamba-2 and one of attention, where the whole model has its first; 64 experts in that.
    "granite-4-tiny/10": (
        "granitemoehybrid",
        {
            "vocab_size": 100352,
            "hidden_size": 1536,
            "intermediate_size": 512,
            "num_hidden_layers": 10,
            "layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 4,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "num_local_experts": 16,
            "num_experts_per_tok": 6,
            "shared_intermediate_size": 1024,
            "mamba_n_heads": 48,
            "mamba_d_state": 128,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
            "position_embedding_type": "nope",
        },
    ),
}
SHAPES = DENSE | MIXTURES | OTHERS
PEAK_FLOPS = flops.PEAK_FLOPS["H200"]
GIB = 2**30
CUDA = torch.cuda.is_available()


def shape(size: str) -> PretrainedConfig:
    """The configuration of the model of `size`."""
    rotation = {"rope_type": "default", "rope_theta": 1e6}
    if size in MIXTURES:
        return Qwen3MoeConfig(max_position_embeddings=32768, rope_parameters=rotation, **MIXTURES[size])
    if size in OTHERS:
        kind, sizes = OTHERS[size]
        other: Any = CONFIG_MAPPING[kind]
        return other(**{"max_position_embeddings": 32768, "tie_word_embeddings": False} | sizes)
    return Qwen2Config(
        vocab_size=2048 if size == "tiny" else 152064 if size == "7b" else 151936,
        num_key_value_heads=4 if size == "7b" else 2,
        max_position_embeddings=32768,
        rope_parameters=rotation,
        tie_word_embeddings=size != "7b",
        **DENSE[size],
    )


def named(size: str) -> str:
    """What tables say of it."""
    return f"{size} shape" if size in OTHERS else f"{'Qwen3 mixture' if size in MIXTURES else 'Qwen2.5'} {size} shape"


def random_model(size: str, device: str, vocabulary: int | None = None) -> Any:
    """Random weights in bf16, twice the usual size, so that the distributions are not flat.

    gpt-oss's are of the usual size: at twice bf16 alone moves its logprobs by 0.50 nats (`rounding.py`), where a sync's
    check allows 0.2 beside vLLM. `vocabulary`: in place of the shape's own.
    """
    torch.manual_seed(0)
    config = shape(size)
    config.vocab_size = vocabulary or config.vocab_size
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=PACKED)
    for parameter in model.parameters():
        if parameter.ndim > 1 and config.model_type != "gpt_oss":
            parameter.data.mul_(2)
    return model


def random_samples(vocabulary: int, prompt: int, completion: int, groups: int, members: int) -> list[Sample]:
    """Samples of so many random tokens, `members` on each group's prompt, with vLLM's place of logprobs filled."""
    draw, mask, samples = np.random.default_rng(0), np.repeat([False, True], [prompt, completion]), []
    for _ in range(groups):
        begun = draw.integers(vocabulary, size=prompt)
        for number in range(members):
            token_ids = np.concatenate([begun, draw.integers(vocabulary, size=completion)])
            samples.append(Sample(token_ids, mask, np.full(len(mask), -12.0), 1.0 if number % 2 else -1.0))
    return samples


def device_name() -> str:
    """The GPU's name, without one the processor's."""
    return torch.cuda.get_device_name() if CUDA else cpu_model()


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The function's result and its seconds, to the end of its work on the device."""
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return result, time.perf_counter() - start


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call: the median of three times five."""
    return median(timed(lambda: [run() for _ in range(5)])[1] for _ in range(3)) / 5


def chosen(parser: argparse.ArgumentParser, option: str, given: str, known: Collection[str]) -> list[str]:
    """The names in `given`, separated by commas; the program ends with one sentence where one is not `known`."""
    names = given.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option} takes {', '.join(known)}, not {', '.join(unknown)}")
    return names
