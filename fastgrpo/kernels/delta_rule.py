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
from fastgrpo.kernels.chunks import whole_chunks

# Elements of the keys or values of the heads that are computed together, in whole chunks: what their backward works
# with is bounded so.
TOGETHER = 2**25
# Columns of a key that the kernels take at most.
KERNEL_KEYS = 128


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, V] of rows, in the type of `query`, and the state [B, H, K, V] after each, fp32, as computed.

    query, key: [B, L, H, K]; value: [B, L, H, V]; g: [B, L, H], the logarithm of what remains of a state, at most 0;
    beta: [B, L, H], the share of a key's old value that its new one replaces. Where both are 0, as after the end of a
    row shorter than L, the state stays as it is. initial_state: [B, H, K, V], fp32, zeros if None.
    """
    if initial_state is None:
        rows, _, heads, keys = key.shape
        initial_state = key.new_zeros(rows, heads, keys, value.shape[-1], dtype=torch.float32)
    out: tuple[Tensor, Tensor] = _GatedDeltaRule.apply(query, key, value, g, beta, initial_state)
    return out


class _GatedDeltaRule(torch.autograd.Function):
    """Both passes, some heads after the others; arguments and results as those of `gated_delta_rule`."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, initial_state = given
        query, key, value, *_ = inputs
        forward, ctx.backward = _passes_for(query, key, value)
        ctx.heads = _together(query, value)
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        final_state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
        parts = _parts(ctx.heads, *inputs, output), _parts(ctx.heads, initial_state, final_state, dim=1)
        kept = [forward(part, into, *states) for (*part, into), states in zip(*parts, strict=True)]
        ctx.save_for_backward(*inputs, *chain.from_iterable(kept))
        return output, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor) -> tuple[Tensor, ...]:
        query, key, value, g, beta, *kept = ctx.saved_tensors  # read once: checkpointing gives each away
        inputs = (query, key, value, g, beta)
        gradients = tuple(torch.empty_like(given, memory_format=torch.contiguous_format) for given in inputs)
        d_initial = torch.empty_like(d_final, memory_format=torch.contiguous_format)
        parts = list(_parts(ctx.heads, d_output, *inputs, *gradients))
        count = len(kept) // len(parts)
        of_states = _parts(ctx.heads, d_final, d_initial, dim=1)
        for number, ((d_part, *both), states) in enumerate(zip(parts, of_states, strict=True)):
            of_part = kept[count * number : count * (number + 1)]
            ctx.backward(d_part, both[:5], of_part, both[5:], *states)
        return *gradients, d_initial


def _together(query: Tensor, value: Tensor) -> int:
    """Heads that are computed together."""
    tokens = len(query) * whole_chunks(query.shape[1])
    return max(1, TOGETHER // (tokens * max(query.shape[-1], value.shape[-1])))


def _parts(heads: int, *tensors: Tensor, dim: int = 2) -> Iterator[tuple[Tensor, ...]]:
    """Views of so many heads of each tensor, which has them in `dim`."""
    return zip(*(tensor.split(heads, dim) for tensor in tensors), strict=True)


def _passes_for(query: Tensor, key: Tensor, value: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward): Triton's for bfloat16 and keys whose states, with all else, fit into shared memory."""
    narrow = query.dtype == key.dtype == value.dtype == torch.bfloat16 and query.shape[-1] <= KERNEL_KEYS
    if narrow and triton_runs(query.device):
        from fastgrpo.kernels import delta_rule_backward_triton, delta_rule_forward_triton

        return delta_rule_forward_triton.forward, delta_rule_backward_triton.backward
    return delta_rule_torch.forward, delta_rule_torch.backward
