from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    Gemma2Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    NemotronHConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.kernels import delta_rule
from fastgrpo.kernels import mamba2 as mamba2_module
from fastgrpo.kernels.delta_rule import gated_delta_rule
from fastgrpo.kernels.experts import ROWS
from fastgrpo.kernels.mamba2 import mamba2
from fastgrpo.policy.fused_layers import fuse_experts, recompute_mlps, restore_layers
from fastgrpo.policy.layer_kinds import SIMILAR
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.policy.recurrent import recur_within_runs, rows_of
from fastgrpo.training import memory, model_sizes, workload
from fastgrpo.training.memory import GIB, Workload, device_capacity, plan_memory
from fastgrpo.training.model_sizes import (
    Layers,
    Recurrent,
    activation_bytes_per_token,
    attention_layers,
    count_parameters,
    head_width,
    kv_bytes_per_token,
    mlp_working,
    state_bytes,
    value_width,
)
from fastgrpo.types import Runs
from tests.helpers.tiny_model import DELTA_RULE, GRANITE_H, MIXTURES, NEMOTRON_H, save_tiny_model

QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
WORKLOAD = Workload(micro_batch_tokens=16384, max_num_seqs=512, max_model_len=1536, gradient_checkpointing=True)


def test_known_sizes() -> None:
    assert count_parameters(QWEN_7B) == 7_615_616_512
    assert kv_bytes_per_token(QWEN_7B, torch.bfloat16) == 2 * 28 * 4 * 128 * 2
    llama = LlamaConfig(num_attention_heads=32, num_key_value_heads=8, head_dim=64, num_hidden_layers=16)
    assert kv_bytes_per_token(llama, torch.bfloat16) == 2 * 16 * 8 * 64 * 2


def test_seven_billion_fit_on_eight_gpus_and_not_on_one() -> None:
    plan = plan_memory(QWEN_7B, replace(WORKLOAD, ranks=8), 80 * 10**9)
    plan.check()
    with pytest.raises(UserError, match=r"needs .* GiB and 74\.5 GiB are free; the largest item is master weights"):
        plan_memory(QWEN_7B, WORKLOAD, 80 * 10**9).check()


def test_seven_billion_fit_on_one_with_the_optimizer_on_the_host() -> None:
    with pytest.raises(UserError, match=r"set model\.offload_optimizer, or train on more GPUs"):
        plan_memory(QWEN_7B, WORKLOAD, 80 * 10**9).check()
    plan = plan_memory(QWEN_7B, replace(WORKLOAD, offload_optimizer=True), 80 * 10**9)
    plan.check()
    sizes = {item.name: item.size for item in plan.items}
    assert sizes["master weights, Adam moments"] == 12 * 2**25


def test_kv_cache_is_all_that_is_wanted_or_all_that_is_left() -> None:
    roomy = plan_memory(QWEN_7B, replace(WORKLOAD, ranks=8), 140 * GIB)
    assert roomy.kv_cache_gib * GIB == 512 * 1536 * kv_bytes_per_token(QWEN_7B, torch.bfloat16)
    tight = plan_memory(QWEN_7B, replace(WORKLOAD, ranks=8), 50 * GIB)
    assert tight.kv_cache_gib < roomy.kv_cache_gib
    assert tight.generating == pytest.approx(50 * GIB, rel=1e-6)
    tight.check()
    assert plan_memory(QWEN_7B, replace(WORKLOAD, kv_cache_gib=3.5), 50 * GIB).kv_cache_gib == 3.5


def test_memory_that_is_left_takes_whole_gradients_and_an_engine_that_stays_awake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = count_parameters(QWEN_7B)
    # Counted anew for each plan they take nearly all of its time.
    monkeypatch.setattr(memory, "count_parameters", lambda _: parameters)
    workload = replace(WORKLOAD, ranks=8, kv_cache_gib=4.0)
    plans = {}
    for capacity in range(50, 140):
        plan = plan_memory(QWEN_7B, workload, capacity * GIB)
        plan.check()
        plans.setdefault((plan.engine_sleeps, plan.whole_gradients), plan)
        assert (plan.kv_cache_gib, plan.micro_batch_tokens) == (4.0, 16384)
    # From the least memory to the most: an awake engine takes less than whole gradients, which gain more.
    assert list(plans) == [(True, False), (False, False), (True, True), (False, True)]
    items = {key: {item.name: item for item in plan.items} for key, plan in plans.items()}
    sums, newest = items[False, True]["whole gradients"].size, parameters * 2 // 10
    assert sums == 4 * parameters + newest
    assert items[True, False]["gradients"].size == parameters // 2 + 3 * 2**25 * 4
    for name in ("KV cache", "vLLM's logits and activations"):
        assert [items[key][name].training for key in plans] == [False, True, False, True]


def test_what_memory_is_left_for_depends_on_what_there_is() -> None:
    def found(**change: Any) -> tuple[bool, bool]:
        plan = plan_memory(QWEN_7B, replace(WORKLOAD, kv_cache_gib=4.0, **change), 400 * GIB)
        return plan.engine_sleeps, plan.whole_gradients

    assert found() == (False, False), "one rank's gradients are whole anyway"
    assert found(ranks=8, tensor_parallel=2) == (False, False), "FSDP2 shards them"
    assert found(ranks=8, overlapped=True) == (False, True)
    assert found(ranks=8, on_gpu=False) == (True, True), "there is nothing to free on a CPU"


def test_an_fp8_cache_is_half_of_a_bf16_one_or_holds_twice_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    half = replace(WORKLOAD, ranks=8, kv_dtype=torch.float8_e4m3fn)
    wide, narrow = (plan_memory(QWEN_7B, asked, 140 * GIB) for asked in (replace(WORKLOAD, ranks=8), half))
    assert narrow.kv_cache_gib == wide.kv_cache_gib / 2
    assert wide.generating - narrow.generating == narrow.kv_cache_gib * GIB
    assert wide.training - narrow.training == narrow.kv_cache_gib * GIB, "all fits at once"
    beside = replace(half, overlapped=True, group_tokens=6000)
    assert plan_memory(QWEN_7B, beside, 66 * GIB).micro_batch_tokens > 6000
    assert asked_for({"engine.kv_cache_dtype": "fp8"}, monkeypatch).kv_dtype == torch.float8_e4m3fn
    assert asked_for({}, monkeypatch).kv_dtype is None


def asked_for(keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Workload:
    """The workload that a configuration of `keys` is."""
    found: list[Workload] = []
    monkeypatch.setattr(workload, "check_kv_cache", lambda config: None)
    monkeypatch.setattr(workload, "plan_memory", lambda model, asked, capacity: found.append(asked) or Mock())
    workload.memory_plan(resolve(keys), QWEN_7B)
    return found[0]


def test_a_kv_cache_beside_training_leaves_room_for_one_group_a_micro_batch() -> None:
    workload = replace(WORKLOAD, ranks=8, group_tokens=6000)
    apart, beside = (plan_memory(QWEN_7B, replace(workload, overlapped=value), 64 * GIB) for value in (False, True))
    assert (apart.micro_batch_tokens, beside.micro_batch_tokens) == (16384, 6000)
    assert beside.kv_cache_gib < apart.kv_cache_gib
    assert beside.training == pytest.approx(64 * GIB, rel=1e-6)
    beside.check()
    roomy = plan_memory(QWEN_7B, replace(workload, overlapped=True), 140 * GIB)
    assert roomy.micro_batch_tokens == 16384
    assert roomy.kv_cache_gib * GIB == 512 * 1536 * kv_bytes_per_token(QWEN_7B, torch.bfloat16)
    undivided = plan_memory(QWEN_7B, replace(workload, group_tokens=20_000, overlapped=True), 64 * GIB)
    assert undivided.micro_batch_tokens == 16384
    tight = plan_memory(QWEN_7B, replace(workload, overlapped=True, kv_cache_gib=8.0), 52 * GIB)
    assert tight.micro_batch_tokens < 16384
    tight.check()


def test_what_vllm_computes_with_is_beside_training_only_where_both_overlap() -> None:
    name = "vLLM's logits and activations"
    apart, beside, on_cpu = (
        {item.name: item for item in plan_memory(QWEN_7B, replace(WORKLOAD, **change), 140 * GIB).items}
        for change in ({}, {"overlapped": True}, {"on_gpu": False, "kv_cache_gib": 1.0})
    )
    logits, widest = 12 * 512 * 152064 * 4, (3 * 18944 + 4 * 3584) * 2
    assert apart[name].size == logits + 8192 * widest
    assert (apart[name].generating, apart[name].training, beside[name].training) == (True, False, True)
    assert name not in on_cpu


def test_lora_needs_state_for_its_adapters_alone() -> None:
    sizes = {item.name: item.size for item in plan_memory(QWEN_7B, replace(WORKLOAD, lora_rank=16), 140 * GIB).items}
    per_layer = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert sizes["master weights, Adam moments"] == 28 * 16 * per_layer * 12
    assert sizes["the trainer's frozen base"] == sizes["vLLM's merged weights"] == 2 * count_parameters(QWEN_7B)


def test_a_model_whose_weights_vllm_has_otherwise_is_there_twice() -> None:
    model = Gemma2Config()
    sizes = {item.name: item.size for item in plan_memory(model, WORKLOAD, 140 * GIB).items}
    assert sizes["the trainer's weights"] == sizes["vLLM's weights"] == 2 * count_parameters(model)
    assert "weights (vLLM's and the trainer's)" not in sizes


QWEN_30B_A3B = Qwen3MoeConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    tie_word_embeddings=False,
)


def test_a_mixture_has_memory_for_the_experts_of_each_token() -> None:
    assert count_parameters(QWEN_30B_A3B) == 30_532_122_624
    keeps, recomputes = (
        activation_bytes_per_token(QWEN_30B_A3B, torch.bfloat16, layers="fused", recompute_mlp=value)
        for value in (False, True)
    )
    # Gate and up of eight experts, in bf16.
    assert keeps - recomputes == 8 * 2 * 768 * 2
    workload = replace(WORKLOAD, layers="fused", ranks=8, tensor_parallel=4, micro_batch_tokens=8192)
    plan_memory(QWEN_30B_A3B, workload, 125 * GIB).check()
    on_host = replace(workload, ranks=4, tensor_parallel=1, offload_optimizer=True)
    plan_memory(QWEN_30B_A3B, on_host, 125 * GIB).check()
    with pytest.raises(UserError, match=r"set model\.offload_optimizer, or train on more"):
        plan_memory(QWEN_30B_A3B, replace(workload, ranks=1, tensor_parallel=1), 140 * GIB).check()
    # A layer's experts travel as one bucket each, in fp32.
    gradients, more = (
        next(item.size for item in plan_memory(QWEN_30B_A3B, case, GIB).items if item.name == "gradients")
        for case in (replace(workload, ranks=1, tensor_parallel=1), replace(workload, ranks=2, tensor_parallel=1))
    )
    assert gradients == count_parameters(QWEN_30B_A3B) * 4 + count_parameters(QWEN_30B_A3B) // 5
    assert more == count_parameters(QWEN_30B_A3B) * 2 + 3 * 4 * 128 * 2 * 768 * 2048
    for dense in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        some_dense = Qwen3MoeConfig(**QWEN_30B_A3B.to_dict() | {"intermediate_size": 8192} | dense)
        wider = activation_bytes_per_token(some_dense, torch.bfloat16, layers="fused", recompute_mlp=False)
        assert wider - keeps == 2 * (8192 - 8 * 768) * 2


def test_sharded_training_and_a_tensor_parallel_vllm_divide_what_they_can() -> None:
    workload = replace(WORKLOAD, ranks=8, tensor_parallel=2, kv_cache_gib=4.0, reference=True)
    sizes = {item.name: item.size for item in plan_memory(QWEN_7B, workload, 80 * 10**9).items}
    parameters, tables = count_parameters(QWEN_7B), 2 * 152064 * 3584
    assert sizes["vLLM's weights"] == parameters
    assert sizes["sharded master weights, Adam moments"] == 12 * parameters / 8
    assert sizes["sharded gradients"] == 4 * parameters / 8
    assert sizes["sharded reference policy"] == 2 * parameters / 8
    whole = tables + 2 * (parameters - tables) / 28
    assert sizes["gathered layers and head"] == pytest.approx(2 * whole, rel=1e-6)
    assert kv_bytes_per_token(QWEN_7B, torch.bfloat16, 2) == kv_bytes_per_token(QWEN_7B, torch.bfloat16) / 2
    assert kv_bytes_per_token(QWEN_7B, torch.bfloat16, 8) == kv_bytes_per_token(QWEN_7B, torch.bfloat16) / 4


def test_token_budget_shrinks_to_what_fits() -> None:
    workload = replace(WORKLOAD, ranks=8, gradient_checkpointing=False, kv_cache_gib=1.0)
    wide = plan_memory(QWEN_7B, workload, 200 * GIB)
    narrow = plan_memory(QWEN_7B, workload, 60 * GIB)
    assert wide.micro_batch_tokens == 16384
    assert 1536 <= narrow.micro_batch_tokens < 16384
    narrow.check()
    hopeless = plan_memory(QWEN_7B, replace(workload, ranks=512, max_model_len=16384), 40 * GIB)
    with pytest.raises(UserError, match=r"training needs .* set model.recompute_mlp or lower engine"):
        hopeless.check()


def test_without_a_gpu_micro_batches_shrink_beside_the_kv_cache() -> None:
    small = Qwen2Config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
    workload = replace(WORKLOAD, on_gpu=False, kv_cache_gib=1.0, dtype=torch.float32)
    workload = replace(workload, max_model_len=1024, gradient_checkpointing=False)
    need = {
        tokens: plan_memory(small, replace(workload, micro_batch_tokens=tokens), 2**60).training
        for tokens in (1024, 8192)
    }
    for capacity in range(need[1024], need[8192], (need[8192] - need[1024]) // 40):
        plan = plan_memory(small, workload, capacity)
        plan.check()
        assert 1024 <= plan.micro_batch_tokens <= 8192


def test_a_sequence_longer_than_a_micro_batch_is_planned_whole() -> None:
    """It is never cut, so that 32 k tokens need room for all of them, whatever the budget says."""
    long = replace(WORKLOAD, ranks=8, max_model_len=32768, micro_batch_tokens=16384, kv_cache_gib=4.0)
    same = replace(long, micro_batch_tokens=32768)
    planned, wider = (plan_memory(QWEN_7B, workload, 140 * GIB) for workload in (long, same))
    assert planned.micro_batch_tokens == 16384
    assert planned.training == wider.training
    assert any(item.name == "activations, 32768 tokens" for item in planned.items)
    with pytest.raises(UserError, match=r"training needs .* lower engine\.max_model_len"):
        plan_memory(QWEN_7B, replace(long, gradient_checkpointing=False), 140 * GIB).check()


def test_one_long_sequence_keeps_what_many_short_ones_do(tmp_path: Path) -> None:
    """Attention's scores are never stored: of 8 k tokens in a row each keeps what the plan says."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    policy = load_policy(save_tiny_model(tmp_path, **shape))
    assert kept_bytes(policy, 8192, 8192) == pytest.approx(kept_bytes(policy, 8192, 64), rel=0.02)


def kept_bytes(policy: Policy, tokens: int, length: int) -> int:
    """The bytes that forward saves for backward, parameters aside, in sequences of `length`."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    kept: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32), length
        hidden_TH = policy.forward(torch.arange(tokens) % 1000, torch.arange(tokens) % length, Runs(*bounds, *bounds))
    assert hidden_TH.shape == (tokens, policy.model.config.hidden_size)
    return sum(kept.values())


def test_table_names_every_item_and_the_sums() -> None:
    plan = plan_memory(QWEN_7B, replace(WORKLOAD, ranks=8, reference=True), 140 * GIB)
    lines = plan.table().splitlines()
    assert [line.split("  ")[0] for line in lines[1:-2]] == [item.name for item in plan.items]
    assert "reference policy" in plan.table()
    assert f"{plan.training / GIB:.2f}" in lines[-2]


# Mixtures whose configurations have names of their own for their sizes.
SIZED = {MIXTURES[name][0]: MIXTURES[name][1] for name in ("ernie4_5_moe", "minimax_m2", "mixtral")}


@pytest.mark.parametrize("kept", ["everything", "no mlp", "hidden states"])
@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        *((kind, layers) for kind in (Qwen2Config, Qwen3Config, Qwen3MoeConfig) for layers in ("fused", "plain")),
        (Qwen2MoeConfig, "plain"),
        (OlmoeConfig, "plain"),
        *((kind, "plain") for kind in SIZED),
    ],
)
def test_activations_are_what_autograd_keeps(tmp_path: Path, kept: str, kind, layers: Layers) -> None:
    """The bytes that forward saves for backward, parameters aside, against the plan's formula."""
    options = {"recompute_mlp": kept == "no mlp", "gradient_checkpointing": kept == "hidden states"}
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
    changes = {
        Qwen3MoeConfig: experts,
        Qwen2MoeConfig: experts | {"shared_expert_intermediate_size": 96},
        OlmoeConfig: experts | {"intermediate_size": 64, "tie_word_embeddings": False},
        **SIZED,
    }.get(kind, {})
    policy = load_policy(save_tiny_model(tmp_path, kind=kind, **{"head_dim": 32} | changes), **options)
    if layers == "plain":
        restore_layers(policy.model.base_model)
        fuse_experts(policy.model.base_model)
        if kept == "no mlp":
            recompute_mlps(policy.model.base_model)
    tokens, config = 512, policy.model.config
    layer = activation_bytes_per_token(config, torch.float32, layers=layers, recompute_mlp=options["recompute_mlp"])
    # A CPU's attention keeps its output sequence by sequence, too.
    twice = 4 * head_width(config)
    expected = config.num_hidden_layers * (4 * config.hidden_size if kept == "hidden states" else layer + twice)
    last_norm = 2 * 4 * config.hidden_size
    assert kept_bytes(policy, tokens, 64) / tokens == pytest.approx(expected + last_norm, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Qwen3_5TextConfig, DELTA_RULE),
        (GraniteMoeHybridConfig, GRANITE_H),
        MIXTURES["deepseek_v2"],
        MIXTURES["deepseek_v3"],
    ],
)
def test_other_layers_keep_no_more_than_is_planned(tmp_path: Path, kind, changes: dict[str, Any]) -> None:
    policy = load_policy(save_tiny_model(tmp_path, kind=kind, **changes))
    config = policy.model.config
    layer = activation_bytes_per_token(config, torch.float32, layers="plain", recompute_mlp=False)
    kept = kept_bytes(policy, 512, 256) / 512
    # As above a CPU's attention keeps its output twice; and there is the last norm.
    twice = attention_layers(config) * 4 * head_width(config)
    planned = config.num_hidden_layers * layer + twice + 2 * 4 * config.hidden_size
    # The plan has room for padding, which sequences of one length have none of.
    assert 0.6 < kept / planned < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_experts_of_gpt_oss_keep_what_is_planned(dtype: torch.dtype) -> None:
    """By themselves: on a CPU its attention keeps all scores."""
    kind, changes = MIXTURES["gpt_oss"]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = kind(**changes | sizes)
    mlp = AutoModelForCausalLM.from_config(config, dtype=dtype).model.layers[0].mlp
    fuse_experts(mlp)
    tokens = 8 * ROWS  # of which each has two choices
    x_TH = torch.randn(1, tokens, 128, dtype=dtype).requires_grad_()
    known, kept = {x.untyped_storage().data_ptr() for x in (x_TH, *mlp.parameters())}, dict[int, int]()

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output_TH = mlp(x_TH)[0]
    all_kept, less = (
        activation_bytes_per_token(config, dtype, layers="plain", recompute_mlp=less) for less in (False, True)
    )
    assert sum(kept.values()) / tokens == pytest.approx(all_kept - less, rel=0.05)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.autograd.grad(output_TH, x_TH, torch.ones_like(output_TH))
    planned = mlp_working(config, dtype, layers="plain", recompute_mlp=False)
    assert 0.7 < peak(profiled) / tokens / planned < 1.0


@pytest.mark.parametrize("name", ["dense", "gpt_oss"])
def test_an_mlp_that_is_computed_again_works_with_what_it_would_keep(name: str) -> None:
    kind, changes = MIXTURES.get(name, (LlamaConfig, {}))
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = kind(**changes | sizes)
    decoder = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model
    fuse_experts(decoder)
    recompute_mlps(decoder)
    mlp, tokens = decoder.layers[0].mlp, 8 * ROWS
    x_TH = torch.randn(1, tokens, 128, dtype=torch.bfloat16).requires_grad_()
    output = mlp(x_TH)
    output_TH = output[0] if isinstance(output, tuple) else output
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.autograd.grad(output_TH, [x_TH, *mlp.parameters()], torch.ones_like(output_TH))
    planned = mlp_working(config, torch.bfloat16, layers="plain", recompute_mlp=True)
    assert 0.7 < peak(profiled) / tokens / planned < 1.0
    # Held with the rest of its layer, where that is recomputed, too.
    asked = replace(WORKLOAD, on_gpu=False, micro_batch_tokens=2**20, max_model_len=2**20, recompute_mlp=True)
    items = {item.name: item.size for item in plan_memory(config, asked, 2**60).items}
    layer = activation_bytes_per_token(config, torch.bfloat16, layers="plain", recompute_mlp=True)
    assert items["loss head, or one layer recomputed"] == 2**20 * (layer + max(layer, planned))


@pytest.mark.parametrize("mlps", [1, 3])
def test_layers_that_are_an_mlp_alone_count_as_one(tmp_path: Path, mlps: int) -> None:
    """As Nemotron-H's, of which each layer is an MLP, attention or recurrent, after one norm."""
    kinds = ["mlp"] * mlps + ["attention"]
    changes = NEMOTRON_H | {"layers_block_type": kinds, "num_hidden_layers": len(kinds), "intermediate_size": 1024}
    policy = load_policy(save_tiny_model(tmp_path, kind=NemotronHConfig, **changes))
    config = policy.model.config
    layer = activation_bytes_per_token(config, torch.float32, layers="plain", recompute_mlp=False)
    # The plan has two norms for each layer. A CPU's attention keeps its output twice; and there is the last norm.
    norm = (4 + 2 * 4) * config.hidden_size
    planned = len(kinds) * (layer - norm) + 4 * head_width(config) + 2 * 4 * config.hidden_size
    assert kept_bytes(policy, 512, 256) / 512 == pytest.approx(planned, rel=0.1)


ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 128}
HEADS_OF_128 = (
    ONE_LAYER
    | {"layer_types": ["linear_attention"]}
    | {"linear_num_key_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
)
STATES_OF_128 = (
    ONE_LAYER
    | {"layer_types": ["mamba"]}
    | {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 4}
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "planned"),
    [
        (Qwen3_5TextConfig(**DELTA_RULE | HEADS_OF_128), model_sizes.DELTA_RULE),
        (GraniteMoeHybridConfig(**GRANITE_H | STATES_OF_128), model_sizes.MAMBA2),
    ],
    ids=["delta rule", "Mamba-2"],
)
@pytest.mark.parametrize("continuations", [0, 8])
def test_a_recurrent_layer_keeps_no_more_than_is_planned(
    config, planned: Recurrent, dtype: torch.dtype, continuations: int
) -> None:
    """Of layers with heads as Qwen's and states as Granite's: all that autograd saves.

    For rows that continue a prompt, each with a state and some of the prompt's tokens, the plan has padding's share.
    """
    layer = AutoModelForCausalLM.from_config(config, dtype=dtype).model.layers[0]
    layer = layer.linear_attn if planned is model_sizes.DELTA_RULE else layer.mamba
    recur_within_runs(layer)
    tokens = 256 + 64 * continuations
    x_TH = torch.randn(1, tokens, 128, dtype=dtype).requires_grad_()
    prompt, *others = torch.arange(tokens).split([256] + [64] * continuations)
    keys = [prompt, *(torch.cat([prompt, own]) for own in others)]
    cu_queries, cu_keys = (torch.tensor([0, *map(len, runs)]).cumsum(0).int() for runs in ([prompt, *others], keys))
    runs = Runs(cu_queries, 256, cu_keys, len(keys[-1]), torch.cat(keys) if others else None)
    rows, known = rows_of(runs, 3), {weight.data_ptr() for weight in layer.parameters()}
    kept: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        layer(x_TH, rows=rows)
    bar = planned.kept[dtype.itemsize] / (SIMILAR if others else 1)
    assert 0.7 * bar < sum(kept.values()) / (tokens * 4 * 128) < bar


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_of_state", [128, 256])
def test_a_recurrent_layer_works_with_no_more_than_is_planned(rows_of_state: int, dtype: torch.dtype) -> None:
    """The peaks of both functions' backward: Mamba-2's is larger with larger states."""
    rule = [torch.randn(1, 256, 4, 128, dtype=dtype) for _ in range(3)]
    rule += [torch.rand(1, 256, 4).neg_(), torch.rand(1, 256, 4, dtype=dtype)]
    x, dt = torch.randn(1, 256, 8, 64, dtype=dtype), torch.randn(1, 256, 8, dtype=dtype)
    b, c = torch.randn(2, 1, 256, 1, rows_of_state, dtype=dtype)
    a, d, bias = torch.rand(3, 8)
    delta, mamba = peak_of(gated_delta_rule, rule), peak_of(mamba2, [x, dt, -a, b, c, d, bias])
    # Beside what the rule works with are the gradients of its columns.
    delta -= 3 * dtype.itemsize
    assert 0.7 * model_sizes.DELTA_RULE.working < delta <= model_sizes.DELTA_RULE.working + 1
    assert 0.6 * model_sizes.MAMBA2.working < mamba <= model_sizes.MAMBA2.working


def test_rows_shorter_than_a_chunk_count_as_one() -> None:
    """Of answers of a few tokens so many would be computed together that their chunks have no room."""
    full, short = torch.empty(2, 64, 8, 16), torch.empty(2, 3, 8, 16)
    assert mamba2_module._together(full) == mamba2_module._together(short) == mamba2_module.TOGETHER // (64 * 8 * 16)
    by_heads = [delta_rule._together(each, each) for each in (full, short)]
    assert by_heads == [delta_rule.TOGETHER // (2 * 64 * 16)] * 2


def peak_of(function, arguments: list[torch.Tensor]) -> float:  # type: ignore[no-untyped-def]
    """The most that backward works with, in bytes for a column of the output."""
    leaves = [argument.requires_grad_() for argument in arguments]
    output = function(*leaves)[0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.autograd.grad(output, leaves, torch.ones_like(output))
    return peak(profiled) / output.numel()


def peak(profiled: profile) -> int:
    """The most bytes that were allocated at once."""
    sizes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(sizes))


def test_one_layer_recomputed_is_a_hybrids_widest() -> None:
    def recomputed(layer_types: list[str]) -> int:
        config = Qwen3_5TextConfig(**DELTA_RULE | {"num_hidden_layers": len(layer_types), "layer_types": layer_types})
        workload = replace(WORKLOAD, on_gpu=False, micro_batch_tokens=2**20, max_model_len=2**20)
        items = plan_memory(config, workload, 2**60).items
        return next(item.size for item in items if item.name == "loss head, or one layer recomputed")

    assert recomputed(["full_attention"] * 7 + ["linear_attention"]) == recomputed(["linear_attention"] * 8)


def test_the_mlp_of_a_granite_hybrid_is_the_one_beside_its_experts() -> None:
    narrow, wide = (
        activation_bytes_per_token(
            GraniteMoeHybridConfig(
                **GRANITE_H
                | {
                    "hidden_size": 128,
                    "num_hidden_layers": 2,
                    "intermediate_size": 64,
                    "shared_intermediate_size": size,
                }
            ),
            torch.bfloat16,
            layers="plain",
            recompute_mlp=False,
        )
        for size in (64, 256)
    )
    assert wide - narrow == 4 * 2 * (256 - 64)


@pytest.mark.parametrize("key", [{"model.compile": True}, {"engine.tensor_parallel": 2}])
def test_what_is_not_made_for_recurrent_layers_is_refused_by_the_plan(key: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"recurrent layers, for which (model.compile|engine.tensor_parallel) is not"):
        workload.memory_plan(resolve(key), Qwen3_5TextConfig(**DELTA_RULE, num_hidden_layers=2))


def test_sinks_are_not_compiled() -> None:
    kind, changes = MIXTURES["gpt_oss"]
    with pytest.raises(UserError, match=r"attention sinks, for which model\.compile is not made: leave it unset$"):
        workload.memory_plan(resolve({"model.compile": True}), kind(**changes, num_hidden_layers=2))


def test_the_kv_cache_of_a_hybrid_is_that_of_its_attention_and_a_state_of_each_sequence() -> None:
    layers = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    config = Qwen3_5TextConfig(**DELTA_RULE | layers, num_key_value_heads=2)
    assert kv_bytes_per_token(config, torch.bfloat16) == 2 * 2 * 32 * 2
    # Four heads of 16 x 16, and three tokens of what is convolved: values, keys and queries.
    assert state_bytes(config) == 3 * 4 * (4 * 16 * 16 + 3 * (64 + 2 * 32))
    assert state_bytes(QWEN_7B) == 0


def test_of_latent_attention_the_kv_cache_has_one_vector_a_token_on_each_rank() -> None:
    config = DeepseekV2Config(num_hidden_layers=27, num_attention_heads=16, kv_lora_rank=512, q_lora_rank=None)
    assert kv_bytes_per_token(config, torch.bfloat16) == kv_bytes_per_token(config, torch.bfloat16, 8) == 27 * 576 * 2
    assert (head_width(config), value_width(config)) == (16 * 192, 16 * 128)


def test_capacity_of_this_machine() -> None:
    assert device_capacity(torch.device("cpu")) > GIB
