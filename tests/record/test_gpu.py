"""The GPU's readings by a driver that is played here."""

import time
from types import SimpleNamespace

import pytest

from fastgrpo.record import gpu as module
from fastgrpo.record.gpu import GpuMonitor
from fastgrpo.record.log import RunLog


def test_the_gpu_is_read_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    watts = iter([100.0, 300.0] + [200.0] * 10**6)
    driver = {
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=50),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=3 * 2**30),
        "nvmlDeviceGetPowerUsage": lambda handle: next(watts) * 1000,
    }
    for name, answer in driver.items():
        monkeypatch.setattr(module.pynvml, name, answer)
    monkeypatch.setattr(module, "_nvml_handle", lambda: "gpu")
    monkeypatch.setattr(module, "INTERVAL_S", 0.001)
    with GpuMonitor() as monitor:
        deadline = time.monotonic() + 20
        while next(watts) != 200.0 and time.monotonic() < deadline:
            time.sleep(0.01)
        readings = monitor.take()
    assert readings["gpu/utilisation"] == 0.5
    assert readings["gpu/memory_gib"] == 3.0
    assert 100 < readings["gpu/power_w"] < 300
    assert readings["gpu/joules"] > 0


def test_without_a_driver_nothing_is_said_but_the_other_ranks_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_nvml_handle", lambda: None)
    monkeypatch.setattr(module, "over_ranks", lambda own, folds: own | {"met": 1.0})
    with GpuMonitor() as monitor:
        assert monitor.take() == {"met": 1.0}


def test_a_phase_tells_what_it_took_so_far() -> None:
    log = RunLog(None)
    with log.phase("train"):
        time.sleep(0.01)
    assert log.timer.spent("train") >= 0.01
    assert log.timer.spent("other phase") == 0.0
    assert log.timer.take()["train"] >= 0.01
    assert log.timer.spent("train") == 0.0
