"""One copy of the weights: the trainer's parameters as views of vLLM's tensors.

vLLM keeps q, k and v (and gate and up) of a layer as one matrix, stacked by rows; everything else has the Hugging Face
name and shape, but for rows of padding after the vocabulary and for the names of a mixture's experts, which are one
tensor in both. So each trainer parameter is a row range of one tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from fastgrpo.policy.lora import is_adapter

if TYPE_CHECKING:
    from fastgrpo.policy.model import Policy

log = logging.getLogger(__name__)

# Architectures whose vLLM weights are those of Hugging Face up to the stacking below.
SHARED_ARCHITECTURES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "OlmoeForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)

# vLLM's module <- the trainer's modules whose rows it holds, in order.
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# vLLM's names of a mixture's experts: gate and up of each [E, 2 I, H], down of each [E, H, I].
EXPERTS = {"gate_up_proj": "routed_experts.w13_weight", "down_proj": "routed_experts.w2_weight"}
STACKED_IN = {part: whole for whole, parts in STACKED.items() for part in parts}


def can_share(config: PretrainedConfig) -> bool:
    """Whether models of this kind have one copy of their weights with vLLM, and not one each."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind.__name__ in SHARED_ARCHITECTURES


def adopt_weights(policy: Policy, vllm_model: Any) -> int:
    """Put the policy's weights into `vllm_model` and return the bytes copied.

    Afterwards the policy's parameters are views of vLLM's tensors (`policy.shares_weights`) where the architecture
    is in `SHARED_ARCHITECTURES` and both keep one dtype and device; else the values are copied and copied again at
    each call, which is logged the first time. A sharded policy's weights are gathered one after another, and vLLM keeps
    its part of each.
    """
    if policy.sharded_as is not None:
        return _load(vllm_model, policy.weights())
    parameters = dict(policy.model.named_parameters())
    reason = _why_not_shared(policy, vllm_model)
    if reason is None:
        for name, view in vllm_views(policy.model, vllm_model):
            view.copy_(parameters[name].detach())
            parameters[name].data = view
        policy.shares_weights = True
    else:
        if not policy.copies_weights:
            log.warning("weights are copied into vLLM at each sync: %s", reason)
        policy.copies_weights = True
        vllm_model.load_weights(policy.weights())
    return sum(parameter.nbytes for name, parameter in parameters.items() if not is_adapter(name))


def _load(vllm_model: Any, weights: Iterable[tuple[str, Tensor]]) -> int:
    """Hand `weights` to vLLM and return the bytes that came."""
    sizes = []

    def measured() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            sizes.append(tensor.nbytes)
            yield name, tensor

    vllm_model.load_weights(measured())
    return sum(sizes)


def vllm_views(model: nn.Module, vllm_model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """For each parameter of the Hugging Face `model`: its name and the rows of vLLM's tensor that are it."""
    theirs = dict(vllm_model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        prefix, module, leaf = name.rsplit(".", 2) if name.count(".") > 1 else ("", *name.split("."))
        whole = STACKED_IN.get(module)
        if module == "experts":
            tensor, first = theirs[f"{prefix}.{module}.{EXPERTS[leaf]}"], 0
        elif whole is None:
            tensor, first = theirs[name], 0
        else:
            before = STACKED[whole][: STACKED[whole].index(module)]
            tensor = theirs[f"{prefix}.{whole}.{leaf}"]
            first = sum(shapes[f"{prefix}.{part}.{leaf}"][0] for part in before)
        yield name, tensor.data[first : first + shape[0]]


def _why_not_shared(policy: Policy, vllm_model: nn.Module) -> str | None:
    if policy.adapted:
        return "LoRA's adapters are merged into them"
    if not can_share(policy.model.config):
        return f"sharing them is not made for {type(policy.model).__name__}"
    parameters = dict(policy.model.named_parameters())
    for name, view in vllm_views(policy.model, vllm_model):
        ours = parameters[name]
        if (view.shape, view.dtype, view.device) != (ours.shape, ours.dtype, ours.device):
            return f"{name} is {_describe(ours)} in the trainer and {_describe(view)} in vLLM"
    return None


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
