"""Layers on this package's passes: which kinds, what they keep for backward, and how near they are in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import HashStore
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fastgrpo.config import Grpo
from fastgrpo.errors import UserError
from fastgrpo.kernels.layer import stacked
from fastgrpo.policy.fused_layers import recompute_mlps, restore_layers
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.training.loss import policy_loss
from fastgrpo.training.packing import pack
from fastgrpo.types import Batch, Sample
from tests.helpers.tiny_model import save_tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 64}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64}),
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
}


def is_fused(policy: Policy) -> bool:
    return all("forward" in vars(layer) for layer in policy.model.base_model.layers)


def batch() -> Batch:
    draw = torch.Generator().manual_seed(5)
    prompt = torch.randint(1000, (40,), generator=draw).tolist()
    answers = [torch.randint(1000, (length,), generator=draw).tolist() for length in (60, 3, 150)]
    items = [
        Sample(prompt + ids, [0] * 40 + [1] * len(ids), [0.0] * (40 + len(ids)), 0.5 - number)
        for number, ids in enumerate(answers)
    ]
    return pack(items, [0.01] * 3, 1000, DEVICE)[0]


def measured(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logprobs and gradients of one loss."""
    policy.model.zero_grad()
    output = policy_loss(policy, batch(), Grpo(tis_cap=0.0))
    output.loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in policy.model.named_parameters() if p.grad is not None}
    return output.logprobs_N.detach().double().cpu(), gradients


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_in_bf16_fused_layers_are_as_near_to_fp32_as_transformers_own(name: str, recompute: bool, tmp_path) -> None:
    kind, changes = KINDS[name]
    folder = save_tiny_model(tmp_path, kind=kind, **changes)
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    fused = load_policy(folder, recompute_mlp=recompute, **options)
    assert is_fused(fused)
    plain, exact = load_policy(folder, **options), load_policy(folder, device=DEVICE)
    for policy in (plain, exact):
        restore_layers(policy.model.base_model)
    (ours, grads), (theirs, their_grads), (true, true_grads) = map(measured, (fused, plain, exact))
    assert (ours - true).norm() <= 1.3 * (theirs - true).norm()
    for parameter, gradient in true_grads.items():
        distance = (their_grads[parameter] - gradient).norm() + 1e-3 * gradient.norm()
        assert (grads[parameter] - gradient).norm() <= 1.5 * distance, parameter


def test_layers_of_other_kinds_stay_as_they_are(tmp_path: Path) -> None:
    for number, (kind, changes) in enumerate(
        (
            (Gemma3TextConfig, {"head_dim": 32}),
            (LlamaConfig, {"mlp_bias": True}),
            (Qwen2Config, {"hidden_act": "gelu"}),
        )
    ):
        folder = save_tiny_model(tmp_path / str(number), kind=kind, **changes)
        assert not is_fused(load_policy(folder))
    assert not is_fused(load_policy(save_tiny_model(tmp_path / "lora"), lora_rank=2))


@pytest.mark.parametrize("sharded", [False, True])
def test_experts_whose_rows_grouped_products_do_not_take_are_computed_one_after_another(
    sharded: bool, tmp_path: Path
) -> None:
    """By the type that is computed in: rows of 80 bytes in fp32 have 40 in bf16, of which FSDP2's parts are fp32."""
    kind, changes = KINDS["qwen3_moe"]
    folder = save_tiny_model(tmp_path, kind=kind, **changes | {"moe_intermediate_size": 20})
    assert is_fused(load_policy(folder))
    with one_rank() if sharded else nullcontext():
        policy = load_policy(folder, device=DEVICE, dtype=torch.bfloat16, sharded=sharded)
        assert not is_fused(policy)
        loss = policy.gathered(lambda: policy_loss(policy, batch(), Grpo(tis_cap=0.0)).loss)
        policy.backward(loss)
        for parameter in policy.model.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all())


def test_a_sharded_fused_layer_warns_of_nothing(tiny_folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    with one_rank():
        policy = load_policy(tiny_folder, device=DEVICE, sharded=True)
        assert is_fused(policy)
        policy.backward(policy.gathered(lambda: policy_loss(policy, batch(), Grpo(tis_cap=0.0)).loss))
    assert [str(warning.message) for warning in recwarn if "FSDP" in str(warning.message)] == []


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, as FSDP2 needs one."""
    distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def kept_bytes(policy: Policy) -> int:
    """What a forward keeps for backward besides the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    sizes = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(0 if tensor.untyped_storage().data_ptr() in weights else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        policy.hidden(batch())
    return sum(sizes)


@pytest.mark.parametrize(("kind", "changes"), [(Qwen2Config, {}), (Gemma3TextConfig, {"head_dim": 32})])
def test_recomputed_mlps_keep_less_and_change_nothing(kind: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, kind=kind, **changes)
    keeps, recomputes = (load_policy(folder, device=DEVICE, recompute_mlp=value) for value in (False, True))
    config = keeps.model.config
    products = 4 * len(batch().input_ids_T) * config.num_hidden_layers * 2 * config.intermediate_size
    assert kept_bytes(keeps) - kept_bytes(recomputes) >= products
    torch.testing.assert_close(measured(recomputes), measured(keeps), atol=1e-6, rtol=1e-4)


def test_a_model_without_mlps_to_recompute_is_named() -> None:
    decoder = nn.Module()
    decoder.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UserError, match=r"does not know the MLP of Linear: set model\.gradient_checkpointing"):
        recompute_mlps(decoder)


def test_weights_of_one_product_are_neighbours_and_saved_apart(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "first")
    policy = load_policy(folder)
    for layer in policy.model.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for parts in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            weights = [part.weight for part in parts]
            assert stacked(weights).data_ptr() == weights[0].data_ptr()
    policy.save_hf(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for name, parameter in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
