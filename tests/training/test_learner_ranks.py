"""A GRPO step over two ranks is the step of one: same samples, same gradient, same weights."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import distributed

import fastgrpo
from fastgrpo.config_keys import resolve
from fastgrpo.policy.demo_policy import create_policy
from fastgrpo.policy.loading import load_policy
from fastgrpo.ranks.collectives import RankError, gather_all, joined_ranks
from fastgrpo.training import learner, tensor_files
from fastgrpo.training.checkpoint import Checkpoints
from fastgrpo.training.learner import update
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.types import Sample
from tests.helpers.marks import two_gpus_or_none
from tests.helpers.random_engine import random_engine
from tests.helpers.ranks import run_two_ranks

BUDGET = 24
CONFIG = resolve({"grpo.loss": "dapo", "grpo.tis_cap": 2.0, "model.path": "any"}).grpo


def samples(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(count)
    made = []
    for number in range(count):
        length = 6 + 2 * number
        ids = torch.randint(300, (length,), generator=generator).tolist()
        mask = [0, 0, 0] + [1] * (length - 3)
        logprobs = (-6 + torch.rand(length, generator=generator)).tolist()
        made.append(Sample(ids, mask, logprobs, advantage=(-1.0) ** number * (1 + number / 5)))
    return made


def two_steps(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights and metrics after a step with work for every rank, and one with a single sequence for all."""
    torch.set_num_threads(1)
    policy = load_policy(folder)
    optimizer = AdamW(policy.model.parameters(), AdamWOptions(lr=1e-2))
    reports = [update(policy, optimizer, samples(count), CONFIG, budget=BUDGET) for count in (7, 1)]
    return {name: tensor.detach().clone() for name, tensor in policy.model.state_dict().items()}, reports


def rank_main(rank: int, folder: str) -> None:
    with joined_ranks():
        assert gather_all(f"from {rank}", "greetings") == ["from 0", "from 1"]
        with pytest.raises(
            RankError, match=f"waited for part {rank}, but rank {1 - rank} has come for part {1 - rank}"
        ):
            gather_all(None, f"part {rank}")
        weights, reports = two_steps(Path(folder))
        torch.save({"weights": weights, "reports": reports}, f"{folder}/rank{rank}.pt")


@two_gpus_or_none
@pytest.mark.timeout(300)
def test_two_ranks_take_the_same_step_as_one(tmp_path: Path) -> None:
    create_policy(["some text to learn from"] * 3, tmp_path, seed=0, vocab_size=300)
    weights, reports = two_steps(tmp_path)
    run_two_ranks(rank_main, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, tensor in weights.items():
            # A step is about lr = 1e-2 in every weight: AdamW magnifies the rounding of the smallest gradients.
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-4, atol=2e-4)
        for one, both in zip(reports, found["reports"], strict=True):
            assert both["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            assert both["loss_tokens"] == one["loss_tokens"]
            for name in ("entropy", "clip_fraction", "importance_capped", "sampler_parity", "sampler_parity_max"):
                assert both[name] == pytest.approx(one[name], rel=1e-3), name


def stopped_rank_main(rank: int, model: str, runs: str) -> None:
    """Rank 1 alone asks for the end."""

    def lengths(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        if rank == 1 and trainer_state.global_step == 1:
            fastgrpo.stop()
        return [float(len(completion)) for completion in completions]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "open_engine", random_engine)
        sizes = {"engine.max_model_len": 64, "engine.kv_cache_gib": 0.05, "grpo.max_new_tokens": 16}
        counts = {"grpo.prompts_per_step": 2, "grpo.group_size": 2, "grpo.steps": 4, "data.held_out": 0}
        settings, rows = sizes | counts | {"runs": runs}, [{"prompt": str(number)} for number in range(4)]
        folder = fastgrpo.train(settings, model=model, reward=lengths, dataset=rows)
    # Parted in order: else the other rank would be ended in a moment, and no training could follow.
    assert not distributed.is_initialized()
    assert Checkpoints(folder / "checkpoints").latest() == folder / "checkpoints/step-000002"


@two_gpus_or_none
@pytest.mark.timeout(300)
def test_ranks_of_which_one_is_asked_to_stop_end_together(tmp_path: Path) -> None:
    create_policy(["some text to learn from"] * 3, tmp_path / "model", seed=0, vocab_size=300)
    run_two_ranks(stopped_rank_main, str(tmp_path / "model"), str(tmp_path / "runs"))


def test_a_rank_that_goes_while_a_checkpoint_is_written_is_named_and_a_full_disk_is_not_its_doing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensor_files, "rank_and_world", lambda: (0, 2))
    full = "PytorchStreamWriter failed: file write failed"
    for said, raised in (("Connection reset by peer", RankError), (full, RuntimeError)):
        failed = Mock(side_effect=RuntimeError(said))
        monkeypatch.setattr(tensor_files, "load_distributed", failed)
        with pytest.raises(raised, match=said) as error:
            tensor_files.load_tensors({}, Path("none"))
        assert type(error.value) is raised
