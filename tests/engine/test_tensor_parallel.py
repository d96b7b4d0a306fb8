"""Two ranks that hold one vLLM together sample, train and resume as one rank alone does."""

import json
import os
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, Qwen2Config, Qwen2MoeConfig, Qwen3MoeConfig

from fastgrpo.config_keys import resolve
from fastgrpo.engine.engine import Engine
from fastgrpo.engine.weight_sync import SyncReport
from fastgrpo.errors import UserError
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.ranks.collectives import joined_ranks
from fastgrpo.tasks import Task
from fastgrpo.training.workload import memory_plan
from tests.helpers.even_bytes import EvenBytes, load_problems
from tests.helpers.marks import two_gpus_or_none
from tests.helpers.ranks import run_two_ranks
from tests.helpers.runs import run_without_report
from tests.helpers.tiny_model import save_tiny_model


@asynccontextmanager
async def open_even_bytes(config, log):
    assert os.environ.get("RANK", "0") == "0", "the second rank of a replica opens no environment"
    yield EvenBytes()


def run(model: Path, runs: Path, name: str, *, steps: int, tensor_parallel: int, resume: bool = False) -> None:
    values = {"model.path": str(model), "runs": str(runs), "name": name, "engine.tensor_parallel": tensor_parallel}
    values |= {"engine.max_model_len": 64, "engine.max_num_seqs": 16, "engine.kv_cache_gib": 0.05}
    values |= {"grpo.prompts_per_step": 2, "grpo.group_size": 4, "grpo.max_new_tokens": 12, "grpo.rounds": 2}
    values |= {"grpo.lr": 1e-3, "grpo.kl_weight": 0.05, "grpo.micro_batch_tokens": 96, "grpo.steps": steps}
    values |= {"eval.samples": 2, "checkpoint.every": 1}
    run_without_report(resolve(values), Task(load_problems, open_even_bytes), resume=resume)


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "grpo"]


def rank_main(rank: int, model: Path, folder: Path) -> None:
    sync, copied = Engine.sync, []

    def watched_sync(engine: Engine, policy: Policy, **options: Any) -> SyncReport:
        report = sync(engine, policy, **options)
        size = policy.sharded_as.itemsize
        copied.append((report.bytes_copied, size * sum(parameter.numel() for parameter in policy.model.parameters())))
        return report

    Engine.sync = watched_sync
    with joined_ranks(2):
        run(model, folder, "shared", steps=2, tensor_parallel=2)
        run(model, folder, "shared", steps=3, tensor_parallel=2, resume=True)
    # At both starts and after each step.
    assert len(copied) == 5
    assert all(found == expected for found, expected in copied)


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.mark.engine
@pytest.mark.timeout(600)
@two_gpus_or_none
@pytest.mark.parametrize(("kind", "changes"), [(Qwen2Config, {}), (Qwen3MoeConfig, MIXTURE)])
def test_two_ranks_with_one_vllm_are_one_rank(
    kind: type[PretrainedConfig], changes: dict[str, Any], tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", kind=kind, **changes)
    run_two_ranks(rank_main, model, tmp_path)
    run(model, tmp_path, "alone", steps=3, tensor_parallel=1)
    alone, shared = metrics(tmp_path / "alone"), metrics(tmp_path / "shared")
    assert [row["step"] for row in shared] == [1, 2, 3]
    # float32 on a CPU, bfloat16 on a GPU, where two ranks round otherwise than one and soon sample otherwise.
    assert max(row["parity"] for row in shared) < (1e-4 if not torch.cuda.is_available() else 2e-2)
    again = load_policy(tmp_path / "shared/checkpoints/step-000003")
    name = kind.__name__.replace("Config", "ForCausalLM")
    assert type(again.model).__name__ == again.model.config.architectures[0] == name
    if torch.cuda.is_available():
        return
    for one, both in zip(alone, shared, strict=True):
        for name in ("loss", "reward/total", "grad_norm", "loss_tokens"):
            assert both[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), (one["step"], name)
        assert both["sampler_parity_max"] < 1e-3
    rows = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("alone", "shared")]
    assert [row["workflow"] for row in rows[0]] == [row["workflow"] for row in rows[1]]


@pytest.mark.parametrize("key", ["grpo.max_lag", "model.lora_rank", "model.offload_optimizer"])
def test_what_sharded_training_cannot_do_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"engine.tensor_parallel above 1 and {key} exclude each other"):
        resolve({"engine.tensor_parallel": 2, key: 1 if key != "model.offload_optimizer" else True})


def test_ranks_that_do_not_divide_are_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(UserError, match="needs a multiple of 2 processes and there is 1: set torchrun's"),
        joined_ranks(2),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"engine\.tensor_parallel 2 needs a multiple of 2 processes and there are 3"):
        Engine(tiny_folder, max_model_len=64, tensor_parallel=2)
    model = load_policy(tiny_folder).model.config
    with pytest.raises(UserError, match="tensor_parallel 3 does not fit the model's num_attention_heads 4"):
        memory_plan(
            resolve({"engine.tensor_parallel": 3, "engine.max_model_len": 768, "grpo.max_new_tokens": 256}),
            model,
            ranks=3,
        )


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ({}, ""),
        ({"moe_intermediate_size": 33}, "moe_intermediate_size 33"),
        ({"shared_expert_intermediate_size": 33}, "shared_expert_intermediate_size 33"),
        ({"intermediate_size": 33, "mlp_only_layers": [0]}, "intermediate_size 33"),
        ({"intermediate_size": 33, "decoder_sparse_step": 2}, "intermediate_size 33"),
        ({"intermediate_size": 33}, ""),
    ],
)
def test_every_width_of_a_mixture_that_it_has_is_to_divide(odd: dict[str, Any], named: str) -> None:
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "intermediate_size": 32}
    config = resolve({"engine.tensor_parallel": 2, "engine.max_model_len": 768, "grpo.max_new_tokens": 256})
    with pytest.raises(UserError, match=f"model's {named}: set it to") if named else nullcontext():
        memory_plan(config, Qwen2MoeConfig(**sizes | experts | odd), ranks=2)
