"""Floating-point operations by the formula, the GPU's readings by a driver that is played here."""

import time
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastgrpo.record import gpu as telemetry
from fastgrpo.record.gpu import GpuMonitor, peak_flops, throughput, training_flops
from fastgrpo.record.log import RunLog
from fastgrpo.training.packing import pack
from fastgrpo.types import Sample

SAMPLES = [Sample([1] * 10, [0] * 6 + [1] * 4, [0.0] * 10), Sample([2] * 3, [0, 1, 1], [0.0] * 3)]


def tiny(*, tied: bool) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_count_the_head_for_loss_tokens_only_and_no_embedding(tied: bool) -> None:
    model = tiny(tied=tied)
    layers = sum(parameter.numel() for name, parameter in model.named_parameters() if "layers" in name) + 8
    batches = pack(SAMPLES, [1.0, 1.0], 10, "cpu")
    attention = 6 * 2 * 8 * (10**2 + 3**2)
    assert training_flops(model, batches) == 6 * layers * 13 + 6 * 50 * 8 * (4 + 2) + attention
    model.requires_grad_(False)
    assert training_flops(model, batches) == 4 * layers * 13 + 4 * 50 * 8 * (4 + 2) + attention


def test_a_prompt_that_is_shared_counts_once() -> None:
    model = tiny(tied=True)
    shared, apart = (pack([SAMPLES[0], other], [1.0, 1.0], 20, "cpu") for other in (SAMPLES[0], sample_of(3)))
    layers = sum(parameter.numel() for name, parameter in model.named_parameters() if "layers" in name) + 8
    saved = 6 * layers * 6 + 12 * 2 * 8 * 6 * 3
    assert training_flops(model, apart) - training_flops(model, shared) == saved


def sample_of(token: int) -> Sample:
    return Sample([token] * 10, [0] * 6 + [1] * 4, [0.0] * 10)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_by_the_devices_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak


def test_mfu_is_left_out_where_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert throughput(13, 1e6, 2.0, cpu) == {"train_tokens_per_s": 6.5}
    assert throughput(0, 0.0, 2.0, cpu) == {}
    monkeypatch.setattr(telemetry, "peak_flops", lambda device: 1e6)
    assert throughput(13, 1e6, 2.0, cpu)["mfu"] == 0.5


def test_the_gpu_is_read_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    watts = iter([100.0, 300.0] + [200.0] * 10**6)
    driver = {
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=50),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=3 * 2**30),
        "nvmlDeviceGetPowerUsage": lambda handle: next(watts) * 1000,
    }
    for name, answer in driver.items():
        monkeypatch.setattr(telemetry.pynvml, name, answer)
    monkeypatch.setattr(telemetry, "_nvml_handle", lambda: "gpu")
    monkeypatch.setattr(telemetry, "INTERVAL_S", 0.001)
    with GpuMonitor() as gpu:
        deadline = time.monotonic() + 20
        while next(watts) != 200.0 and time.monotonic() < deadline:
            time.sleep(0.01)
        readings = gpu.take()
    assert readings["gpu/utilisation"] == 0.5
    assert readings["gpu/memory_gib"] == 3.0
    assert 100 < readings["gpu/power_w"] < 300
    assert readings["gpu/joules"] > 0


def test_without_a_driver_nothing_is_said_but_the_other_ranks_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_nvml_handle", lambda: None)
    monkeypatch.setattr(telemetry, "over_ranks", lambda own, folds: own | {"met": 1.0})
    with GpuMonitor() as gpu:
        assert gpu.take() == {"met": 1.0}


def test_a_phase_tells_what_it_took_so_far() -> None:
    log = RunLog(None)
    with log.phase("train"):
        time.sleep(0.01)
    assert log.timer.spent("train") >= 0.01
    assert log.timer.spent("other phase") == 0.0
    assert log.timer.take()["train"] >= 0.01
    assert log.timer.spent("train") == 0.0
