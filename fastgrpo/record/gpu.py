"""How well the hardware is used: training's tokens per second and MFU, and what NVIDIA's driver says of the GPU."""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self

import pynvml
import torch
from torch import nn
from transformers import PreTrainedModel

from fastgrpo.ranks.collectives import over_ranks, rank_and_world
from fastgrpo.training.memory import head_width
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
INTERVAL_S = 0.2


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device in bf16, None where it is a CPU or not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def training_flops(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Floating-point operations of forward and backward of packed `batches`, a shared prompt once, nothing recomputed.

    6 a token and parameter (2 forward, 2 for each gradient; 4 where the parameter is frozen), the head's for loss
    tokens only, and causal attention: 12 x layers x width for each pair of a query and a key at or before it.
    """
    head = model.get_output_embeddings().weight
    apart = {id(head), id(model.get_input_embeddings().weight)}
    layers = sum(_cost(parameter) for parameter in model.parameters() if id(parameter) not in apart)
    tokens = sum(len(batch.input_ids_T) for batch in batches)
    loss_tokens = sum(len(batch.targets_N) for batch in batches)
    attention = 12 * model.config.num_hidden_layers * head_width(model.config) * sum(map(_pairs, batches))
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


class Reading(NamedTuple):
    """One look at a GPU: share of time busy, bytes in use of the whole device, watts."""

    utilisation: float
    memory: float
    power: float


class GpuMonitor:
    """This process's GPU, read by a thread while the block runs; without an NVIDIA driver it has nothing to say."""

    def __init__(self) -> None:
        self._handle = _nvml_handle()
        self._readings: list[Reading] = []
        self._since = time.perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-monitor", daemon=True)

    def __enter__(self) -> Self:
        if self._handle is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def take(self) -> dict[str, float]:
        """What was read since the last call, over all ranks that have a GPU (collective); {} where none has.

        `gpu/utilisation` and `gpu/power_w`: means over time and GPUs; `gpu/memory_gib`: the fullest GPU's peak;
        `gpu/joules`: energy of all GPUs.
        """
        own = {} if self._handle is None else self._own()
        return over_ranks(own, {"gpu/memory_gib": max, "gpu/joules": sum})

    def _own(self) -> dict[str, float]:
        readings, self._readings = self._readings or [self._read()], []
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        power = statistics.fmean(reading.power for reading in readings)
        return {
            "gpu/utilisation": statistics.fmean(reading.utilisation for reading in readings),
            "gpu/memory_gib": max(reading.memory for reading in readings) / 2**30,
            "gpu/power_w": power,
            "gpu/joules": power * seconds,
        }

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self._readings.append(self._read())

    def _read(self) -> Reading:
        """A value that this driver or device does not give is NaN."""
        reading = [float("nan")] * 3
        questions = (
            lambda: pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100,
            lambda: float(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used),
            lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
        )
        for number, question in enumerate(questions):
            with suppress(pynvml.NVMLError):
                reading[number] = question()
        return Reading(*reading)


def _nvml_handle() -> Any:
    """NVML's handle of torch's current device, None where there is none."""
    if not torch.cuda.is_available():
        return None
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    return None
