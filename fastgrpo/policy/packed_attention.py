"""Causal attention over a packed row of sequences, registered with transformers as one implementation.

The runs of a batch (`types.Runs`) lie one after another in a single row of T tokens. No token of padding is ever
computed. A prompt that several sequences share is computed once; its keys are gathered before each continuation's own.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from fastgrpo.errors import UserError
from fastgrpo.kernels.backend import is_hopper

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from flash_attn_interface import flash_attn_varlen_func as flash_attn_3_varlen_func
except ImportError:
    flash_attn_3_varlen_func = None
try:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:
    VARLEN_OPTIONS = frozenset()

PACKED = "fastgrpo_packed"
# Arguments of attention layers that no implementation here knows.
REFUSED = {
    "position_bias": "position biases",
    "indices": "sparse keys",
    "block_indices": "sparse keys",
}


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
    fp8_cache: bool = False,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each run over its keys, for B = 1 row, H query heads and G <= H key/value heads.

    The last query of a run sees all of its keys, the one before it all but one, and so on; with a `sliding_window` the
    newest of these only. `softcap` bounds the scaled scores s to softcap * tanh(s / softcap). `s_aux` are the heads'
    sinks (gpt-oss; arXiv 2309.17453), [H]: the score of one key more that each query sees, whose value is 0. There is
    no dropout, as there is none in vLLM. flash-attn on a GPU where installed (3 on Hopper, else 2), else torch's own
    varlen attention; one call per run on CPU, and in fp32, which none of them knows. `fp8_cache`: keys and values as
    vLLM's FP8 cache keeps them. Values may be narrower than keys (latent attention).
    Returns (output_BTHD, None), as wide as the values. Raises UserError naming what a model asks for beyond that.
    """
    _refuse(others)
    query_THD, key_UGD, value_UGD = (x.squeeze(0).transpose(0, 1) for x in (query_BHTD, key_BGTD, value_BGTD))
    if fp8_cache:
        key_UGD, value_UGD = _kept_in_fp8(key_UGD), _kept_in_fp8(value_UGD)
    if key_index_U is not None:
        key_UGD, value_UGD = Repeated.apply(key_UGD, key_index_U), Repeated.apply(value_UGD, key_index_U)
    narrow = value_UGD.shape[-1]
    if narrow < key_UGD.shape[-1]:
        # Columns of zeros come out as such. A GPU's functions take one width alone, and torch on a CPU has for two
        # another function, which keeps all scores.
        value_UGD = functional.pad(value_UGD, (0, key_UGD.shape[-1] - narrow))
    heads, boundaries = (query_THD, key_UGD, value_UGD), (cu_seq_lens_q, cu_seq_lens_k)
    scores = Scores(scaling or query_THD.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    if not query_BHTD.is_cuda or query_BHTD.dtype == torch.float32:
        output_THD = _run_by_run(*heads, *boundaries, scores)
    elif (flash := _flash_attention(query_BHTD.device)) is not None:
        output_THD = _flash(flash, *heads, (*boundaries, max_length_q, max_length_k), scores)
    else:
        output_THD = _torch_varlen(*heads, (*boundaries, max_length_q, max_length_k), scores)
    return output_THD[..., :narrow].unsqueeze(0), None


def _kept_in_fp8(x: Tensor) -> Tensor:
    """What vLLM's cache keeps of it: e4m3 at scale 1, the nearest on a GPU; its CPU kernels (0.32) cut off the rest."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    kept = x.clamp(-limit, limit).to(torch.float8_e4m3fn)
    if not x.is_cuda:
        # The pattern before is the next one towards 0, with either sign.
        kept.view(torch.uint8).sub_((kept.to(x.dtype).abs() > x.abs()).to(torch.uint8))
    return kept.to(x.dtype)


class Scores(NamedTuple):
    """What becomes of the products of queries and keys, and how many of the newest keys count; None = no bound."""

    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks_H: Tensor | None = None

    @property
    def window(self) -> tuple[int, int]:
        """Keys before and after a query's own that it may see; -1 = all of them."""
        return (-1 if self.sliding_window is None else self.sliding_window - 1), 0

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Which of its run's keys each query sees, bool [Q, K]."""
        mask_QK = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return mask_QK if self.sliding_window is None else mask_QK.triu(keys - queries - self.sliding_window + 1)


def _flash_attention(device: torch.device) -> Any:
    """flash-attn's function for packed sequences on this GPU, None where none is installed."""
    if flash_attn_3_varlen_func is not None and is_hopper(device):
        return flash_attn_3_varlen_func
    return flash_attn_varlen_func


def _refuse(others: dict[str, Any]) -> None:
    """Raise UserError where one of a layer's further arguments would change the result."""
    asked = [name for name in REFUSED if others.get(name) is not None]
    if others.get("is_causal") is False:
        asked.append("is_causal")
    if asked:
        raise UserError(
            f"the model's attention needs {', '.join(REFUSED.get(n, 'to see later tokens') for n in asked)}"
        )


class Repeated(torch.autograd.Function):
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
    query_THD: Tensor, key_UGD: Tensor, value_UGD: Tensor, cu_queries_S: Tensor, cu_keys_S: Tensor, scores: Scores
) -> Tensor:
    lengths = cu_queries_S.diff().tolist(), cu_keys_S.diff().tolist()
    # `split` has one concatenation as its backward; slicing would have a zero tensor of T tokens for each run.
    parts = zip(
        *(x.transpose(0, 1).split(n, dim=1) for x, n in ((query_THD, lengths[0]), (key_UGD, lengths[1]))),
        value_UGD.transpose(0, 1).split(lengths[1], dim=1),
        strict=True,
    )
    outputs = [_one_run(query_HQD, key_GKD, value_GKD, scores) for query_HQD, key_GKD, value_GKD in parts]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _one_run(query_HQD: Tensor, key_GKD: Tensor, value_GKD: Tensor, scores: Scores) -> Tensor:
    queries, keys = query_HQD.shape[1], key_GKD.shape[1]
    if scores.softcap is not None or scores.sinks_H is not None:
        return _by_scores(query_HQD, key_GKD, value_GKD, scores)
    windowed = scores.sliding_window is not None and keys > scores.sliding_window
    mask_QK = scores.mask(queries, keys, query_HQD.device) if windowed or queries < keys else None
    output_1HQD = functional.scaled_dot_product_attention(
        query_HQD[None],
        key_GKD[None],
        value_GKD[None],
        attn_mask=mask_QK,
        is_causal=mask_QK is None,
        scale=scores.scale,
        enable_gqa=len(query_HQD) != len(key_GKD),
    )
    return output_1HQD[0]


def _by_scores(query_HQD: Tensor, key_GKD: Tensor, value_GKD: Tensor, scores: Scores) -> Tensor:
    """Attention with what torch's fused one does not know, Gemma 2's soft cap and gpt-oss's sinks; keeps all scores."""
    copies = len(query_HQD) // len(key_GKD)
    key_HKD, value_HKD = key_GKD.repeat_interleave(copies, 0), value_GKD.repeat_interleave(copies, 0)
    scores_HQK = (query_HQD @ key_HKD.mT).float() * scores.scale
    if scores.softcap is not None:
        scores_HQK = scores.softcap * torch.tanh(scores_HQK / scores.softcap)
    hidden_QK = ~scores.mask(query_HQD.shape[1], key_HKD.shape[1], query_HQD.device)
    scores_HQK = scores_HQK.masked_fill(hidden_QK, -torch.inf)
    if scores.sinks_H is None:
        share_HQK = scores_HQK.softmax(-1)
    else:
        sinks_HQ1 = scores.sinks_H.float()[:, None, None].expand(-1, scores_HQK.shape[1], 1)
        share_HQK = torch.cat([scores_HQK, sinks_HQ1], -1).softmax(-1)[..., :-1]
    return share_HQK.to(value_HKD.dtype) @ value_HKD


class Sunk(torch.autograd.Function):
    """Attention with sinks of the same without, `output_THD`, and of the logs of its sums of exponentials, `lse_HT`.

    A sink adds exp(sink) to each query's sum: lse' = log(exp(lse) + exp(sink)), output' = output * exp(lse - lse'). The
    backward of flash attention computes the shares of keys as exp(score - lse) of the lse that it kept, and subtracts
    output . gradient of the output that it kept. Of lse' and output' these are the shares beside the sink, and exactly
    their gradients. So both are written in place of what it kept, through `data`, of which autograd takes no note.
    The sink itself gets what a key with the value 0 does: minus its share times output' . gradient.
    """

    @staticmethod
    def forward(ctx: Any, output_THD: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> Tensor:
        assert lse_HT.shape == output_THD.shape[1::-1], "of one row of sequences"
        with_sink_HT = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype)[:, None])
        output_THD.data.mul_((lse_HT - with_sink_HT).exp_().T[..., None])
        lse_HT.data.copy_(with_sink_HT)
        ctx.save_for_backward(output_THD, lse_HT, sinks_H)
        return output_THD.view_as(output_THD)

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor, None, Tensor]:
        output_THD, lse_HT, sinks_H = ctx.saved_tensors
        share_HT = (sinks_H.to(lse_HT.dtype)[:, None] - lse_HT).exp_()
        along_HT = (output_THD.float() * grad_THD.float()).sum(-1).T
        return grad_THD, None, -(share_HT * along_HT).sum(-1).to(sinks_H.dtype)


def _flash(
    function: Any,
    query_THD: Tensor,
    key_UGD: Tensor,
    value_UGD: Tensor,
    boundaries: tuple[Tensor, Tensor, int, int],
    scores: Scores,
) -> Tensor:
    """flash-attn's `function`, 2 or 3."""
    options: dict[str, Any] = {"softmax_scale": scores.scale, "causal": True, "window_size": scores.window}
    if scores.sinks_H is not None and "return_attn_probs" in inspect.signature(function).parameters:
        options["return_attn_probs"] = True
    found: Any = function(query_THD, key_UGD, value_UGD, *boundaries, softcap=scores.softcap or 0.0, **options)
    if scores.sinks_H is not None:
        return Sunk.apply(found[0], found[1], scores.sinks_H)
    # flash-attn 3 returned the sums of exponentials, too, in its first versions.
    return found[0] if isinstance(found, tuple) else found


def _torch_varlen(
    query_THD: Tensor, key_UGD: Tensor, value_UGD: Tensor, boundaries: tuple[Tensor, Tensor, int, int], scores: Scores
) -> Tensor:
    """torch's own varlen attention, in the words of torch 2.10 (no scale, `is_causal`) to 2.13 (`enable_gqa`).

    Raises UserError for a soft cap, and in torch 2.10 for a sliding window.
    """
    if scores.softcap is not None or (scores.sliding_window is not None and "window_size" not in VARLEN_OPTIONS):
        kind = "soft-capped attention" if scores.softcap is not None else "attention in a sliding window"
        raise UserError(f"the model's {kind} needs flash-attn on a GPU: pip install 'fastgrpo[flash]'")
    options: dict[str, Any] = {"window_size": scores.window} if "window_size" in VARLEN_OPTIONS else {"is_causal": True}
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = True
    if "scale" in VARLEN_OPTIONS:
        options["scale"] = scores.scale
    else:
        query_THD = query_THD * (scores.scale * query_THD.shape[-1] ** 0.5)
    if scores.sinks_H is not None:
        options["return_aux"] = AuxRequest(lse=True)
        return Sunk.apply(*varlen_attn(query_THD, key_UGD, value_UGD, *boundaries, **options), scores.sinks_H)
    output_THD: Any = varlen_attn(query_THD, key_UGD, value_UGD, *boundaries, **options)
    return output_THD


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
