"""A checkpoint is whole or absent, old ones survive every failure, and a resumed run continues the same numbers."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.errors import CannotWrite, UserError
from fastgrpo.training import checkpoint
from fastgrpo.training.checkpoint import Checkpoints, load
from fastgrpo.training.manifest import MANIFEST, SUMMED_BYTES, checksum
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.training.tensor_files import save_parts
from tests.helpers.full_disk import full_disk


def save_hf(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    torch.save(torch.ones(1000), folder / "weights.bin")


def state_writer(value: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "value.json").write_text(json.dumps(value))


def optimizer_writer(optimizer: AdamW) -> Callable[[Path], object]:
    return partial(save_parts, optimizer.parts())


def begin(
    checkpoints: Checkpoints,
    step: int,
    *,
    state: Any = None,
    save_hf: Callable[[Path], object] = save_hf,
    save_state: Callable[[Path], object] | None = None,
    **options: Any,
) -> Path:
    def write(folder: Path) -> None:
        (save_state or state_writer(state))(folder / checkpoint.STATE)
        save_hf(folder)

    return checkpoints.save(step, **({"take": lambda copy: write, "size": 0, "config": Config()} | options))


def save(checkpoints: Checkpoints, step: int, **options: Any) -> Path:
    path = begin(checkpoints, step, **options)
    checkpoints.wait()
    return path


def state_of(path: Path | None) -> Any:
    assert path is not None
    read: list[Any] = []
    load(path, Config(), lambda folder: read.append(json.loads((folder / "value.json").read_text())))
    return read[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_state_comes_back(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = AdamW([parameter], AdamWOptions(lr=1e-2))
    parameter.sum().backward()
    optimizer.step()
    path = save(Checkpoints(tmp_path), 7, save_state=optimizer_writer(optimizer))
    other = AdamW([torch.nn.Parameter(torch.zeros(3))], AdamWOptions(lr=1e-2))
    assert (load(path, Config(), other.load), path.name) == (7, "step-000007")
    assert torch.equal(other.shards[0].exp_avg, optimizer.shards[0].exp_avg)
    assert (path / "config.json").read_text() == "{}"


def test_keeps_the_latest_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, None), (5, 0.2)):
        save(checkpoints, step, score=score)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    assert checkpoints.best() == tmp_path / "step-000002"
    assert checkpoints.latest() == tmp_path / "step-000005"


def test_an_old_one_that_cannot_be_removed_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(folder: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    save(checkpoints, 2)
    assert checkpoints.latest() == tmp_path / "step-000002"
    said = f"{tmp_path / 'step-000001'} is kept no longer and cannot be removed (Device or resource busy)"
    assert [message.partition(":")[0] for message in caplog.messages] == [said]


def test_another_run_replaces_the_same_step(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path), 1, state={"x": 1})
    save(Checkpoints(tmp_path), 1, state={"x": 2})
    assert names(tmp_path) == ["step-000001"]
    assert state_of(tmp_path / "step-000001") == {"x": 2}


def test_a_step_is_written_once_and_scored_later(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, state="first")

    def written_twice(folder: Path) -> None:
        raise AssertionError

    assert save(checkpoints, 1, save_state=written_twice, save_hf=written_twice, score=0.5) == checkpoints.latest()
    assert state_of(checkpoints.best()) == "first"
    save(checkpoints, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"], "the best one stays"


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("anew", [False, True])
def test_a_step_that_is_saved_again_keeps_its_score(tmp_path: Path, resumed: bool, anew: bool) -> None:
    """As by an interrupt after its evaluation."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, score=0.5)
    save(Checkpoints(tmp_path, keep=1) if resumed else checkpoints, 1, anew=anew)
    assert checkpoints.best() == tmp_path / "step-000001"
    save(checkpoints, 1, score=0.25)
    save(checkpoints, 2, score=0.3)
    assert names(tmp_path) == ["step-000002"]


def test_a_process_killed_while_it_replaces_a_checkpoint_leaves_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(Checkpoints(tmp_path), 1, state="old")

    def killed(partial: Path, final: Path) -> None:
        final.rename(final.with_name(f".{final.name}{checkpoint.EARLIER}"))
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(Checkpoints(tmp_path), 1, state="new")
    monkeypatch.undo()
    assert state_of(Checkpoints(tmp_path).latest()) == "old"
    save(Checkpoints(tmp_path), 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert state_of(tmp_path / "step-000001") == "old"


@pytest.mark.parametrize("damage", ["missing", "short", "no manifest", "another manifest", "a flipped bit", "killed"])
def test_latest_ignores_incomplete_checkpoints(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    newer = save(checkpoints, 2)
    if damage == "missing":
        (newer / "weights.bin").unlink()
    elif damage == "short":
        (newer / "weights.bin").write_bytes(b"x")
    elif damage == "no manifest":
        (newer / MANIFEST).unlink()
    elif damage == "another manifest":
        (newer / MANIFEST).write_text("[]")
    elif damage == "a flipped bit":
        manifest = (newer / MANIFEST).read_bytes()
        (newer / MANIFEST).write_bytes(manifest.replace(b"weights", b"w\xe5ights"))
    else:
        newer.rename(tmp_path / ".step-000002.partial")
    assert checkpoints.latest() == tmp_path / "step-000001"
    assert checkpoints.broken() == ([] if damage == "killed" else [newer])
    save(checkpoints, 3)
    assert checkpoints.broken() == []
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize("name", ["weights.bin", "state/value.json", "config.json"])
def test_a_checkpoint_whose_files_have_changed_is_set_aside_and_costs_no_older_one(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    first = save(checkpoints, 1, state="sound", score=1.0)
    second = save(checkpoints, 2, state="other")
    checkpoints.set_damaged_aside()
    assert checkpoints.latest() == second
    data = bytearray((second / name).read_bytes())
    data[len(data) // 2] ^= 1
    (second / name).write_bytes(data)
    checkpoints.set_damaged_aside()
    assert (checkpoints.latest(), checkpoints.broken()) == (first, [second])
    third = save(Checkpoints(tmp_path, keep=1), 3, state="third", score=0.5)
    assert (checkpoints.latest(), checkpoints.best()) == (third, first)
    assert (second / checkpoint.DAMAGED).exists(), "nothing of it is lost"


@pytest.mark.parametrize(("number", "aside"), [(errno.EIO, True), (errno.EACCES, False)])
def test_a_checkpoint_that_a_disk_does_not_read_is_set_aside_and_one_of_another_user_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, aside: bool
) -> None:
    path = save(Checkpoints(tmp_path), 1)

    def unreadable(file: Path) -> int:
        raise OSError(number, "cannot be read")

    monkeypatch.setattr("fastgrpo.training.manifest.checksum", unreadable)
    with nullcontext() if aside else pytest.raises(OSError, match="cannot be read"):
        Checkpoints(tmp_path).set_damaged_aside()
    assert Checkpoints(tmp_path).latest() == (None if aside else path)


def test_a_checkpoint_of_an_older_version_has_no_sums(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path), 1)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sums"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    Checkpoints(tmp_path).set_damaged_aside()
    assert Checkpoints(tmp_path).latest() == path


def test_a_checksum_tells_bits_zeros_and_the_order(tmp_path: Path) -> None:
    size = SUMMED_BYTES
    data = random.Random(0).randbytes(3 * size + 5)
    changed = [
        data,
        data[:-1] + bytes([data[-1] ^ 1]),
        data[:100] + bytes([data[100] ^ 128]) + data[101:],
        data[:size] + bytes(4096) + data[size + 4096 :],
        data[size : 2 * size] + data[:size] + data[2 * size :],
        data[: 2 * size],
        b"",
    ]
    sums = []
    for content in changed:
        (tmp_path / "file").write_bytes(content)
        sums.append(checksum(tmp_path / "file"))
        assert sums[-1] == checksum(tmp_path / "file")
    assert len(set(sums)) == len(changed)


@pytest.mark.parametrize("part", ["weights", "state"])
def test_full_disk_keeps_old_checkpoints_and_leaves_nothing_half_written(tmp_path: Path, part: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, state={"x": 1})
    before = sorted((str(path), path.stat().st_size) for path in tmp_path.rglob("*"))
    big = "x" * 400_000 if part == "state" else ""
    writer = (
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(400_000))) if part == "weights" else save_hf
    )
    with (
        full_disk(50_000),
        pytest.raises(UserError, match=r"cannot write the checkpoint .*step-000002.*free space") as caught,
    ):
        save(checkpoints, 2, state=big, save_hf=writer)
    assert "\n" not in str(caught.value)
    assert sorted((str(path), path.stat().st_size) for path in tmp_path.rglob("*")) == before
    assert state_of(checkpoints.latest()) == {"x": 1}


def test_a_folder_that_is_taken_away_is_told_as_what_it_is(tmp_path: Path) -> None:
    """By safetensors too, whose error is no OSError."""

    def writer(folder: Path) -> None:
        shutil.rmtree(folder)
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")

    with pytest.raises(CannotWrite, match=r"cannot write the checkpoint .*step-000001: No such file or directory;"):
        save(Checkpoints(tmp_path), 1, save_hf=writer)


def test_interrupt_and_bugs_pass_through_and_leave_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        save_hf(folder)
        raise KeyboardInterrupt

    def broken(folder: Path) -> None:
        raise RuntimeError("shapes differ")

    for writer, error in ((interrupted, KeyboardInterrupt), (broken, RuntimeError)):
        with pytest.raises(error):
            save(Checkpoints(tmp_path), 1, save_hf=writer)
        assert names(tmp_path) == []


@pytest.mark.parametrize("change", [{"grpo.lr": 0.5}, {"model.lora_rank": 8}, {"seed": 1}, {"grpo.loss": "gspo"}])
def test_refuses_to_resume_with_another_configuration(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(Checkpoints(tmp_path), 1)
    with pytest.raises(UserError, match=r"cannot resume .*step-000001: .* was .* and is now .*another --name"):
        load(path, resolve(change), lambda folder: None)


def test_may_resume_with_more_steps_or_another_place(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path), 1)
    change = {"grpo.steps": 999, "name": "x", "checkpoint.keep": 9, "sandbox.cells": 3, "engine.parity_threshold": 1.0}
    change |= {"engine.kv_cache_dtype": "fp8", "grpo.micro_batch_tokens": 64}  # as errors advise
    change |= {"model.gradient_checkpointing": True, "model.recompute_mlp": True, "model.offload_optimizer": True}
    assert load(path, resolve(change), lambda folder: None) == 1


def test_resumes_a_run_of_several_data_sets(tmp_path: Path) -> None:
    sets = {"data.dataset": ("humaneval", "mbpp.json"), "data.held_out": (44, 120), "data.weights": (1.0, 2.0)}
    path = save(Checkpoints(tmp_path), 1, config=resolve(sets))
    assert load(path, resolve(sets), lambda folder: None) == 1
    with pytest.raises(UserError, match=r"data\.held_out was"):
        load(path, resolve(sets | {"data.held_out": (44, 121)}), lambda folder: None)


def test_a_manifest_holds_no_login_and_none_is_missed(tmp_path: Path) -> None:
    """Checkpoints are passed on; the login is in the run's config.toml."""
    config = resolve({"workers.base_url": "http://otto:geheim@host/v1", "sandbox.hosts": ("http://otto:geheim@jails",)})
    path = save(Checkpoints(tmp_path), 1, config=config)
    manifest = (path / MANIFEST).read_text()
    assert "geheim" not in manifest
    assert '"http://host/v1"' in manifest
    assert '"http://jails"' in manifest
    assert load(path, config, lambda folder: None) == 1


def test_a_key_younger_than_the_checkpoint_had_its_default(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path), 1)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["config"]["grpo.max_lag"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert load(path, Config(), lambda folder: None) == 1
    with pytest.raises(UserError, match=r"grpo.max_lag was 0 and is now 1"):
        load(path, resolve({"grpo.max_lag": 1}), lambda folder: None)


def test_damaged_state_is_a_user_error(tmp_path: Path) -> None:
    optimizer = AdamW([torch.nn.Parameter(torch.randn(3))], AdamWOptions(lr=1e-2))
    path = save(Checkpoints(tmp_path), 1, save_state=optimizer_writer(optimizer))
    (state,) = (path / checkpoint.STATE).iterdir()
    state.write_bytes(b"x" * state.stat().st_size)
    with pytest.raises(UserError, match=r"checkpoint .*step-000001 is damaged \(.*\): resume from an older one"):
        load(path, Config(), optimizer.load)

    def says_nothing(folder: Path) -> None:
        raise AssertionError

    with pytest.raises(UserError, match=r"step-000001 is damaged \(AssertionError\)"):
        load(path, Config(), says_nothing)
    state.write_bytes(b"x")
    with pytest.raises(UserError, match="is not whole"):
        load(path, Config(), optimizer.load)


def test_state_of_another_model_is_a_user_error(tmp_path: Path) -> None:
    path = save(
        Checkpoints(tmp_path),
        1,
        save_state=optimizer_writer(AdamW([torch.nn.Parameter(torch.randn(3))], AdamWOptions(lr=1e-2))),
    )
    with pytest.raises(UserError, match="is damaged"):
        load(path, Config(), AdamW([torch.nn.Parameter(torch.randn(5))], AdamWOptions(lr=1e-2)).load)


def test_a_file_that_joins_a_checkpoint_is_there_wholly_or_not_wherever_the_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed with its sum once it is there; one that it replaces is not listed while it does."""

    class Killed(BaseException):
        pass

    replace, after = Path.replace, 0
    for name, earlier in [("new", False), ("old", True)]:
        for kill in range(4):
            checkpoints = Checkpoints(tmp_path / f"{name}{kill}")
            save(checkpoints, 3)
            if earlier:
                checkpoints.add(3, "more", b"earlier")
                checkpoints.wait()
            after = kill

            def counted(self: Path, target: Path) -> Path:
                nonlocal after
                after -= 1
                if after < 0:
                    raise Killed
                return replace(self, target)

            with monkeypatch.context() as patch, suppress(Killed):
                patch.setattr(Path, "replace", counted)
                checkpoints.add(3, "more", b"later")
                checkpoints.wait()
            found = Checkpoints(tmp_path / f"{name}{kill}")
            found.set_damaged_aside()
            folder = found.latest()
            assert folder is not None, (name, kill)
            file = folder / "state" / "more"
            assert not file.exists() or file.read_bytes() in (b"later", b"earlier")
            done = kill >= (3 if earlier else 2)
            listed = json.loads((folder / "manifest.json").read_bytes())["files"]
            assert ("state/more" in listed) == (done or (earlier and kill == 0)), (name, kill)
    (tmp_path / "gone").mkdir()
    Checkpoints(tmp_path / "gone").add(3, "more", b"of one that is kept no longer")
    assert not list((tmp_path / "gone").iterdir())
