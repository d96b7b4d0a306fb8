"""Checks of the loss head's arguments: each failure is a ValueError that names the argument and what it got."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from fastgrpo.kernels.reference import KlEstimator, LossOptions, TokenInputs

DTYPES = (torch.float32, torch.bfloat16)


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raises ValueError "name: expected ..., got ..." unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def head_arguments(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk: int | None,
) -> None:
    """Shapes, dtypes, devices and constants that both heads share; values of the targets are checked in the op."""
    _refuse_module(weight_VH)
    require(hidden_NH.dim() == 2, "hidden_NH", "2 dimensions [N, H]", tuple(hidden_NH.shape))
    require(hidden_NH.dtype in DTYPES, "hidden_NH", "float32 or bfloat16", hidden_NH.dtype)
    require(hidden_NH.device.type in ("cpu", "cuda"), "hidden_NH", "a CPU or CUDA tensor", hidden_NH.device)
    require(weight_VH.dim() == 2, "weight_VH", "2 dimensions [V, H]", tuple(weight_VH.shape))
    require(weight_VH.shape[1] == hidden_NH.shape[1], "weight_VH", f"H = {hidden_NH.shape[1]}", tuple(weight_VH.shape))
    require(weight_VH.shape[0] > 0, "weight_VH", "at least one token in V", tuple(weight_VH.shape))
    _same(weight_VH, hidden_NH, "weight_VH")
    require(targets_N.dtype == torch.int64, "targets_N", "int64", targets_N.dtype)
    _same_rows(targets_N, hidden_NH, "targets_N")
    if bias_V is not None:
        require(bias_V.shape == weight_VH.shape[:1], "bias", f"shape [{len(weight_VH)}]", tuple(bias_V.shape))
        _same(bias_V, hidden_NH, "bias")
    require(math.isfinite(temperature) and temperature > 0, "temperature", "a positive number", temperature)
    require(
        softcap is None or (math.isfinite(softcap) and softcap > 0), "softcap", "None or a positive number", softcap
    )
    require(chunk is None or chunk > 0, "chunk", "None or a positive number of rows", chunk)


def loss_arguments(hidden_NH: Tensor, tokens: TokenInputs, options: LossOptions) -> None:
    """Arguments of the policy loss."""
    for name, field_N in tokens._asdict().items():
        if field_N is not None:
            require(field_N.dtype == torch.float32, name, "float32", field_N.dtype)
            _same_rows(field_N, hidden_NH, name)
    ratio, kl_weight, cap = options.ratio, options.kl_weight, options.tis_cap
    require(ratio in ("token", "sequence", "cispo"), "ratio", "'token', 'sequence' or 'cispo'", repr(ratio))
    require(0 <= options.clip_low <= 1, "clip_low", "a number in [0, 1]", options.clip_low)
    require(options.clip_high >= 0, "clip_high", "a number of at least 0", options.clip_high)
    dual = options.clip_dual
    require(dual is None or dual > 1, "clip_dual", "None or a number above 1", dual)
    require(math.isfinite(kl_weight) and kl_weight >= 0, "kl_weight", "a number of at least 0", kl_weight)
    kinds = "'k1', 'k2', 'k3' or 'unbiased'"
    require(options.kl_estimator in get_args(KlEstimator), "kl_estimator", kinds, repr(options.kl_estimator))
    require(kl_weight == 0 or tokens.ref_logprobs_N is not None, "ref_logprobs_N", "a tensor as kl_weight > 0", None)
    require(cap is None or cap > 0, "tis_cap", "None or a positive number", cap)
    require(
        cap is None or tokens.sampled_logprobs_N is not None, "sampled_logprobs_N", "a tensor as tis_cap is set", None
    )
    bonus = options.entropy_weight
    require(math.isfinite(bonus) and bonus >= 0, "entropy_weight", "a number of at least 0", bonus)
    on_policy = tokens.old_logprobs_N is None
    require(
        ratio != "sequence" or on_policy or tokens.sequence_log_ratio_N is not None,
        "sequence_log_ratio_N",
        "each token's sequence log ratio from a first pass, as ratio is 'sequence' and old_logprobs_N is given",
        None,
    )


def target_range(lowest: float, highest: float, vocabulary: int) -> None:
    """Targets index the vocabulary."""
    masked = "leave out tokens that do not count, in linear_grpo_loss by a weight of 0"
    got = f"{int(lowest)}: {masked}" if lowest < 0 else int(highest)
    require(lowest >= 0 and highest < vocabulary, "targets_N", f"token ids in [0, {vocabulary})", got)


def _refuse_module(weight_VH: object) -> None:
    if not isinstance(weight_VH, nn.Module):
        return
    if any("lora_" in name for name, _ in weight_VH.named_parameters()):
        raise ValueError("weight_VH: got a head with LoRA adapters; adapt other layers, or merge the adapter first")
    raise ValueError(f"weight_VH: expected the head's weight tensor, got the module {type(weight_VH).__name__}")


def _same(tensor: Tensor, hidden_NH: Tensor, name: str) -> None:
    require(tensor.dtype == hidden_NH.dtype, name, f"hidden_NH's dtype {hidden_NH.dtype}", tensor.dtype)
    require(tensor.device == hidden_NH.device, name, f"hidden_NH's device {hidden_NH.device}", tensor.device)


def _same_rows(tensor: Tensor, hidden_NH: Tensor, name: str) -> None:
    require(tensor.shape == hidden_NH.shape[:1], name, f"shape [{hidden_NH.shape[0]}]", tuple(tensor.shape))
    require(tensor.device == hidden_NH.device, name, f"hidden_NH's device {hidden_NH.device}", tensor.device)
