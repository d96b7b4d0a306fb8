"""Floating-point operations by the formula, and MFU."""

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fastgrpo.training import flops
from fastgrpo.training.flops import peak_flops, throughput, training_flops
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


def test_of_a_mixture_the_chosen_experts_count() -> None:
    shape = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 1}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts))
    names = dict(model.named_parameters())
    others = sum(p.numel() for name, p in names.items() if "layers" in name and ".experts." not in name) + 8
    batches = pack(SAMPLES, [1.0, 1.0], 10, "cpu")
    expected = 6 * (others + 2 * 2 * 3 * 8 * 16) * 13 + 6 * 50 * 8 * (4 + 2) + 6 * 2 * 8 * (10**2 + 3**2)
    assert training_flops(model, batches) == expected


def test_latent_attention_has_keys_and_values_of_widths_of_their_own() -> None:
    shape = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": None}
    widths = {"kv_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4}
    dense = {"first_k_dense_replace": 2, "num_experts_per_tok": 1, "intermediate_size": 12}
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**shape, **widths, **dense, tie_word_embeddings=True))
    layers = sum(parameter.numel() for name, parameter in model.named_parameters() if "layers" in name) + 8
    batches = pack(SAMPLES, [1.0, 1.0], 10, "cpu")
    # Halves of the squares: a query sees the keys before it.
    attention = 6 * 2 * 2 * (5 + 4) * (10**2 + 3**2) / 2
    assert training_flops(model, batches) == 6 * layers * 13 + 6 * 50 * 8 * (4 + 2) + attention


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
    monkeypatch.setattr(flops, "peak_flops", lambda device: 1e6)
    assert throughput(13, 1e6, 2.0, cpu)["mfu"] == 0.5
