"""Ranks of two hosts, which share nothing but a network and a folder: they train as one host's do, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.plan import run_on_ranks
from fastgrpo.program import run_program
from fastgrpo.ranks import deadlines
from fastgrpo.ranks.collectives import joined_ranks
from fastgrpo.tasks import Task
from fastgrpo.train import run
from fastgrpo.training import learner
from tests.helpers.even_bytes import EvenBytes, load_problems
from tests.helpers.hosts import Host, two_hosts
from tests.helpers.random_engine import random_engine
from tests.helpers.ranks import run_under_agent, start_agent
from tests.helpers.runs import run_without_report, without_report

ENDPOINT = "host-a:29400"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes with a GPU are not forked onto a host")


@asynccontextmanager
async def open_even_bytes(config: Config, log: object) -> AsyncIterator[EvenBytes]:
    yield EvenBytes()


def configured(model: str, runs: str, name: str, **values: Any) -> Config:
    settings: dict[str, Any] = {"model.path": model, "runs": runs, "name": name, "engine.process": "shared"}
    settings |= {"engine.max_model_len": 64, "engine.max_num_seqs": 16, "engine.kv_cache_gib": 0.05}
    settings |= {"grpo.prompts_per_step": 2, "grpo.group_size": 4, "grpo.max_new_tokens": 12, "grpo.lr": 1e-3}
    settings |= {"grpo.micro_batch_tokens": 96, "eval.samples": 1, "checkpoint.every": 1}
    return resolve(settings | {key.replace("__", "."): value for key, value in values.items()})


def train(config: Config, load: Callable[[Config], Any] = load_problems) -> None:
    def main() -> None:
        with without_report():
            run_on_ranks(config, lambda: run(config, task=Task(load, open_even_bytes)))

    run_program(main)


def two_steps(model: str, runs: str) -> None:
    train(configured(model, runs, "two", grpo__steps=2))


def a_third_step_and_three(model: str, runs: str) -> None:
    with joined_ranks():
        for name, resume in (("two", True), ("one", False)):
            config = configured(model, runs, name, grpo__steps=3)
            run_without_report(config, Task(load_problems, open_even_bytes), resume=resume)


def drawn_at_random(model: str, runs: str, change: str) -> None:
    """Many steps, for which no vLLM starts, with `change` on host b alone."""
    if change == "cut":
        deadlines.SILENT_POLLS = 10
    mock.patch.object(learner, "open_engine", random_engine).start()
    on_b, values, load = socket.gethostname() == "host-b", {}, load_problems
    Path(runs).parent.joinpath(f"{socket.gethostname()}.pid").write_text(str(os.getpid()))
    if change == "runs" and on_b:
        Path(runs).mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", runs], check=True)
    elif change == "model" and on_b:
        other = shutil.copytree(model, Path(runs).parent / "model-of-b")
        with (other / "config.json").open("a") as file:
            file.write("\n")
        subprocess.run(["mount", "--bind", str(other), model], check=True)
    elif change == "steps" and on_b:
        values = {"grpo__steps": 7}
    elif change == "prompts" and on_b:
        load = lambda config: (load_problems(config)[0][::-1], [])  # noqa: E731
    elif change == "tensor_parallel":
        values = {"engine__tensor_parallel": 2}
    elif change == "raises" and on_b:
        mock.patch.object(learner.Learner, "update", mock.Mock(side_effect=ValueError("an update fails"))).start()
    train(configured(model, runs, "run", **{"grpo__steps": 100_000} | values), load)


@contextmanager
def on_both(folder: Path, main: Callable[..., None], *arguments: str) -> Iterator[tuple[list[Any], tuple[Host, Host]]]:
    """Agents of one rank each on two hosts, which end with the block; what is printed there goes to a.log and b.log."""
    with two_hosts(folder) as hosts:
        agents = [
            start_agent(main, *arguments, printed=str(folder / f"{name}.log"), ranks=1, endpoint=ENDPOINT, host=host)
            for name, host in zip("ab", hosts, strict=True)
        ]
        try:
            yield agents, hosts
        finally:
            # Ranks whose agent was killed end by themselves.
            for agent in agents:
                agent.kill()
                agent.join()


def ended(agents: list[Any], folder: Path, status: int, seconds: float) -> tuple[str, str]:
    """What was printed on both hosts, once both agents have ended with that `status`, within `seconds`."""
    deadline = time.monotonic() + seconds
    for agent in agents:
        agent.join(max(0.0, deadline - time.monotonic()))
    printed = (folder / "a.log").read_text(), (folder / "b.log").read_text()
    assert [agent.exitcode for agent in agents] == [status, status], printed
    return printed


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("error: ")]


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


@pytest.mark.engine
def test_two_hosts_train_as_one_with_as_many_ranks(tiny_folder: Path, tmp_path: Path) -> None:
    """Real vLLMs: two steps on two hosts, and a third one resumed on one, are three on one."""
    model, runs = shutil.copytree(tiny_folder, tmp_path / "model"), tmp_path / "runs"
    with on_both(tmp_path, two_steps, str(model), str(runs)) as (agents, _):
        ended(agents, tmp_path, 0, seconds=200)
    status, said = run_under_agent(a_third_step_and_three, str(model), str(runs))
    assert status == 0, said
    for one, two in zip(rows(runs / "one", "metrics.jsonl"), rows(runs / "two", "metrics.jsonl"), strict=True):
        for key in ("step", "loss", "reward/total", "grad_norm", "entropy", "loss_tokens", "parity", "sampler_parity"):
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), (one["step"], key)
    assert rows(runs / "one", "samples.jsonl") == rows(runs / "two", "samples.jsonl")
    weights = [load_file(runs / name / "checkpoints/step-000003/model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "first", "said"),
    [
        ("runs", "a", "rank 1 on host-b cannot write where rank 0 on host-a reads, in "),
        ("steps", "a", "grpo.steps is 7 on rank 1 on host-b and 100000 on rank 0 on host-a: start all ranks with one "),
        ("model", "a", "the digest of the model is "),
        ("prompts", "a", "the digest of all prompts is "),
        (
            "tensor_parallel",
            "a",
            "engine.tensor_parallel 2 needs ranks of one host and this one has 1: make ",
        ),
        ("raises", "b", "rank 1 on host-b failed: an update fails"),
    ],
)
def test_what_is_wrong_on_one_host_is_said_on_both(
    change: str, first: str, said: str, tiny_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    with on_both(tmp_path, drawn_at_random, str(model), str(tmp_path / "runs"), change) as (agents, _):
        on_a, on_b = ended(agents, tmp_path, 1, seconds=120)
    assert errors(on_a)[0].startswith(f"error: rank 0 on host-a: {said}")
    if first == "b":
        assert "ValueError: an update fails" in on_b
    else:
        assert errors(on_b)[0].startswith(f"error: rank 1 on host-b: {said}")


@pytest.mark.parametrize("how", ["killed", "cut"])
def test_all_ranks_end_where_one_is_killed_or_the_network_is_gone(how: str, tiny_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    with on_both(tmp_path, drawn_at_random, str(model), str(tmp_path / "runs"), how) as (agents, hosts):
        # Of the checkpoints the last two are kept.
        wait_for(lambda: len(list(tmp_path.glob("runs/run/checkpoints/step-*"))) > 1)
        ranks = [psutil.Process(int((tmp_path / f"host-{name}.pid").read_text())) for name in "ab"]
        began = time.monotonic()
        if how == "killed":
            ranks[1].send_signal(signal.SIGKILL)
            on_a, on_b = ended(agents, tmp_path, 1, seconds=60)
            assert "rank      : 1 " in on_b
            assert errors(on_a)[0].startswith("error: rank 0 on host-a: ")
        else:
            hosts[1].cut()
            # Where no network is, torchrun's agent asks for its own store for minutes, and looks after no rank.
            wait_for(lambda: all(map(is_gone, ranks)))
            on_a, on_b = ((tmp_path / f"{name}.log").read_text() for name in "ab")
            silence = "no sign of life for 10 s"
            assert errors(on_a) == [f"error: rank 0 on host-a: rank 1 on host-b is gone: {silence}"]
            assert errors(on_b) == [f"error: rank 1 on host-b: rank 0 on host-a cannot be reached: {silence}"]
        print(f"{how}: all ranks ended within {time.monotonic() - began:.1f} s")
        assert all(map(is_gone, ranks))
