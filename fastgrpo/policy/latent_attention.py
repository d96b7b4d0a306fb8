"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a token's keys and values are made of one short vector.

The trainer makes them of it, as transformers does; vLLM keeps the vector alone, and while it decodes multiplies queries
and outputs by the parts of the matrix that would make them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig

# The kinds that are known to be alike here and in vLLM.
LATENT = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe_lite"})
# Norms of the vectors that queries, and keys and values, are made of.
NORMS = ("q_a_layernorm", "kv_a_layernorm")
# What vLLM takes where the configuration does not say.
UNSAID = {"scoring_func": "softmax"}


class LatentWidths(NamedTuple):
    """Of a head's keys and of its values; of the vectors that queries (0 = of none), and keys and values are made of;
    of what is rotated, which all heads' keys have in common."""

    key: int
    value: int
    query_latent: int
    latent: int
    rotated: int


def latent_widths(config: PretrainedConfig) -> LatentWidths | None:
    """The widths of the model's latent attention, None where it has another one."""
    text: Any = config.get_text_config()
    if text.model_type not in LATENT:
        return None
    key = text.qk_nope_head_dim + text.qk_rope_head_dim
    return LatentWidths(key, text.v_head_dim, text.q_lora_rank or 0, text.kv_lora_rank, text.qk_rope_head_dim)


def latent_settings(config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """What the configuration of latent attention has, and with what alone vLLM computes what transformers does."""
    text: Any = config.get_text_config()
    wanted: dict[str, Any] = {"attention_bias": False}
    if text.model_type == "deepseek_v2":
        wanted |= {"scoring_func": "softmax", "norm_topk_prob": False}
        if text.topk_method != "group_limited_greedy":
            wanted |= {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    elif text.model_type == "deepseek_v3":
        wanted |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}
    else:
        wanted |= {"first_k_dense_replace": text.mlp_layer_types.count("dense"), "rope_interleave": True}
    settings = {name: (getattr(text, name, UNSAID.get(name)), value) for name, value in wanted.items()}
    rotation = (text.rope_parameters or {}).get("rope_type", "default")
    if rotation not in ("default", "yarn"):
        settings["rope_type"] = rotation, "yarn"
    return settings


def norm_latents_as_vllm(model: nn.Module, config: PretrainedConfig) -> None:
    """Give the norms of latents the configuration's epsilon, as vLLM does; transformers has 1e-6 there always."""
    if config.get_text_config().model_type not in LATENT:
        return
    for name, module in model.named_modules():
        if name.endswith(NORMS):
            module.variance_epsilon = config.get_text_config().rms_norm_eps
