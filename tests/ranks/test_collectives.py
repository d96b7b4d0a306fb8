"""Two ranks, each with a vLLM in a process of its own, as on GPUs: the optimizer's all-gather is the weight sync."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore

from fastgrpo.engine.engine_process import EngineProcess
from fastgrpo.errors import UserError, this_rank
from fastgrpo.policy.loading import load_policy
from fastgrpo.ranks import collectives
from fastgrpo.ranks.collectives import RankError, awaiting, joined_ranks, over_ranks, telling_ranks
from fastgrpo.signals import interruptible, signals_handled
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
    # As a script's second training does: addresses that the first one left in the store lead nowhere. One comes late.
    time.sleep(rank)
    with joined_ranks():
        distributed.barrier()
    # An uncaught error is told as ever, without torch's "[rank0]: " before each of its lines.
    assert "distributed" not in sys.excepthook.__qualname__


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
    gloo = "[/pytorch/gloo/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:9. This is typically caused by a crash"
    with (
        pytest.raises(RankError, match=r"^waited for the weights: Connection closed by peer \[10\.0\.0\.2\]:9$"),
        awaiting("the weights"),
    ):
        raise RuntimeError(gloo)
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


def test_a_replica_that_would_straddle_hosts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    collectives.check_world(8)
    with pytest.raises(UserError, match=r"tensor_parallel 16 needs ranks of one host and this one has 8: make"):
        collectives.check_world(16)


def test_what_vllm_writes_over_a_variable_refuses_no_replica_of_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    collectives.check_world(2)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "GROUP_WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_one_sentence(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "two")
    with pytest.raises(UserError, match=f"^{variable} = 'two' is no number: start all ranks by torchrun, or unset it$"):
        collectives.check_world(1)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, ""),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}, "rank 3"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "rank 3"),
        ({"RANK": "3", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}, f"rank 3 on {socket.gethostname()}"),
    ],
)
def test_a_rank_of_several_hosts_is_named_with_its_own(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str
) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert this_rank() == name


def test_what_ranks_have_found_is_compared_with_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[tuple[str, dict[str, object]]] = [("rank 0", {"steps": 3}), ("rank 1", {"steps": 3})]
    collectives.refuse_differences(lambda: {}["nothing is looked for by one rank alone"], "mend it")
    monkeypatch.setattr(collectives, "rank_and_world", lambda: (3, 4))
    monkeypatch.setattr(collectives, "gather_all", lambda own, what: [*others, own])
    collectives.refuse_differences(lambda: {"steps": 3}, "mend it")
    others.append(("rank 2", {"steps": 4}))
    with pytest.raises(UserError, match="steps is 4 on rank 2 and 3 on rank 0: mend it"):
        collectives.refuse_differences(lambda: {"steps": 3}, "mend it")
    others[-1] = ("rank 2", {"rate": 1, "steps": 4, "torch": "2.13"})
    with pytest.raises(UserError, match="steps is 4 on rank 2"):  # all ranks name the same one
        collectives.refuse_differences(lambda: {"steps": 3}, "mend it")
    others[-1] = ("rank 2", {"steps": 3, "torch": "2.13"})
    with pytest.raises(UserError, match=r"torch is '2\.13' on rank 2 and None on rank 0: mend it"):
        collectives.refuse_differences(lambda: {"steps": 3}, "mend it")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """Where the second of two ranks finds the first one, which is this test."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in (variables | {"MASTER_PORT": str(store.port)}).items():
        monkeypatch.setenv(name, value)
    return store


def test_a_rank_that_fails_before_it_has_joined_tells_the_others(store: TCPStore) -> None:
    with pytest.raises(ValueError, match="no jail"), telling_ranks():
        raise ValueError("no jail")
    told = PrefixStore("fastgrpo/0", store).get("failed").decode()
    assert told == f"rank 1 on {socket.gethostname()} failed: no jail"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_what_fails_before_ranks_join_is_told_whatever_their_numbers_are(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "none")
    with pytest.raises(ValueError, match="no jail"), telling_ranks():
        raise ValueError("no jail")


def test_ranks_that_do_not_come_are_named(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "JOIN_WAIT_S", 0.2)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(RankError, match="of 2 ranks 0 did not come within 0 s: look at what torchrun printed"):
        joined_ranks().__enter__()


def test_who_is_waited_for_is_said_and_an_interrupt_ends_the_wait(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait was one call into torch of ten minutes, which no signal ended."""
    said: list[str] = []
    times: list[float] = []

    def say(line: str) -> None:
        said.append(line)
        times.append(time.monotonic())
        if len(said) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(collectives, "say_on_stderr", say)
    monkeypatch.setattr(collectives, "SAY_S", 0.2)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(KeyboardInterrupt), signals_handled():
        joined_ranks().__enter__()
    with interruptible():  # by no signal of before
        pass
    assert times[2] - times[1] >= 0.3  # after 0.2, 0.4 and 0.8 s
    assert all(line.startswith("of 2 ranks 0 did not come yet, within ") for line in said)


def test_ranks_that_cannot_be_connected_are_told_of_the_interface(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    PrefixStore("fastgrpo/0", store).set("name/0", "rank 0 on there")
    refused = Mock(side_effect=RuntimeError("connect [127.0.0.1]:4242: Connection refused"))
    monkeypatch.setattr(distributed, "init_process_group", refused)
    with pytest.raises(RankError, match=r"set GLOO_SOCKET_IFNAME on each host .* \(connect .*: Connection refused\)"):
        joined_ranks().__enter__()
