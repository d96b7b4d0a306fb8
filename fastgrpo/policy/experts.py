"""Mixtures of experts: their sizes, a layer's experts as one tensor [E, ., .], and what files have of that.

The routers are transformers' own. Those of sigmoids have a bias for each expert that decides who is chosen and no more:
no gradient reaches it, training leaves it as it is, and files have it among the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

# Mixtures whose routing and weights are known to be alike here, in transformers' files and in vLLM.
MIXTURES = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_oss",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
    }
)
# The buffers of routers that files have, which stay fp32 whatever the dtype of the weights.
ROUTER_BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sizes of a layer: how many experts, how many of them a token has, the columns of one and of those that all have.

    `dense`: some layers have a plain MLP instead, of the configuration's `intermediate_size`.
    """

    experts: int
    choices: int
    columns: int
    shared: int
    dense: bool


def mixture(config: PretrainedConfig) -> Mixture | None:
    """The sizes of the model's mixtures, None where it has none. Some dense models' configurations have them too."""
    text = config.get_text_config()
    experts = _first(text, "num_experts", "num_local_experts")
    if text.model_type not in MIXTURES or not experts:
        return None
    columns = _first(text, "moe_intermediate_size", "intermediate_size")
    shared = _first(text, "shared_expert_intermediate_size", "shared_intermediate_size")
    shared = shared or columns * _first(text, "n_shared_experts", "moe_num_shared_experts")
    last = text.num_hidden_layers - 1
    dense = (
        bool(_first(text, "mlp_only_layers", "first_k_dense_replace"))
        or getattr(text, "decoder_sparse_step", 1) > 1
        or "dense" in (getattr(text, "mlp_layer_types", None) or ())
        or getattr(text, "moe_layer_interval", 1) > 1
        or getattr(text, "moe_layer_start_index", 0) > 0
        or getattr(text, "moe_layer_end_index", last) < last
    )
    return Mixture(experts, text.num_experts_per_tok, columns, shared, dense)


def _first(config: PretrainedConfig, *names: str) -> Any:
    """The first of these numbers that the configuration has and that is not 0, else 0."""
    return next((value for name in names if (value := getattr(config, name, None))), 0)


def is_of_experts(weight: Tensor) -> bool:
    """Whether it holds all experts of a layer, [E, ., .]; a convolution's, of one column for each channel, does not."""
    return weight.ndim == 3 and weight.shape[1] > 1


def keep_router_biases(config: PretrainedConfig) -> None:
    """Have transformers load the routers' biases of models of this kind in fp32, as vLLM has them, whatever is asked.

    It does so by itself for most kinds: rounded to bf16, a bias would choose other experts.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind._keep_in_fp32_modules_strict = {*(kind._keep_in_fp32_modules_strict or ()), ROUTER_BIAS}


def router_biases_as_buffers(model: nn.Module) -> None:
    """Make a router's bias that is a frozen parameter, as Ernie's, the buffer that it is elsewhere."""
    for module in model.modules():
        bias = module._parameters.pop(ROUTER_BIAS, None)
        if bias is not None:
            module.register_buffer(ROUTER_BIAS, bias.detach())


def router_biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each router's bias that is a buffer."""
    for name, buffer in model.named_buffers():
        if name.endswith(ROUTER_BIAS):
            yield name, buffer


Parts = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]


def parts_in_files(model: Any) -> Parts:
    """(name and value of a weight) -> the names and values by which files have it: transformers' own table, reversed.

    A layer's experts are there one by one, first the first part of each; most other weights are there as they are.
    """
    table = getattr(model, "_weight_conversions", None)
    if table is None:
        table = get_model_conversion_mapping(model, add_legacy=False)
    if not table:
        return lambda name, weight: [(name, weight)]
    holder: Any = SimpleNamespace(_weight_conversions=table, config=model.config)
    return lambda name, weight: revert_weight_conversion(holder, {name: weight}).items()


def read_parts(parts: Parts, name: str, shape: torch.Size, stored: Callable[[str], Tensor]) -> Tensor:
    """The weight `name` of this shape, put together of what `stored` gives of its parts in files."""
    names = [part for part, _ in parts(name, torch.empty(shape, device="meta"))]
    if len(names) == 1:
        return stored(names[0])
    experts = shape[0]
    return torch.stack([torch.cat([stored(part) for part in names[first::experts]]) for first in range(experts)])
