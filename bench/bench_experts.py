"""A layer's mixture of experts, forward and backward, beside transformers' own and the grouped products alone.

    python bench/bench_experts.py [--size 30b-a3b/6] [--tokens 17408] [--save FILE]

x + experts(norm(x)) of random weights in bf16, the router's choices uneven as they come. The floor is the six grouped
products of torch, two forward and four backward, on inputs that are sorted already. transformers' layer has its norm,
its router and the same products (`grouped_mm`, its default). Memory is what the layer keeps for backward, and the peak
above inputs and weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_setup import report, save
from model_shapes import CUDA, GIB, MIXTURES, PEAK_FLOPS, device_name, named, seconds_of, shape
from torch import Tensor
from torch.nn.functional import grouped_mm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from fastgrpo.kernels.experts import norm_experts, routes_of

DEVICE = torch.device("cuda" if CUDA else "cpu")


class Case:
    """One layer's norm and mixture, and hidden states of so many tokens."""

    def __init__(self, size: str, tokens: int) -> None:
        torch.manual_seed(0)
        config: Any = shape(size)
        config._experts_implementation = "grouped_mm"
        config._attn_implementation = "eager"
        with DEVICE:
            layer = Qwen3MoeDecoderLayer(config, 0).bfloat16()
            for weight in layer.mlp.parameters():
                torch.nn.init.normal_(weight, std=0.04)
            self.x_TH = torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16).requires_grad_()
            self.dy_TH = torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16)
        self.norm, self.mlp, self.choices = layer.post_attention_layernorm, layer.mlp, config.num_experts_per_tok
        inner = self.choices * config.moe_intermediate_size
        self.flop = 6 * 3 * tokens * inner * config.hidden_size

    def ours(self, recompute: bool) -> Tensor:
        experts, gate = self.mlp.experts, self.mlp.gate
        options = {"top_k": gate.top_k, "renormalise": gate.norm_topk_prob, "recompute": recompute}
        weights = self.norm.weight, self.norm.variance_epsilon, gate.weight, experts.gate_up_proj, experts.down_proj
        return norm_experts(self.x_TH, *weights, **options)

    def theirs(self) -> Tensor:
        return self.x_TH + self.mlp(self.norm(self.x_TH)[None])[0]

    def products(self) -> Callable[[], object]:
        """The six grouped products."""
        gate_up_EFH, down_EHI = self.mlp.experts.gate_up_proj.detach(), self.mlp.experts.down_proj.detach()
        with torch.no_grad():
            chosen_TK = self.mlp.gate(self.norm(self.x_TH))[2]
            routes = routes_of(chosen_TK, len(gate_up_EFH))
            h_SH, dy_SH = (each.detach()[routes.token_S] for each in (self.x_TH, self.dy_TH))
            product_SI = torch.randn(len(h_SH), down_EHI.shape[2], device=DEVICE, dtype=torch.bfloat16)
            gate_up_SF = torch.randn(len(h_SH), gate_up_EFH.shape[1], device=DEVICE, dtype=torch.bfloat16)
        counts = routes.end_E.diff(prepend=routes.end_E.new_zeros(1))
        spread = f"{counts.min()}, {counts.float().mean():.0f}, {counts.max()}"
        report("tokens of an expert: fewest, mean, most", spread)

        def run() -> None:
            for left, right in (
                (h_SH, gate_up_EFH.mT),
                (product_SI, down_EHI.mT),
                (dy_SH, down_EHI),
                (dy_SH.mT, product_SI),
                (gate_up_SF.mT, h_SH),
                (gate_up_SF, gate_up_EFH),
            ):
                grouped_mm(left, right, offs=routes.end_E)

        return run

    def gradients(self) -> list[Tensor]:
        leaves = [self.x_TH, *self.norm.parameters(), *self.mlp.parameters()]
        found = [leaf.grad for leaf in leaves if leaf.grad is not None]
        for leaf in leaves:
            leaf.grad = None
        return found


def kept_gib(forward: Callable[[], Tensor], known: set[int]) -> float:
    """What a forward keeps for backward besides the tensors `known` by their memory."""
    kept = dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values()) / GIB


def measured(case: Case, name: str, forward: Callable[[], Tensor], floor: float) -> list[Tensor]:
    """One row; returns the gradients."""

    def both() -> None:
        forward().backward(case.dy_TH)
        case.gradients()

    with torch.no_grad():
        forward()
        ahead = seconds_of(forward)
    both()
    total = seconds_of(both)
    known = {p.untyped_storage().data_ptr() for p in (case.x_TH, *case.norm.parameters(), *case.mlp.parameters())}
    kept, peak = kept_gib(forward, known), float("nan")
    if CUDA:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / GIB
    report(
        name,
        f"{1e3 * ahead:6.2f} + {1e3 * (total - ahead):6.2f} = {1e3 * total:6.2f} ms, {total / floor:.3f} of the floor, "
        f"{case.flop / total / PEAK_FLOPS:.1%} of 989 TFLOP/s; keeps {kept:.2f}, peak {peak:.2f} GiB",
    )
    forward().backward(case.dy_TH)
    return case.gradients()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=MIXTURES, default="30b-a3b/6" if CUDA else "tiny-mixture")
    parser.add_argument("--tokens", type=int, default=17408 if CUDA else 512)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    title = f"Mixture of experts, one layer of the {named(options.size)}, {options.tokens} tokens"
    print(f"{title}; {device_name()}, torch {torch.__version__}")
    case = Case(options.size, options.tokens)
    products = case.products()
    products()
    floor = seconds_of(products)
    report("the six grouped products alone (the floor)", f"{1e3 * floor:.2f} ms, {case.flop / floor / PEAK_FLOPS:.1%}")
    theirs = measured(case, "transformers' own, with autograd", case.theirs, floor)
    for recompute in (False, True):
        name = "ours" + (", model.recompute_mlp" if recompute else "")
        ours = measured(case, name, lambda: case.ours(recompute), floor)  # noqa: B023
    away: list[Any] = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    report("gradients: largest |ours - theirs| / |theirs|", f"{max(away):.4f}")
    if options.save:
        save(options.save, title)


if __name__ == "__main__":
    main()
