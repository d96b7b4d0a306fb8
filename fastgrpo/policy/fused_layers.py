"""Decoder layers that run on the passes of `kernels.layer`: faster than transformers' own, with half as much to keep.

They compute what transformers' layers compute, to bf16's rounding; experts' weights stay fp32, as in vLLM. Layers of
other kinds, or with adapters, stay as they are, but for the products of their experts: Gemma (norms of 1 + w, four a
layer), Granite, Cohere and Phi among them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from fastgrpo.errors import UserError
from fastgrpo.kernels.experts import biased_experts, norm_experts, routed_experts
from fastgrpo.kernels.layer import norm_linear, norm_mlp, rotated
from fastgrpo.policy.experts import is_of_experts
from fastgrpo.policy.packed_attention import packed_attention

# Two RMSNorms, q, k and v apart and rotated by halves, silu(gate) * up; Qwen3 has norms for the heads besides, and its
# mixtures have experts in place of an MLP, in all layers or in some.
FUSED = frozenset(
    {"Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer"}
)
MODELS = frozenset({"qwen2", "qwen3", "qwen3_moe", "llama", "mistral"})
# transformers' name of products of all experts at once, and the bytes at whose multiples their weights' rows begin.
GROUPED, ALIGNMENT = "grouped_mm", 16


def fuse_layers(decoder: nn.Module, *, recompute_mlp: bool = False) -> bool:
    """Let the layers of `decoder` run fused; False, with nothing changed, where one is of a kind that is not known.

    `recompute_mlp` keeps no product of the MLPs for backward.
    """
    layers: Any = getattr(decoder, "layers", ())
    if not layers or not all(map(_known, layers)):
        return False
    for layer in layers:
        layer.recompute_mlp = recompute_mlp
        layer.forward = MethodType(_forward, layer)
    return True


def fuse_experts(decoder: nn.Module) -> None:
    """Let the experts of `decoder` run on `kernels.experts`, where that computes what theirs would.

    Their routers and what all tokens have besides stay as they are.
    """
    for module in decoder.modules():
        if (forward := _experts_of(module)) is not None:
            module.forward = MethodType(forward, module)


def restore_layers(decoder: nn.Module) -> None:
    """Let the layers of `decoder` run as transformers has them."""
    layers: Any = decoder.layers
    for module in (*layers, *filter(_experts_of, decoder.modules())):
        vars(module).pop("forward", None)


def may_fuse(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration has fused layers, unless it has adapters or torch compiles it."""
    return config.model_type in MODELS and config.hidden_act == "silu" and not getattr(config, "mlp_bias", False)


def ungroup_odd_experts(model: Any, dtype: torch.dtype) -> None:
    """Have experts computed one after another where rows of their weights, in `dtype`, are no grouped product's."""
    weights = filter(is_of_experts, model.parameters())
    # gpt-oss's are transposed: what would be a row is a column.
    if any(columns * dtype.itemsize % ALIGNMENT for weight in weights for columns in weight.shape[1:]):
        model.set_experts_implementation("eager")


def recompute_mlps(decoder: nn.Module) -> None:
    """Have the `mlp` of each layer, of whatever kind, computed once more in backward.

    Raises UserError where a layer has none.
    """
    layers: Any = decoder.layers
    for layer in layers:
        if not hasattr(layer, "mlp"):
            raise UserError(
                f"model.recompute_mlp does not know the MLP of {type(layer).__name__}: set model.gradient_checkpointing"
            )
        layer.mlp.forward = partial(checkpoint, layer.mlp.forward, use_reentrant=False)


def stack_weights(decoder: nn.Module) -> None:
    """Put the weights that are multiplied together next to each other, where they are this process's own."""
    layers: Any = decoder.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        stacks: list[tuple[Any, ...]] = [(attention.q_proj, attention.k_proj, attention.v_proj)]
        if not hasattr(mlp, "experts"):
            stacks.append((mlp.gate_proj, mlp.up_proj))
        for parts in stacks:
            for name in ("weight", "bias"):
                if getattr(parts[0], name) is not None:
                    _adjoin([getattr(part, name) for part in parts])


@torch.no_grad()
def _adjoin(parameters: list[nn.Parameter]) -> None:
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = rows


def _experts_of(module: Any) -> Callable[..., Tensor] | None:
    """The `forward` of a module that holds experts of a kind that is known, which transformers computes all at once."""
    if not getattr(module, "has_gate", False) or module.config._experts_implementation != GROUPED:
        return None
    if type(module).__name__ == "GptOssExperts":
        return _gpt_oss_experts
    return _experts if module.config.hidden_act == "silu" and not module.has_bias else None


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts over tokens [T, H] with their choices and weights of these, [T, k]."""
    return routed_experts(hidden_states, top_k_weights, top_k_index, self.gate_up_proj, self.down_proj)


def _gpt_oss_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    weights = self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias
    return biased_experts(hidden_states, top_k_weights, top_k_index, *weights, activation=self._apply_gate)


def _known(layer: Any) -> bool:
    if type(layer).__name__.removeprefix("FSDP") not in FUSED:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    if hasattr(mlp, "experts"):
        linears: list[nn.Module] = []
        known = mlp.experts.config._experts_implementation == GROUPED
    else:
        linears = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        known = all(getattr(module, "bias", None) is None for module in linears)
    return (
        known
        and all(type(module) is nn.Linear for module in (*projections, attention.o_proj, *linears))
        and len({module.bias is None for module in projections}) == 1
        and attention.config.hidden_act == "silu"
    )


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **packing: Any,
) -> Tensor:
    """transformers' layer over one packed row, hidden_states [1, T, H]; `packing` is `packed_attention`'s."""
    assert position_embeddings is not None, "transformers' models give them"
    mlp, norm = self.mlp, self.post_attention_layernorm
    x_TH = _attended(self, hidden_states, position_embeddings, packing)
    if hasattr(mlp, "experts"):
        experts, gate = mlp.experts, mlp.gate
        mixture = (gate.weight, experts.gate_up_proj, experts.down_proj)
        return norm_experts(
            x_TH,
            norm.weight,
            norm.variance_epsilon,
            *mixture,
            top_k=gate.top_k,
            renormalise=gate.norm_topk_prob,
            recompute=self.recompute_mlp,
            replay=getattr(mlp, "replay", None),
        )[None]
    weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    return norm_mlp(x_TH, norm.weight, norm.variance_epsilon, *weights, recompute=self.recompute_mlp)[None]


def _attended(layer: Any, hidden_1TH: Tensor, position: tuple[Tensor, Tensor], packing: dict[str, Any]) -> Tensor:
    """x + attention(norm(x)), [T, H]."""
    attention, norm = layer.self_attn, layer.input_layernorm
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    x_TH, qkv_TF = norm_linear(
        hidden_1TH.squeeze(0),
        norm.weight,
        norm.variance_epsilon,
        [part.weight for part in parts],
        [part.bias for part in parts if part.bias is not None],
    )
    normed = hasattr(attention, "q_norm")
    query_THD, key_TGD, value_TGD = rotated(
        qkv_TF,
        *(part.squeeze(0) for part in position),
        heads=len(parts[0].weight) // attention.head_dim,
        kv_heads=len(parts[1].weight) // attention.head_dim,
        norms=(attention.q_norm.weight, attention.k_norm.weight) if normed else None,
        eps=attention.q_norm.variance_epsilon if normed else 0.0,
    )
    del qkv_TF
    attended_1THD, _ = packed_attention(
        attention,
        query_THD.transpose(0, 1)[None],
        key_TGD.transpose(0, 1)[None],
        value_TGD.transpose(0, 1)[None],
        attention_mask=None,
        scaling=attention.scaling,
        sliding_window=_window(attention),
        **packing,
    )
    return x_TH + attention.o_proj(attended_1THD.flatten(2).squeeze(0))


def _window(attention: Any) -> int | None:
    """The layer's sliding window: Qwen's layers each have their own or none, Mistral's the model's."""
    holder = attention.config if type(attention).__name__ == "MistralAttention" else attention
    return getattr(holder, "sliding_window", None)
