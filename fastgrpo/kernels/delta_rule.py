"""The gated delta rule of linear attention (Qwen3-Next, Qwen3.5), chunk by chunk, with a backward that keeps little.

Gated DeltaNet (arXiv 2412.06464, equation 10), with keys and queries of length 1 and queries divided by sqrt(K):

    S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

In a chunk of C tokens that begins with the state S, with G = cumsum(g) and D_ij = exp(G_i - G_j) for j <= i, the WY
form (arXiv 2406.06484, section 3.2) has

    T = (I + tril(b k k^T * D, -1))^-1      N = T (b v - exp(G) b k S)
    o = exp(G) q S + (q k^T * D) N          S' = exp(G_C) S + (exp(G_C - G) k)^T N

Only N and S' go from chunk to chunk; all else is products of all chunks at once. Backward keeps the inputs, T and each
chunk's S, and computes the rest from them again. `delta_rule_forward_triton` and `delta_rule_backward_triton` have both
passes for bfloat16 on a GPU, `delta_rule_torch` for all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo.kernels import delta_rule_torch
from fastgrpo.kernels.backend import triton_runs

# Elements of the keys or values of the heads that are computed together: what their backward works with is bounded so.
TOGETHER = 2**25
# Columns of a key that the kernels take at most.
KERNEL_KEYS = 128


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Outputs [B, L, H, V] of rows whose first state is zeros, in the type of `query`; computed in fp32.

    query, key: [B, L, H, K]; value: [B, L, H, V]; g: [B, L, H], the logarithm of what remains of a state, at most 0;
    beta: [B, L, H], the share of a key's old value that its new one replaces.
    """
    out: Tensor = _GatedDeltaRule.apply(query, key, value, g, beta)
    return out


class _GatedDeltaRule(torch.autograd.Function):
    """Both passes, some heads after the others; arguments and result as those of `gated_delta_rule`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        query, key, value, *_ = inputs
        forward, ctx.backward = _passes_for(query, key, value)
        elements_of_head = query.shape[:2].numel() * max(query.shape[-1], value.shape[-1])
        ctx.heads = max(1, TOGETHER // elements_of_head)
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        kept = [forward(part, into) for *part, into in _parts(ctx.heads, *inputs, output)]
        ctx.save_for_backward(*inputs, *chain.from_iterable(kept))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, ...]:
        inputs, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        gradients = tuple(torch.empty_like(given, memory_format=torch.contiguous_format) for given in inputs)
        parts = list(_parts(ctx.heads, d_output, *inputs, *gradients))
        count = len(kept) // len(parts)
        for number, (d_part, *both) in enumerate(parts):
            ctx.backward(d_part, both[:5], kept[count * number : count * (number + 1)], both[5:])
        return gradients


def _parts(heads: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of so many heads of each [B, L, H, ...]."""
    return zip(*(tensor.split(heads, 2) for tensor in tensors), strict=True)


def _passes_for(query: Tensor, key: Tensor, value: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward): Triton's for bfloat16 and keys whose states, with all else, fit into shared memory."""
    narrow = query.dtype == key.dtype == value.dtype == torch.bfloat16 and query.shape[-1] <= KERNEL_KEYS
    if narrow and triton_runs(query.device):
        from fastgrpo.kernels import delta_rule_backward_triton, delta_rule_forward_triton

        return delta_rule_forward_triton.forward, delta_rule_backward_triton.backward
    return delta_rule_torch.forward, delta_rule_torch.backward
