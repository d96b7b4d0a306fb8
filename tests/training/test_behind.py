"""Checkpoints are written behind the training: of the state as it was, one at a time, and no failure is unseen."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.errors import CannotWrite
from fastgrpo.policy import host_memory
from fastgrpo.policy.chat import Chat
from fastgrpo.policy.loading import load_policy
from fastgrpo.ranks.collectives import gather_all, joined_ranks
from fastgrpo.record.phases import PhaseTimer
from fastgrpo.rollouts.experience import Experience, Tally
from fastgrpo.training import checkpoint
from fastgrpo.training import learner as learners
from fastgrpo.training.checkpoint import Checkpoints
from fastgrpo.training.learner import Learner
from fastgrpo.training.memory import MemoryPlan
from fastgrpo.training.tensor_files import Part, on_host
from tests.helpers.full_disk import full_disk
from tests.helpers.marks import two_gpus_or_none
from tests.helpers.ranks import processes, run_two_ranks
from tests.helpers.tiny_model import save_tiny_model
from tests.policy.test_fsdp import samples
from tests.test_train import Vowels, metrics, model, no_vllm, opened, run  # noqa: F401

WAIT_S = 60
BF16 = torch.arange(12, dtype=torch.bfloat16).view(3, 4)[:, 1:3]
Held = Callable[[], bool]


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checkpoints' manifests, which are written last, are not written before the event is set, as it is at the end."""
    go_on, write = threading.Event(), checkpoint.write_manifest

    def waiting(*arguments: Any) -> None:
        assert go_on.wait(WAIT_S)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", waiting)
        try:
            yield go_on
        finally:
            go_on.set()


def new_learner(folder: Path, runs: Path, **keys: Any) -> Learner:
    config = resolve({"model.path": str(folder), "grpo.lr": 1e-2, "runs": str(runs)} | keys)
    policy, engine = load_policy(folder), SimpleNamespace(sleep=lambda: None)
    if config.model.lora_rank:
        policy.add_lora(config.model.lora_rank, config.model.lora_alpha)
    return Learner(config, engine, policy, Chat(policy.tokenizer), None, MemoryPlan((), 0, 0.1, 64))  # type: ignore[arg-type]


def steps(learner: Learner, count: int) -> list[float]:
    norms = []
    for step in range(learner.step, learner.step + count):
        learner.experiences = [Experience(samples(2 * step), Tally(), [])]
        norms.append(learner.update(PhaseTimer())["grad_norm"])
    return norms


@pytest.mark.parametrize("keys", [{}, {"model.lora_rank": 4}, {"model.offload_optimizer": True}])
def test_updates_while_it_is_written_change_nothing_of_a_checkpoint(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    whole, first = (new_learner(tiny_folder, tmp_path / name, **keys) for name in ("whole", "first"))
    norms, written, go_on = steps(whole, 4), learners.save_parts, threading.Event()
    assert steps(first, 2) == norms[:2]

    def late(*arguments: Any) -> None:
        assert go_on.wait(WAIT_S)
        written(*arguments)

    monkeypatch.setattr(learners, "save_parts", late)
    first.save()
    assert steps(first, 2) == norms[2:]
    go_on.set()
    latest = first.checkpoints.latest()
    assert latest is not None
    # With adapters the base is the model's own.
    again = new_learner(tiny_folder if keys.get("model.lora_rank") else latest, tmp_path / "again", **keys)
    again.restore(latest)
    assert again.step == 2
    assert steps(again, 2) == norms[2:]
    for one, other in zip(whole.policy.model.parameters(), again.policy.model.parameters(), strict=True):
        assert torch.equal(one, other)


def begin(checkpoints: Checkpoints, step: int, block: torch.Tensor | None = None, **options: Any) -> None:
    def take(copy: bool) -> Callable[[Path], object]:
        mine = torch.zeros(3) if block is None else block
        return lambda folder: torch.save(mine, folder / "block")

    checkpoints.save(step, **({"take": take, "size": 0, "config": Config()} | options))


def test_the_next_checkpoint_waits_and_what_is_added_to_one_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    with held_up(monkeypatch) as go_on:
        begin(checkpoints, 1)
        checkpoints.add(1, "more", b"later")
        begin(checkpoints, 1, score=0.5)
        next_one = threading.Thread(target=begin, args=(checkpoints, 2), daemon=True)
        next_one.start()
        next_one.join(0.2)
        assert next_one.is_alive()
        assert Checkpoints(tmp_path).latest() is None
        go_on.set()
        next_one.join(WAIT_S)
    best = checkpoints.best()
    assert best == tmp_path / "step-000001"
    assert (best / "state/more").read_bytes() == b"later"
    assert checkpoints.latest() == tmp_path / "step-000002"


def test_the_copy_is_freed_once_it_is_written(tmp_path: Path) -> None:
    checkpoints, block = Checkpoints(tmp_path), torch.zeros(1000)
    held = weakref.ref(block)
    begin(checkpoints, 1, block)
    del block
    checkpoints.wait()
    gc.collect()
    assert held() is None


def test_the_system_has_the_memory_of_a_copy_back_once_it_is_freed() -> None:
    """Of small tensors, too, which threads copy that come and go, as for each checkpoint, beside others that stay."""
    process, kept = psutil.Process(), list[torch.Tensor]()
    parts = {str(number): Part(torch.full((2**18,), float(number)), (0,)) for number in range(100)}
    parts |= {"none": Part(torch.zeros(0, 3), (0, 0)), "one": Part(torch.tensor(3.0), ()), "half": Part(BF16, (0, 0))}
    before = process.memory_info().rss
    for _ in range(4):
        copies = on_host(parts)
        for name, part in parts.items():
            assert torch.equal(copies[name].block, part.block)
            assert copies[name].block.data_ptr() != part.block.data_ptr() or not part.block.numel()
        kept += [copies[str(number)].block for number in range(9, 100, 20)]
        with ThreadPoolExecutor(1) as writer:
            writer.submit(copies.clear).result()
    assert process.memory_info().rss - before < 1.5 * sum(block.nbytes for block in kept)


def test_a_failed_write_is_raised_once_by_whatever_looks_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    begin(checkpoints, 1)
    checkpoints.wait()
    looks: tuple[Callable[[], object], ...] = (
        checkpoints.wait,
        checkpoints.latest,
        lambda: begin(checkpoints, 9),
        lambda: until(checkpoints.check),
    )
    for step, look in enumerate(looks, 2):
        with full_disk(50_000):
            begin(checkpoints, step, torch.zeros(100_000))
            with pytest.raises(CannotWrite, match=rf"cannot write .*step-{step:06}.*free space"):
                look()
        checkpoints.check()
    with full_disk(50_000), pytest.raises(CannotWrite, match="step-000007"), checkpoints.written():
        begin(checkpoints, 7, torch.zeros(100_000))
    assert Checkpoints(tmp_path).latest() == tmp_path / "step-000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def until(look: Callable[[], None]) -> None:
    """Again and again, as at the end of each step."""
    ends = time.monotonic() + WAIT_S
    while time.monotonic() < ends:
        look()
        time.sleep(0.01)


def test_what_ended_a_run_is_raised_and_a_failed_write_beside_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    stack = ExitStack()
    stack.enter_context(full_disk(50_000))
    stack.enter_context(checkpoints.written())
    begin(checkpoints, 1, torch.zeros(100_000))
    with pytest.raises(ZeroDivisionError), stack:
        raise ZeroDivisionError
    assert "cannot write the checkpoint" in caplog.messages[0]


def test_where_a_copy_has_no_room_it_is_written_at_once_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copies: list[bool] = []

    def take(copy: bool) -> Callable[[Path], object]:
        copies.append(copy)
        return lambda folder: None

    monkeypatch.setattr(checkpoint, "host_memory_free", lambda: 3 * 2**30)
    checkpoints = Checkpoints(tmp_path)
    for step, size in enumerate((2**30, 2 * 2**30 + 1, 2 * 2**30 + 1)):
        begin(checkpoints, step, take=take, size=size)
        assert size == 2**30 or Checkpoints(tmp_path).latest() == tmp_path / f"step-{step:06}"
    assert copies == [True, False, False]
    (said,) = caplog.messages
    assert said.startswith("training waits while a checkpoint is written: a copy of the state needs 3.0 GiB on ")
    for _ in range(2):  # an interrupt that came with the first one's error is to leave a checkpoint, or to tell that
        with full_disk(0), pytest.raises(CannotWrite):
            begin(checkpoints, 5, take=take, size=2**40)
    begin(checkpoints, 5, take=take, size=2**40)
    assert Checkpoints(tmp_path).latest() == tmp_path / "step-000005"


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroup_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    line, cached = ("4:memory:/a/b", "total_inactive_file") if version == 1 else ("0::/a/b", "inactive_file")
    root = tmp_path / "cgroups" / ("memory" if version == 1 else "")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    100 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpu:/else\n{line}\n")
    (root / "a/b").mkdir(parents=True)
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "cgroups")
    assert host_memory.host_memory_free() == 100 * 1024
    for folder, limit, used in ((root / "a/b", "max", "5"), (root / "a", "50000", "20000")):
        for name, value in zip(names, (limit, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 12\n{cached} 7000\n")
    assert host_memory.host_memory_free() == 37000
    (tmp_path / "proc/self/cgroup").unlink()
    assert host_memory.host_memory_free() == 100 * 1024


def test_a_run_ends_and_is_interrupted_with_all_its_checkpoints(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_vllm: None,  # noqa: F811
) -> None:
    """The manifest of each is written late: an update or an interrupt comes before it."""
    write, updated = checkpoint.write_manifest, threading.Event()
    update, early = Learner.update, list[bool]()

    def late(*arguments: Any) -> None:
        early.append(updated.wait(1))
        updated.clear()
        write(*arguments)

    def noted(self: Learner, *arguments: Any) -> dict[str, float]:
        metrics = update(self, *arguments)
        updated.set()
        return metrics

    monkeypatch.setattr(checkpoint, "write_manifest", late)
    monkeypatch.setattr(Learner, "update", noted)
    folder = run(model, tmp_path, "whole", grpo__steps=4)
    assert Checkpoints(folder / "checkpoints").latest() == folder / "checkpoints/step-000004"
    assert early[0], "the third update was made before the checkpoint of the second was whole"
    run_of: list[Any] = []

    async def interrupt(problem: Any) -> None:
        updated.clear()
        if (folder / "checkpoints/.step-000006.partial").exists():
            run_of[0].cancel()

    def opened_here(config: Config, log: object) -> Any:
        run_of[:] = [asyncio.current_task()]
        return nullcontext(Vowels(interrupt))

    with pytest.raises(asyncio.CancelledError):
        run(model, tmp_path, "whole", resume=True, grpo__steps=100, environment=opened_here)
    done = metrics(folder)[-1]["step"]
    assert done >= 6
    assert Checkpoints(folder / "checkpoints").latest() == folder / f"checkpoints/step-{done:06}"
    run(model, tmp_path, "whole", resume=True, grpo__steps=done + 1, environment=opened(Vowels()))
    assert [row["step"] for row in metrics(folder)] == list(range(1, done + 2))


def two_ranks_main(rank: int, model_folder: Path, folder: Path) -> None:
    with joined_ranks():
        learner = new_learner(model_folder, folder, **{"checkpoint.keep": 9})
        steps(learner, 1)
        ready, late = folder / "ready", learners.save_parts

        def waiting(*arguments: Any) -> None:
            ends = time.monotonic() + WAIT_S
            while not ready.exists() and time.monotonic() < ends:
                time.sleep(0.01)
            late(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learners, "save_parts", waiting)
            learner.save()
            # Collectives of the training, while both ranks write.
            norms = steps(learner, 2)
            learner.checkpoints.check()
            gather_all(None, "the steps")
            ready.touch()
            learner.checkpoints.wait()
        learner.save()
        latest = learner.checkpoints.latest()
        torch.save({"norms": norms, "latest": str(latest)}, folder / f"{rank}.pt")
        for failing, look in ((1, learner.checkpoints.wait), (0, lambda: until(learner.checkpoints.check))):
            with full_disk(1000) if rank == failing else nullcontext():
                learner.save(anew=True)
                gather_all(None, "what comes after it")
                with pytest.raises(CannotWrite, match=r"cannot write the checkpoint .*step-000003: .*; free space"):
                    look()
        learner.checkpoints.check()
        assert learner.checkpoints.latest() == latest
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "host_memory_free", lambda: 2**40 * (1 - rank))
            learner.step = 4
            learner.save()
            assert Checkpoints(learner.checkpoints.folder).latest() == learner.checkpoints.folder / "step-000004"


@two_gpus_or_none
@pytest.mark.timeout(300)
def test_two_ranks_train_while_they_write_and_both_see_that_one_cannot_or_has_no_room(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", vocab_size=301)
    run_two_ranks(two_ranks_main, tmp_path / "model", tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == other
    resumed = new_learner(Path(one["latest"]).with_name("step-000001"), tmp_path / "resumed")
    resumed.restore(Path(one["latest"]).with_name("step-000001"))
    assert steps(resumed, 2) == pytest.approx(one["norms"], rel=1e-5)
    resumed.restore(Path(one["latest"]))
    assert resumed.step == 3
    resumed.restore(Path(one["latest"]).with_name("step-000004"))
    assert resumed.step == 4


def write_for_ever(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    for step in range(1, 10_000):
        begin(checkpoints, step, torch.full((2**19,), float(step)))


@pytest.mark.timeout(120)
def test_a_process_killed_while_it_writes_leaves_whole_checkpoints_alone(tmp_path: Path) -> None:
    draw, last = random.Random(0), -1
    for _ in range(6):
        writing = processes().Process(target=write_for_ever, args=(tmp_path,))
        writing.start()
        ends = time.monotonic() + WAIT_S
        while not list(tmp_path.glob("step-*")) and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(writing.pid, signal.SIGKILL)
        writing.join(WAIT_S)
        found = Checkpoints(tmp_path)
        latest = found.latest()
        found.set_damaged_aside()
        assert latest == found.latest()
        assert latest is not None
        step = int(latest.name.removeprefix("step-"))
        assert torch.equal(torch.load(latest / "block"), torch.full((2**19,), float(step)))
        last = max(last, step)
    assert last > 1
