"""Atomic, resumable checkpoints: each is a Hugging Face model folder with the trainer's state beside the weights.

A checkpoint is written under a hidden name, flushed to the disk, then renamed: `step-000123` either is whole or is not
there. Its manifest lists every file's size, so that a folder copied in part is not taken for a checkpoint, and its
checksum, which is compared where a run is resumed. Every rank writes its part of the state, the first one the rest:
they must see one file system.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from torch.distributed.checkpoint.api import CheckpointException

from fastgrpo.config import Config
from fastgrpo.config_files import flat
from fastgrpo.errors import UserError, last_line, replace_file, writing
from fastgrpo.ranks.collectives import gather_all, is_first_rank
from fastgrpo.run_folder import refuse_changes

log = logging.getLogger(__name__)
STATE, MANIFEST, EARLIER = "state", "manifest.json", ".earlier"
# What a checkpoint whose files have changed has instead of its manifest.
DAMAGED = "manifest.damaged.json"
SUMMED_BYTES = 2**20
READERS = 8


class _Entry(NamedTuple):
    step: int
    score: float | None
    path: Path


class _Manifest(msgspec.Struct):
    """`files`: the size of each in bytes; `config`: of the run, by dotted names; `sums`: each file's `checksum`.

    An older version wrote no sums.
    """

    step: int
    config: dict[str, Any]
    files: dict[str, int]
    score: float | None = None
    sums: dict[str, int] = {}


class Checkpoints:
    """The checkpoints of one run, in `folder`: the latest `keep` and, where scores were given, the best one."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self._saved: int | None = None

    def save(
        self,
        step: int,
        *,
        save_hf: Callable[[Path], object],
        save_state: Callable[[Path], object],
        config: Config,
        score: float | None = None,
        anew: bool = False,
    ) -> Path:
        """Write checkpoint `step` and delete those no longer kept; returns its folder. Collective over the ranks.

        `save_hf` and `save_state` are called with a folder on every rank: the first rank writes model and tokenizer
        there, and each rank its part of the state. A step that this object has written already is given its score
        alone, unless it is to be written `anew`; without a `score` a step keeps the one that it had. Raises
        `CannotWrite` where it cannot be written: then no half-written folder stays and older checkpoints are as they
        were.
        """
        final = self.folder / f"step-{step:06d}"
        partial = self.folder / f".{final.name}.partial"
        first = is_first_rank()
        try:
            with writing(f"the checkpoint {final}"):
                if first and score is None and (earlier := _read_manifest(final)):
                    score = earlier.score
                if anew or step != self._saved:
                    if first:
                        self._clear()
                        (partial / STATE).mkdir(parents=True)
                    gather_all(None, "the checkpoint's folder")
                    save_state(partial / STATE)
                    save_hf(partial)
                    if first:
                        _write_manifest(partial, step, score, config)
                        _replace(partial, final)
                elif first:
                    _amend(final, score=score)
                if first:
                    self._remove_old()
        except BaseException:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._saved = step
        return final

    def add(self, step: int, name: str, data: bytes) -> None:
        """A further file of the state of checkpoint `step`, where that is kept still; raises `CannotWrite`.

        For one rank alone. A process that is killed meanwhile leaves the checkpoint whole, with the file or without.
        """
        folder, listed = self.folder / f"step-{step:06d}", f"{STATE}/{name}"
        manifest = _read_manifest(folder)
        if manifest is None:
            return
        with writing(f"the checkpoint {folder}"):
            files, sums = ({k: v for k, v in each.items() if k != listed} for each in (manifest.files, manifest.sums))
            if listed in manifest.files:
                _amend(folder, files=files, sums=sums)
            replace_file(folder / listed, data)
            _fsync(folder / STATE)
            added = checksum(folder / listed)
            _amend(folder, files=files | {listed: len(data)}, sums=sums | {listed: added})

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None where there is none."""
        entries = self._entries()
        return entries[-1].path if entries else None

    def set_damaged_aside(self) -> None:
        """Make a newest checkpoint of which a file has changed since it was written no whole one: it goes to no run.

        All files of the newest ones are read for it, back to the first that is as it was. Raises OSError.
        """
        for entry in reversed(self._entries()):
            if _unchanged(entry.path):
                return
            (entry.path / MANIFEST).replace(entry.path / DAMAGED)

    def broken(self) -> list[Path]:
        """What would come after the latest one and is no whole checkpoint, as where it was copied in part."""
        latest = self.latest()
        after = latest.name.removeprefix(".") if latest else ""
        steps = sorted(path for path in self.folder.glob("step-[0-9]*") if path.is_dir() and path.name > after)
        return [path for path in steps if _read_manifest(path) is None]

    def best(self) -> Path | None:
        """The whole checkpoint with the highest score, the newest among equals; None where none has a score."""
        scored = [entry for entry in self._entries() if entry.score is not None]
        return max(scored, key=lambda entry: (entry.score, entry.step)).path if scored else None

    def _entries(self) -> list[_Entry]:
        found = []
        for path in (*self.folder.glob("step-*"), *self._set_aside()):
            manifest = _read_manifest(path)
            if manifest is not None:
                found.append(_Entry(manifest.step, manifest.score, path))
        return sorted(found, key=lambda entry: entry.step)

    def _remove_old(self) -> None:
        kept = {entry.path for entry in self._entries()[-self.keep :]} | {self.best()}
        for entry in self._entries():
            if entry.path not in kept:
                _remove(entry.path)

    def _set_aside(self) -> list[Path]:
        """Whole checkpoints that a process was replacing when it was killed."""
        return [path for path in self.folder.glob(f".step-*{EARLIER}") if not _replaced_by(path).exists()]

    def _clear(self) -> None:
        """Put back what a killed process had set aside, and remove what else it left."""
        for path in self._set_aside():
            path.rename(_replaced_by(path))
        for path in self.folder.glob(".step-*"):
            _remove(path)


def load(path: Path, config: Config, load_state: Callable[[Path], object]) -> int:
    """Step of a checkpoint, for a run of `config` that continues it; `load_state` reads the state's folder.

    Raises `UserError` where the checkpoint is damaged, or `config` differs in something that would change the numbers.
    """
    manifest = _read_manifest(path)
    if manifest is None:
        raise UserError(f"the checkpoint {path} is not whole: resume from an older one")
    refuse_changes(manifest.config, config, source=path)
    try:
        load_state(path / STATE)
    except (Exception, CheckpointException) as error:
        raise UserError(f"the checkpoint {path} is damaged ({last_line(error)}): resume from an older one") from None
    return manifest.step


def _amend(folder: Path, **changes: Any) -> None:
    """Change the manifest of a whole checkpoint."""
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Manifest)
    replace_file(folder / MANIFEST, msgspec.json.encode(msgspec.structs.replace(manifest, **changes)))
    _fsync(folder)


def _write_manifest(folder: Path, step: int, score: float | None, config: Config) -> None:
    """The manifest, once all files of the folder are on the disk; sums are made of them while that is waited for."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    with ThreadPoolExecutor(READERS) as readers:
        sums = readers.map(checksum, (folder / name for name in files))
        flush(folder)
    manifest = _Manifest(step, flat(config, logins=False), files, score, dict(zip(files, sums, strict=True)))
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    _fsync(folder / MANIFEST)
    _fsync(folder)


def checksum(path: Path) -> int:
    """A sum of the file's 64-bit words for each `SUMMED_BYTES`, and the CRC-32 of these sums.

    A bit, a page of zeros or pages in another order change it. It takes a quarter of the time of a CRC-32 of all bytes,
    3 % of that of the checkpoint on a disk.
    """
    words, crc = np.empty(SUMMED_BYTES // 8, np.uint64), 0
    octets = words.view(np.uint8)
    with path.open("rb") as file:  # buffered: one that is not may read less than it could
        while count := file.readinto(octets.data):
            octets[count : -(-count // 8) * 8] = 0
            crc = zlib.crc32(words[: -(-count // 8)].sum().tobytes(), crc)
    return crc


def _unchanged(folder: Path) -> bool:
    """Whether each file of a whole checkpoint is as it was written, as far as its manifest has sums."""
    manifest = _read_manifest(folder)
    try:
        with ThreadPoolExecutor(READERS) as readers:
            sums = manifest.sums if manifest else {}
            found = readers.map(checksum, (folder / name for name in sums))
            return manifest is not None and list(found) == list(sums.values())
    except OSError as error:
        # Of what may not be read, nobody knows.
        if error.errno != errno.EIO:
            raise
        return False


def _read_manifest(folder: Path) -> _Manifest | None:
    """The manifest of a whole checkpoint, None where a file is missing, has another size or cannot be read."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Manifest)
        whole = all((folder / name).stat().st_size == size for name, size in manifest.files.items())
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
        return None
    return manifest if whole else None


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def flush(folder: Path) -> None:
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
    earlier = final.with_name(f".{final.name}{EARLIER}")
    if final.exists():
        final.rename(earlier)
    partial.rename(final)
    _fsync(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove what is kept no longer; where that fails, as on NFS while somebody reads it, it stays and that is said."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s is kept no longer and cannot be removed (%s): remove it by hand", folder, error.strerror)


def _replaced_by(earlier: Path) -> Path:
    return earlier.with_name(earlier.name.removeprefix(".").removesuffix(EARLIER))
