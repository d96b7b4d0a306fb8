"""A policy sharded by FSDP2 over ranks takes the steps of an unsharded one, and resumes on another number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from fastgrpo.config_keys import resolve
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.policy.placement import policy_device
from fastgrpo.ranks.collectives import joined_ranks
from fastgrpo.training.fsdp_optimizer import optimizer_of
from fastgrpo.training.learner import update
from fastgrpo.training.loss import sft_loss
from fastgrpo.training.optimizer import AdamWOptions
from fastgrpo.training.packing import rank_batches
from fastgrpo.training.tensor_files import save_parts
from fastgrpo.types import Sample
from tests.helpers.marks import two_gpus_or_none
from tests.helpers.ranks import run_two_ranks
from tests.helpers.tiny_model import MIXTURES, save_tiny_model

BUDGET, STEPS = 24, 3
# AdamW divides by the size of a gradient: with this eps rounding stays rounding where a gradient is next to nothing.
OPTIONS = AdamWOptions(lr=1e-3, weight_decay=0.1, eps=1e-4, max_grad_norm=0.5, skip_grad_norm=1e3)
# The ratio to an old policy and the KL to a reference: every way through the head.
CONFIG = resolve(
    {
        "grpo.loss": "gspo",
        "grpo.kl_weight": 0.1,
        "grpo.epochs_per_batch": 2,
        "grpo.mini_batches": 2,
        "model.path": "any",
    }
).grpo


def samples(step: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(step)
    made = []
    for number in range(7):
        length = 6 + 2 * number
        ids = torch.randint(300, (length,), generator=generator).tolist()
        logprobs = (-6 + torch.rand(length, generator=generator)).tolist()
        advantage = float("inf") if step == 1 else (-1.0) ** number * (1 + number / 5)
        made.append(Sample(ids, [0, 0, 0] + [1] * (length - 3), logprobs, advantage))
    return made


def policies(folder: Path, sharded: bool) -> tuple[Policy, Policy]:
    torch.set_num_threads(1)
    policy = load_policy(folder, device=policy_device(), sharded=sharded, gradient_checkpointing=True)
    return policy, load_policy(folder, device=policy_device(), sharded=sharded, trained=False)


def steps(policies: tuple[Policy, Policy], optimizer, which: range) -> list[dict[str, float]]:
    """GRPO, then fine-tuning, with several micro-batches a step on every rank; one step's gradient is infinite."""
    policy, reference = policies
    reports = []
    for step in which:
        reports.append(update(policy, optimizer, samples(step), CONFIG, reference, budget=BUDGET))
        for batch in rank_batches(samples(step), "token", 1, BUDGET, policy.device):
            policy.backward(sft_loss(policy, batch))
        reports[-1]["sft_norm"] = optimizer.step().grad_norm
    return reports


def rank_main(rank: int, folder: Path) -> None:
    with joined_ranks():
        sharded = policies(folder / "model", sharded=True)
        optimizer = optimizer_of(sharded[0], OPTIONS)
        reports = steps(sharded, optimizer, range(STEPS - 1))
        save_parts(optimizer.parts(), folder / "state")
        reports += steps(sharded, optimizer, range(STEPS - 1, STEPS))
        sharded[0].save_hf(folder / "saved")
        torch.save(reports, folder / f"reports{rank}.pt")


def resumed_alone(folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the last step, taken by one rank."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        sharded = policies(folder / "model", sharded=True)
        optimizer = optimizer_of(sharded[0], OPTIONS)
        optimizer.load(folder / "state")
        steps(sharded, optimizer, range(STEPS - 1, STEPS))
        return {name: weight.cpu() for name, weight in sharded[0].weights()}
    finally:
        distributed.destroy_process_group()


def assert_same(found: dict[str, torch.Tensor], policy: Policy) -> None:
    weights = {name: weight.cpu() for name, weight in policy.weights()}
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=5e-6)


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [1]}


@two_gpus_or_none
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "changes"), [(Qwen2Config, {}), (Qwen3MoeConfig, MIXTURE), MIXTURES["ernie4_5_moe"]])
def test_sharded_steps_are_those_of_one_rank_and_resume_on_another_number(
    kind: type[PretrainedConfig], changes: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model", kind=kind, vocab_size=301, **changes)
    whole = policies(tmp_path / "model", sharded=False)
    expected = steps(whole, optimizer_of(whole[0], OPTIONS), range(STEPS))
    assert [report["skipped"] for report in expected] == [0.0, 1.0, 0.0]
    run_two_ranks(rank_main, tmp_path)
    for rank in range(2):
        reports = torch.load(tmp_path / f"reports{rank}.pt", weights_only=True)
        for found, report in zip(reports, expected, strict=True):
            for name in ("loss", "grad_norm", "skipped", "sft_norm"):
                assert found[name] == pytest.approx(report[name], rel=1e-4, abs=1e-6, nan_ok=True), name
    saved = load_policy(tmp_path / "saved")
    assert_same(dict(saved.weights()), whole[0])
    assert_same(resumed_alone(tmp_path), whole[0])
