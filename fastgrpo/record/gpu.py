"""What NVIDIA's driver says of the GPU while a step runs."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple, Self

import pynvml
import torch

from fastgrpo.ranks.collectives import over_ranks

INTERVAL_S = 0.2


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
        if self._handle is not None:
            self._thread.join(INTERVAL_S)

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
        """One reading; a value that this driver or device does not give is NaN."""
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
