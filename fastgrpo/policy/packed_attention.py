"""Causal attention over a packed row of sequences, registered with transformers as one implementation.

The runs of a batch (`types.Runs`) lie one after another in a single row of T tokens. No token of padding is ever
computed. A prompt that several sequences share is computed once; its keys are gathered before each continuation's own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:
    VARLEN_OPTIONS = frozenset()

PACKED = "fastgrpo_packed"


def packed_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    key_index_U: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each run over its keys, for B = 1 row, H query heads and G <= H key/value heads.

    The last query of a run sees all of its keys, the one before it all but one, and so on.
    flash-attn on a GPU where installed, else torch's own varlen attention; one fused call per run on CPU, and in
    fp32, which neither knows.
    Returns (output_BTHD, None). Raises ValueError if a sequence is longer than a layer's sliding window.
    """
    if sliding_window is not None and max_length_k > sliding_window:
        raise ValueError(f"a sequence of {max_length_k} tokens exceeds the model's sliding window of {sliding_window}")
    query_THD, key_UGD, value_UGD = (x.squeeze(0).transpose(0, 1) for x in (query_BHTD, key_BGTD, value_BGTD))
    if key_index_U is not None:
        key_UGD, value_UGD = _Repeated.apply(key_UGD, key_index_U), _Repeated.apply(value_UGD, key_index_U)
    heads, boundaries = (query_THD, key_UGD, value_UGD), (cu_seq_lens_q, cu_seq_lens_k)
    if not query_BHTD.is_cuda or query_BHTD.dtype == torch.float32:
        output_THD = _run_by_run(*heads, *boundaries, scaling)
    elif flash_attn_varlen_func is not None:
        output_THD = flash_attn_varlen_func(
            *heads, *boundaries, max_length_q, max_length_k, softmax_scale=scaling, causal=True
        )
    else:
        output_THD = _torch_varlen(*heads, (*boundaries, max_length_q, max_length_k), scaling)
    return output_THD.unsqueeze(0), None


class _Repeated(torch.autograd.Function):
    """rows[index], whose gradient adds up in fp32 what the copies of a row receive."""

    @staticmethod
    def forward(ctx: Any, rows_TGD: Tensor, index_U: Tensor) -> Tensor:
        ctx.save_for_backward(index_U)
        ctx.rows = len(rows_TGD)
        return rows_TGD.index_select(0, index_U)

    @staticmethod
    def backward(ctx: Any, grad_UGD: Tensor) -> tuple[Tensor, None]:
        (index_U,) = ctx.saved_tensors
        sum_TGD = grad_UGD.new_zeros(ctx.rows, *grad_UGD.shape[1:], dtype=torch.float32)
        return sum_TGD.index_add_(0, index_U, grad_UGD.float()).to(grad_UGD.dtype), None


def _run_by_run(
    query_THD: Tensor, key_UGD: Tensor, value_UGD: Tensor, cu_queries_S: Tensor, cu_keys_S: Tensor, scale: float | None
) -> Tensor:
    lengths = cu_queries_S.diff().tolist(), cu_keys_S.diff().tolist()
    # `split` has one concatenation as its backward; slicing would have a zero tensor of T tokens for each run.
    parts = zip(
        *(x.transpose(0, 1).split(n, dim=1) for x, n in ((query_THD, lengths[0]), (key_UGD, lengths[1]))),
        value_UGD.transpose(0, 1).split(lengths[1], dim=1),
        strict=True,
    )
    grouped = query_THD.shape[1] != key_UGD.shape[1]
    outputs = []
    for query_HQD, key_GKD, value_GKD in parts:
        queries, keys = query_HQD.shape[1], key_GKD.shape[1]
        mask_QK = None
        if queries < keys:
            mask_QK = torch.ones(queries, keys, dtype=torch.bool, device=query_THD.device).tril(keys - queries)
        output_1HQD = functional.scaled_dot_product_attention(
            query_HQD[None],
            key_GKD[None],
            value_GKD[None],
            attn_mask=mask_QK,
            is_causal=mask_QK is None,
            scale=scale,
            enable_gqa=grouped,
        )
        outputs.append(output_1HQD[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _torch_varlen(
    query_THD: Tensor,
    key_UGD: Tensor,
    value_UGD: Tensor,
    boundaries: tuple[Tensor, Tensor, int, int],
    scale: float | None,
) -> Tensor:
    """torch's own varlen attention, in the words of torch 2.10 (no scale, `is_causal`) to 2.13 (`enable_gqa`)."""
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in VARLEN_OPTIONS else {"is_causal": True}
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = True
    if "scale" in VARLEN_OPTIONS:
        options["scale"] = scale
    elif scale is not None:
        query_THD = query_THD * (scale * query_THD.shape[-1] ** 0.5)
    output_THD: Any = varlen_attn(query_THD, key_UGD, value_UGD, *boundaries, **options)
    return output_THD


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
