"""A run whose tokens are trained with the experts that vLLM chose as it sampled them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.rollouts.experience import from_bytes
from fastgrpo.training.learner import EXPERIENCE
from fastgrpo.training.workload import memory_plan
from tests.helpers.marks import exact
from tests.helpers.tiny_model import save_tiny_model
from tests.test_train import Vowels, metrics, opened
from tests.training.test_lag import settings, train

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
REPLAY: dict[str, Any] = {"model.path": "any", "grpo.routing_replay": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("mixture"), kind=Qwen3MoeConfig, **EXPERTS)


class Lottery(Vowels):
    """Rewards that differ, whatever a random model writes."""

    async def execute(self, problem: Any, completion: str, seed: int) -> float:
        return crc32(completion.encode(errors="replace")) % 8 / 8


def run(config: Config, *, resume: bool = False) -> Path:
    return train(config, resume=resume, environment=opened(Lottery()))


def configured(model: Path, runs: Path, name: str, steps: int, **grpo: object) -> Config:
    return settings(model, runs, name, steps=steps, **grpo)


@pytest.mark.engine
@exact
def test_experts_are_those_of_the_sampler_and_survive_a_resume(model: Path, tmp_path: Path) -> None:
    own = run(configured(model, tmp_path, "own", 2))
    replayed = run(configured(model, tmp_path, "replayed", 2, routing_replay=True, epochs_per_batch=2))
    assert "rerouted" not in metrics(own)[0]
    # In fp32 the trainer would choose the same, and its first step is that of a run without.
    assert metrics(replayed)[0]["rerouted"] == 0
    for name in ("loss", "sampler_parity", "entropy"):
        assert metrics(replayed)[0][name] == pytest.approx(metrics(own)[0][name], abs=1e-6), name
    assert max(row["parity"] for row in metrics(replayed)) < 1e-4
    # Rollouts that began an update early have the experts of that time.
    behind = configured(model, tmp_path, "behind", 2, routing_replay=True, max_lag=1, lr=0.05)
    state = next((run(behind) / "checkpoints").glob("step-000002")) / "state" / EXPERIENCE
    for sample in from_bytes(state.read_bytes())[0].samples:
        assert sample.routes is not None
        assert sample.routes.shape == (len(sample.token_ids), 2, 2)
        assert (sample.routes[:-1] >= 0).all()
    folder = run(configured(model, tmp_path, "behind", 3, routing_replay=True, max_lag=1, lr=0.05), resume=True)
    assert [row["rerouted"] > 0 for row in metrics(folder)] == [False, True, True]


def test_what_has_no_routes_to_replay_is_refused_by_the_plan() -> None:
    with pytest.raises(UserError, match=r"^grpo\.routing_replay .* a model of the kind qwen3 has none: set it to"):
        memory_plan(resolve(REPLAY), Qwen3Config(num_hidden_layers=2))
    with pytest.raises(UserError, match=r"^model\.compile .*: unset it or grpo\.routing_replay$"):
        memory_plan(resolve(REPLAY | {"model.compile": True}), Qwen3MoeConfig(**EXPERTS, num_hidden_layers=2))
