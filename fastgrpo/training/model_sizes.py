"""How large a model is, by its configuration alone: parameters, what its layers keep of a token, widths."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastgrpo.kernels import delta_rule, mamba2
from fastgrpo.policy.experts import mixture
from fastgrpo.policy.latent_attention import latent_widths
from fastgrpo.policy.layer_kinds import KEYED_LAYERS, SIMILAR, layer_kinds, recurrent_layers, widths
from fastgrpo.policy.lora import adapted_layers

# Models whose queries and keys are normed head by head.
NORMED_HEADS = frozenset(
    {
        "gemma3_text",
        "glm4_moe",
        "minimax_m2",
        "olmoe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
    }
)
Layers = Literal["plain", "compiled", "fused"]


class Recurrent(NamedTuple):
    """Bytes for a column of a recurrent layer's values: what it keeps, by the bytes of a number, and what
    the backward of its function works with besides, of those that are computed together.
    """

    kept: dict[int, int]
    working: int


# Measured are 46 to 56 in bf16 and 69 to 78 in fp32; the kernels work with less. Of what it works with 4 are the
# gradients of the first and the last state of a row of 256 tokens.
DELTA_RULE = Recurrent({2: 56, 4: 80}, 68)
# 20 to 34 and 35 to 43; 87 with states of 128 rows, 121 where groups of heads have b and c of their own, 135 with 256.
# Its kernels work with less.
MAMBA2 = Recurrent({2: 36, 4: 46}, 135)


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the model, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def count_adapters(config: PretrainedConfig, rank: int) -> int:
    """Parameters of LoRA adapters of `rank`, as `policy.lora` adds them."""
    with torch.device("meta"):
        layers = adapted_layers(AutoModelForCausalLM.from_config(config).base_model).values()
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype, tensor_parallel: int = 1) -> int:
    """Keys and values of one token in all layers, on one of `tensor_parallel` ranks; each has a whole head at least.

    Of latent attention each has the vector that they are made of, and the key's rotated part.
    """
    if latent := latent_widths(config):
        return attention_layers(config) * (latent.latent + latent.rotated) * dtype.itemsize
    width = max(_kv_width(config) // tensor_parallel, _head_dim(config))
    return 2 * attention_layers(config) * width * dtype.itemsize


def attention_layers(config: PretrainedConfig) -> int:
    """Layers that have keys and values."""
    kinds = layer_kinds(config)
    return sum(kind in KEYED_LAYERS for kind in kinds) if kinds else config.num_hidden_layers


def state_bytes(config: PretrainedConfig) -> int:
    """What the recurrent layers keep of one sequence, in fp32 as vLLM's largest states."""
    layer = widths(config)
    return 0 if layer is None else 4 * recurrent_layers(config) * (layer.state + layer.before * layer.convolved)


def activation_bytes_per_token(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    layers: Layers,
    recompute_mlp: bool,
    key_copies: float = 1.0,
    widest: bool = False,
) -> int:
    """What one decoder layer keeps of a token for its backward, in bytes; of a hybrid the mean of its layers.

    `widest`: of a hybrid what any layer keeps at most.

    Plain: two norms keep fp32 and rounded hidden states (2 x (4 + 2b) H); q, k before and after rotation, v and the
    attention's output; gate, its activation, up and their product. Compiled, norms keep their input and output, and
    silu is recomputed. Fused, norms keep their input, and the product of the MLP is recomputed too. Norms of heads, as
    Qwen3's, keep what they are of. With `recompute_mlp` none of the MLP's products is kept. Of a mixture gate and up
    are kept of each choice of a token, with its weight and its expert, plain with the router's numbers; compiled the
    hidden states and the results of each choice, too. Of a shared prompt's keys and values each sequence has a copy.
    Of latent attention the values are as wide as the keys until the output is cut to them, and its vectors are normed.
    """
    b, hidden, inner, experts = dtype.itemsize, config.hidden_size, mlp_width(config), mixture(config)
    attention = int(b * 2 * (head_width(config) + key_copies * _kv_width(config)))
    if latent := latent_widths(config):
        normed = latent.latent + latent.query_latent
        attention += b * (value_width(config) + latent.rotated) + (4 + 2 * b) * normed
    if config.model_type in NORMED_HEADS:
        normed, stacked = head_width(config) + _kv_width(config), head_width(config) + 2 * _kv_width(config)
        attention += {"plain": (4 + b) * normed, "compiled": b * normed, "fused": b * stacked}[layers]
    recurrent = _recurrent_bytes(config, dtype)
    if not widest:
        attention = attention * attention_layers(config) // config.num_hidden_layers
        recurrent = recurrent * recurrent_layers(config) // config.num_hidden_layers
    if mlps := layer_kinds(config).count("mlp"):
        # Nemotron-H's are layers by themselves and have no gate: of four products they keep two.
        inner = inner // 2 if widest else inner * mlps // (2 * config.num_hidden_layers)
    norms = {"plain": 2 * (4 + 2 * b) * hidden, "compiled": 4 * b * hidden, "fused": 2 * b * hidden + 2 * 4}
    products = {"plain": 4, "compiled": 3, "fused": 2}
    mlp = products[layers] * b * inner
    routing = 0
    if experts is not None and layers == "compiled":
        mlp += experts.choices * (2 * b * hidden + 3 * 8) + experts.experts * 4
    elif experts is not None:
        routing = experts.choices * (4 + 8)
    if experts is not None and layers == "plain":
        # Of the chosen experts two products of four; layers without experts may keep more.
        dense = config.intermediate_size if experts.dense else 0
        mlp = b * max(4 * dense, 2 * experts.choices * experts.columns + 4 * experts.shared)
        routing += experts.experts * 4
    return norms[layers] + attention + recurrent + routing + (0 if recompute_mlp else mlp)


def _recurrent_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What a recurrent layer keeps of a token of its rows, padding included.

    Rows that continue a prompt keep a state each and are longer by what a convolution reads, which is less than the
    most padding, unless they are much shorter than a chunk.
    """
    layer = widths(config)
    if layer is None:
        return 0
    function = DELTA_RULE if layer.delta_rule else MAMBA2
    return int(function.kept[dtype.itemsize] * layer.values / SIMILAR)


def recurrent_working(config: PretrainedConfig, dtype: torch.dtype, tokens: float, longest: int) -> int:
    """The most that one recurrent layer's backward works with, beyond what is kept; Mamba-2's takes rows whole.

    The delta rule's has beside its part the gradients of all queries, keys and values.
    """
    layer = widths(config)
    if layer is None:
        return 0
    elements = tokens * layer.values / SIMILAR
    if layer.delta_rule:
        return int(DELTA_RULE.working * min(elements, delta_rule.TOGETHER) + 3 * dtype.itemsize * elements)
    return int(MAMBA2.working * min(elements, max(mamba2.TOGETHER, longest * layer.values)))


def head_width(config: PretrainedConfig) -> int:
    """Width of all query heads of a layer together."""
    return config.num_attention_heads * _head_dim(config)


def value_width(config: PretrainedConfig) -> int:
    """Width of the values that all query heads of a layer get together."""
    latent = latent_widths(config)
    return head_width(config) if latent is None else config.num_attention_heads * latent.value


def _kv_width(config: PretrainedConfig) -> int:
    return (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * _head_dim(config)


def has_mlps(config: PretrainedConfig) -> bool:
    """Whether layers have an MLP of `intermediate_size`: all of a dense model's, and of a mixture's some or none."""
    experts = mixture(config)
    return experts is None or experts.dense


def mlp_width(config: PretrainedConfig) -> int:
    """Columns of a token's MLP; of a mixture those of its experts together, or of a wider layer that has none."""
    experts = mixture(config)
    if experts is None:
        # Granite's hybrids have a number for experts, too.
        return getattr(config, "shared_intermediate_size", config.intermediate_size)
    together = experts.choices * experts.columns + experts.shared
    return max(together, config.intermediate_size) if experts.dense else together


def mlp_working(config: PretrainedConfig, dtype: torch.dtype, *, layers: Layers, recompute_mlp: bool) -> int:
    """Bytes of a token that the backward of an MLP works with, beyond what is kept.

    These are the gradients of its products, its own product in place of one; of a mixture beside what enters and what
    leaves each choice. gpt-oss's makes its products again. With `recompute_mlp` what else would be kept is there, too:
    fused layers alone put the gradients in its place.
    """
    elements = 3 * mlp_width(config) + 2 * expert_choices(config) * config.hidden_size
    if config.model_type == "gpt_oss":
        elements = 6 * mlp_width(config) + (expert_choices(config) + 1) * config.hidden_size
    if not recompute_mlp or layers == "fused":
        return elements * dtype.itemsize
    kept, less = (
        activation_bytes_per_token(config, dtype, layers=layers, recompute_mlp=value) for value in (False, True)
    )
    return elements * dtype.itemsize + kept - less


def largest_experts(config: PretrainedConfig) -> int:
    """Elements of gate and up of all experts of a layer; 0 where there are none."""
    experts = mixture(config)
    return 0 if experts is None else experts.experts * 2 * experts.columns * config.hidden_size


def expert_choices(config: PretrainedConfig) -> int:
    """Experts that a token chooses in a layer; 0 where there are none."""
    experts = mixture(config)
    return 0 if experts is None else experts.choices


def _head_dim(config: PretrainedConfig) -> int:
    if latent := latent_widths(config):
        return latent.key
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
