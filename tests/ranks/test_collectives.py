"""Two ranks, each with a vLLM in a process of its own, as on GPUs: the optimizer's all-gather is the weight sync."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from torch import distributed

from fastgrpo.engine.engine_process import EngineProcess
from fastgrpo.errors import UserError
from fastgrpo.policy.loading import load_policy
from fastgrpo.ranks import collectives
from fastgrpo.ranks.collectives import RankError, awaiting, joined_ranks, over_ranks
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.types import Runs
from tests.helpers.marks import exact
from tests.helpers.ranks import run_under_agent

TOKENS = 40


def rank_main(folder: str) -> None:
    with joined_ranks() as (rank, world):
        assert world == 2
        policy = load_policy(folder)
        engine = EngineProcess(folder, max_model_len=64, kv_cache_gib=0.05, max_num_seqs=8)
        engine.sync(policy)
        optimizer = AdamW(policy.model.parameters(), AdamWOptions(lr=1e-2))
        bounds = torch.tensor([0, TOKENS]).int(), TOKENS
        for _ in range(2):
            token_ids = torch.arange(TOKENS) + 100 * rank
            hidden_TH = policy.forward(token_ids, torch.arange(TOKENS), Runs(*bounds, *bounds))
            (hidden_TH @ policy.head_weight.T).log_softmax(-1)[:, 5].mean().neg().backward()
            optimizer.step()
        report = engine.sync(policy)
        assert report.bytes_copied == 0
        assert report.parity_max < 1e-4
        # Ranks generate at their own pace: one has more to do than the other.
        for key in range(1 + 3 * rank):
            engine.submit(key, [1 + key, 2, 3], max_tokens=12, seed=key)
        finished = {}
        while engine.busy:
            finished |= {completion.key: completion.token_ids for completion in engine.step()}
        engine.close()
        torch.save({"first": finished[0], "weights": policy.model.state_dict()}, f"{folder}/rank{rank}.pt")
        # The trainer's process group outlives the engine.
        distributed.barrier()


@pytest.mark.engine
@exact
@pytest.mark.timeout(600)
def test_two_ranks_train_and_generate_from_the_same_weights(tiny_folder: Path) -> None:
    status, printed = run_under_agent(rank_main, str(tiny_folder))
    assert status == 0, printed
    ranks = [torch.load(tiny_folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["first"] == ranks[1]["first"]
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name])


def test_what_fails_in_a_collective_is_another_ranks_doing_but_for_memory() -> None:
    with pytest.raises(RankError, match="waited for the weights: connection reset"), awaiting("the weights"):
        raise RuntimeError("first line\nconnection reset")
    with pytest.raises(torch.OutOfMemoryError), awaiting("the weights"):
        raise torch.OutOfMemoryError("2 GiB wanted")


def test_metrics_are_folded_over_the_ranks_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "gather_all", lambda own, what: [own, {"a": 3.0, "peak": 5.0}, {"peak": 7.0}])
    assert over_ranks({"a": 1.0}, {"peak": max}) == {"a": 2.0, "peak": 7.0}
    assert over_ranks({}, {"peak": max}) == {"a": 3.0, "peak": 7.0}


def test_more_ranks_than_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="rank 6 has no GPU: it is number 3 of this host, and 2 are visible"):
        joined_ranks().__enter__()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "MASTER_ADDR expected"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT expected"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "invalid literal"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "TAKEN"}, "address already in use"),
    ],
)
def test_ranks_that_do_not_come_together_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: str
) -> None:
    """As where a scheduler sets some of torchrun's variables, and where two runs take one port."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        for name, value in ({"RANK": "0", "WORLD_SIZE": "2"} | changes).items():
            monkeypatch.setenv(name, value.replace("TAKEN", str(taken.getsockname()[1])))
        with pytest.raises(UserError, match=rf"number 0 of 2 ranks, which it cannot join: .*{said}.*; start all"):
            joined_ranks().__enter__()
