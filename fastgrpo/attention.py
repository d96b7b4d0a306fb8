"""Causal attention over a packed row of sequences, registered with transformers as one implementation.

The sequences of a batch lie one after another in a single row of T tokens; `cu_seq_lens_q` holds the boundaries. No
token of padding is ever computed, and no attention mask exists.
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
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence, for B = 1 row, H query heads and G <= H key/value heads.

    flash-attn on a GPU where installed, else torch's own varlen attention; one fused call per sequence on CPU, and in
    fp32, which neither knows.
    Returns (output_BTHD, None). Raises ValueError if a sequence is longer than a layer's sliding window.
    """
    if sliding_window is not None and max_length_q > sliding_window:
        raise ValueError(f"a sequence of {max_length_q} tokens exceeds the model's sliding window of {sliding_window}")
    heads = query_BHTD, key_BGTD, value_BGTD
    if query_BHTD.is_cuda and query_BHTD.dtype != torch.float32:
        query_THD, key_TGD, value_TGD = (x.squeeze(0).transpose(0, 1) for x in heads)
        varlen = _torch_varlen if flash_attn_varlen_func is None else _flash_varlen
        return varlen(query_THD, key_TGD, value_TGD, cu_seq_lens_q, max_length_q, scaling).unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    # `split` has one concatenation as its backward; slicing would have a zero tensor of T tokens for each sequence.
    parts = zip(*(x.split(lengths, dim=2) for x in heads), strict=True)
    grouped = query_BHTD.shape[1] != key_BGTD.shape[1]
    outputs = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _flash_varlen(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, cu_seqlens_S: Tensor, longest: int, scale: float | None
) -> Tensor:
    boundaries = (cu_seqlens_S, cu_seqlens_S, longest, longest)
    return flash_attn_varlen_func(query_THD, key_TGD, value_TGD, *boundaries, softmax_scale=scale, causal=True)


def _torch_varlen(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, cu_seqlens_S: Tensor, longest: int, scale: float | None
) -> Tensor:
    """torch's own varlen attention, in the words of torch 2.10 (no scale, `is_causal`) to 2.13 (`enable_gqa`)."""
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in VARLEN_OPTIONS else {"is_causal": True}
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = True
    if "scale" in VARLEN_OPTIONS:
        options["scale"] = scale
    elif scale is not None:
        query_THD = query_THD * (scale * query_THD.shape[-1] ** 0.5)
    boundaries = (cu_seqlens_S, cu_seqlens_S, longest, longest)
    output_THD: Any = varlen_attn(query_THD, key_TGD, value_TGD, *boundaries, **options)
    return output_THD


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
