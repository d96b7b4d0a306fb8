"""Floating-point operations of training, and MFU: how near they come to the device's peak."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from fastgrpo.policy.experts import is_of_experts
from fastgrpo.ranks.collectives import rank_and_world
from fastgrpo.training.model_sizes import attention_layers, head_width, value_width
from fastgrpo.types import Batch

# Dense bf16 FLOP/s of the datasheets; the first name found as whole words in the device's name counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device in bf16, None where it is a CPU or not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def training_flops(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Floating-point operations of forward and backward of packed `batches`, a shared prompt once, nothing recomputed.

    6 a token and parameter (2 forward, 2 for each gradient; 4 where the parameter is frozen), of a mixture's experts
    those chosen, the head's for loss tokens only, and causal attention: 6 x layers x (width of the keys + width of the
    values) for each pair of a query and a key at or before it.
    """
    head = model.get_output_embeddings().weight
    apart = {id(head), id(model.get_input_embeddings().weight)}
    inner = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    experts = sum(_cost(parameter) / len(parameter) for parameter in inner if is_of_experts(parameter))
    layers = experts * getattr(model.config, "num_experts_per_tok", 0)
    layers += sum(_cost(parameter) for parameter in inner if not is_of_experts(parameter))
    tokens = sum(len(batch.input_ids_T) for batch in batches)
    loss_tokens = sum(len(batch.targets_N) for batch in batches)
    widths = head_width(model.config) + value_width(model.config)
    attention = 6 * attention_layers(model.config) * widths * sum(map(_pairs, batches))
    return layers * tokens + _cost(head) * loss_tokens + attention


def throughput(tokens: int, flop: float, seconds: float, device: torch.device) -> dict[str, float]:
    """`train_tokens_per_s` of all ranks together, and `mfu` where the device's peak is known.

    `tokens` of the step's sequences and `flop` operations of all ranks took `seconds` of forward and backward.
    """
    if not tokens or seconds <= 0:
        return {}
    peak = peak_flops(device)
    mfu = {} if peak is None else {"mfu": flop / seconds / peak / rank_and_world()[1]}
    return {"train_tokens_per_s": tokens / seconds} | mfu


def _pairs(batch: Batch) -> float:
    queries_S, keys_S = batch.runs.cu_queries_S.diff().double(), batch.runs.cu_keys_S.diff().double()
    return float((queries_S * (keys_S - queries_S / 2)).sum())


def _cost(parameter: nn.Parameter) -> int:
    return parameter.numel() * (6 if parameter.requires_grad else 4)
