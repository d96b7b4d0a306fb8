"""Atomic, resumable checkpoints: each is a Hugging Face model folder with the trainer's state beside the weights.

A checkpoint is written under a hidden name, flushed to the disk, then renamed: `step-000123` either is whole or is not
there. Its manifest lists every file's size, so that a folder copied in part is not taken for a checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastgrpo.config import Config, flat, refuse_changes
from fastgrpo.errors import UserError

STATE, MANIFEST = "trainer.pt", "manifest.json"
DISK_FULL = re.compile(r"No space left|File too large|Disk quota|I/O error|file write failed|unexpected pos", re.I)


class _Entry(NamedTuple):
    step: int
    score: float | None
    path: Path


class Checkpoints:
    """The checkpoints of one run, in `folder`: the latest `keep` and, where scores were given, the best one."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        step: int,
        *,
        save_hf: Callable[[Path], object],
        state: dict[str, Any],
        config: Config,
        score: float | None = None,
    ) -> Path:
        """Write checkpoint `step` and delete those no longer kept; returns its folder.

        `save_hf` writes model and tokenizer into the folder it is given; `state` holds what `torch.load` reads with
        `weights_only=True` (tensors, numbers, strings, containers). Raises `UserError` where it cannot be written: then
        no half-written folder stays and older checkpoints are as they were.
        """
        final = self.folder / f"step-{step:06d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            self._remove_partial()
            partial.mkdir(parents=True)
            save_hf(partial)
            torch.save({"step": step, "config": flat(config), "state": state}, partial / STATE)
            _write_manifest(partial, step, score)
            _flush(partial)
            _replace(partial, final)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) or DISK_FULL.search(str(error)):
                reason = getattr(error, "strerror", None) or "no space left on the disk"
                message = f"cannot write the checkpoint {final}: {reason}; free space, then continue with --resume"
                raise UserError(message) from None
            raise
        self._remove_old()
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None where there is none."""
        entries = self._entries()
        return entries[-1].path if entries else None

    def best(self) -> Path | None:
        """The whole checkpoint with the highest score, the newest among equals; None where none has a score."""
        scored = [entry for entry in self._entries() if entry.score is not None]
        return max(scored, key=lambda entry: (entry.score, entry.step)).path if scored else None

    def _entries(self) -> list[_Entry]:
        found = []
        for path in self.folder.glob("step-*"):
            manifest = _read_manifest(path)
            if manifest is not None:
                found.append(_Entry(manifest["step"], manifest["score"], path))
        return sorted(found, key=lambda entry: entry.step)

    def _remove_old(self) -> None:
        kept = {entry.path for entry in self._entries()[-self.keep :]} | {self.best()}
        for entry in self._entries():
            if entry.path not in kept:
                shutil.rmtree(entry.path)

    def _remove_partial(self) -> None:
        """Folders that a killed process left."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path)


def load(path: Path, config: Config) -> tuple[int, dict[str, Any]]:
    """Step and state of a checkpoint, tensors on the CPU, for a run of `config` that continues it.

    Raises `UserError` where the checkpoint is damaged, or `config` differs in something that would change the numbers.
    """
    try:
        content = torch.load(path / STATE, map_location="cpu", weights_only=True)
        step, saved, state = content["step"], content["config"], content["state"]
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the checkpoint {path} is damaged ({reason}): delete it and resume from an older one"
        ) from None
    refuse_changes(saved, config, source=path)
    return step, state


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators, in types that `weights_only` loads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set the global generators to what `rng_state` returned."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _write_manifest(folder: Path, step: int, score: float | None) -> None:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "score": score, "files": files}), encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole checkpoint, None where a file is missing or has another size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError):
        return None
    return manifest if whole else None


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _flush(folder: Path) -> None:
    """Wait until the folder, its files and the folders in it are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(partial: Path, final: Path) -> None:
    """Rename, with an earlier checkpoint of the same step moved out of the way, and make the rename durable."""
    earlier = final.with_name(f".{final.name}.earlier")
    if final.exists():
        final.rename(earlier)
    partial.rename(final)
    _fsync(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)
