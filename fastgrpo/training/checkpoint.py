"""Atomic, resumable checkpoints: each is a Hugging Face model folder with the trainer's state beside the weights.

The state is copied into host memory, for which training waits, and written behind what comes (`behind.py`), under a
hidden name, flushed to the disk, then renamed: `step-000123` either is whole or is not there. Its manifest
(`manifest.py`) tells a folder that was copied in part, or whose files have changed since. Every rank writes its part of
the state, the first one the rest: they must see one file system.
"""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch.distributed.checkpoint.api import CheckpointException

from fastgrpo.config import Config
from fastgrpo.errors import UserError, last_line, writing
from fastgrpo.policy.host_memory import host_memory_free
from fastgrpo.ranks.collectives import gather_all, is_first_rank
from fastgrpo.run_folder import refuse_changes
from fastgrpo.training.behind import Behind
from fastgrpo.training.manifest import MANIFEST, add_file, amend, fsync, read_manifest, unchanged, write_manifest

log = logging.getLogger(__name__)
STATE, EARLIER = "state", ".earlier"
# What a checkpoint whose files have changed has instead of its manifest.
DAMAGED = "manifest.damaged.json"
# Of the host's memory, for all that grows while a copy is there.
ROOM_LEFT = 2**30


class _Entry(NamedTuple):
    step: int
    score: float | None
    path: Path


class Checkpoints:
    """The checkpoints of one run, in `folder`: the latest `keep` and, where scores were given, the best one.

    They are written in a thread, one after the other, while whoever has begun them goes on. What could not be written
    is raised by the next call of `save`, `check` or `wait`, and at the end of `written`: on every rank, once.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self._saved: int | None = None
        self._behind = Behind()
        self._told = False

    def save(
        self,
        step: int,
        *,
        take: Callable[[bool], Callable[[Path], object]],
        size: int,
        config: Config,
        score: float | None = None,
        anew: bool = False,
    ) -> Path:
        """Begin checkpoint `step`, and delete those no longer kept once it is there; returns its folder. Collective.

        `take(True)` copies the state into host memory, `size` bytes of it here, and returns what writes that into a
        folder, on every rank its part: the model, and in `STATE` the rest. That may not be collective. Where a host has
        no room for its ranks' copies it is `take(False)`, which may leave out to copy, and all is written on return.

        A step that this object has saved already is given its score alone, unless it is to be written `anew`; without
        a `score` a step keeps the one that it had. Where it cannot be written (`CannotWrite`), no half-written folder
        stays and older checkpoints are as they were.
        """
        final = self.folder / f"step-{step:06d}"
        if step == self._saved and not anew:
            self._begin(final, lambda: self._score(final, score))
            return final
        # Two copies would not fit.
        self.wait()
        room = self._has_room(size)
        write = take(room)
        self._behind.begin(lambda: self._write(final, step, write, config, score), at_once=not room)
        self._saved = step
        return final

    def add(self, step: int, name: str, data: bytes) -> None:
        """Begin a further file of the state of checkpoint `step`, the first rank's `data`, if that is kept still.

        A process that is killed meanwhile leaves the checkpoint whole, with the file or without. Collective.
        """
        folder = self.folder / f"step-{step:06d}"
        self._begin(folder, lambda: add_file(folder, f"{STATE}/{name}", data))

    def check(self) -> None:
        """Raise `CannotWrite` where something that was begun has failed; collective."""
        self._behind.check()

    def wait(self) -> None:
        """Wait until all that was begun is written. Raises `CannotWrite`."""
        self._behind.wait()

    @contextmanager
    def written(self) -> Iterator[None]:
        """A block at whose end all that it has begun is written, or `CannotWrite` raised.

        Where an error ends the block, that one is raised, and what could not be written as well is logged.
        """
        failed = False
        try:
            yield
        except Exception:
            failed = True
            raise
        finally:
            try:
                self._behind.close()
            except Exception as error:
                if not failed:
                    raise
                log.warning("%s", error)

    def _begin(self, folder: Path, change: Callable[[], object]) -> None:
        """Begin a `change` to the whole checkpoint `folder`, which is the first rank's."""
        change = change if is_first_rank() else _nothing
        self._behind.begin(lambda: self._together(folder, change))

    def _together(self, folder: Path, work: Callable[[], object]) -> None:
        def do() -> None:
            with writing(f"the checkpoint {folder}"):
                work()

        self._behind.together(do)

    def _has_room(self, size: int) -> bool:
        """Whether each host has room for copies of `size` bytes on this rank; said once where not. Collective."""
        mine = socket.gethostname(), size, host_memory_free()
        ranks = gather_all(mine, "the sizes of the other ranks' checkpoints")
        for host in {host for host, _, _ in ranks}:
            need = sum(taken for name, taken, _ in ranks if name == host) + ROOM_LEFT
            free = min(left for name, _, left in ranks if name == host)
            if need > free:
                if is_first_rank() and not self._told:
                    sizes = f"{need / 2**30:.1f} GiB on {host}, where {free / 2**30:.1f} are free"
                    log.warning("training waits while a checkpoint is written: a copy of the state needs %s", sizes)
                self._told = True
                return False
        return True

    def _write(
        self, final: Path, step: int, write: Callable[[Path], object], config: Config, score: float | None
    ) -> None:
        partial, first = final.with_name(f".{final.name}.partial"), is_first_rank()

        def begin() -> None:
            self._clear()
            (partial / STATE).mkdir(parents=True)

        def end() -> None:
            earlier = read_manifest(final)
            kept = earlier.score if earlier and score is None else score
            write_manifest(partial, step, kept, config)
            _replace(partial, final)
            self._remove_old()

        try:
            self._together(final, begin if first else _nothing)
            self._together(final, lambda: write(partial))
            self._together(final, end if first else _nothing)
        except BaseException:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _score(self, folder: Path, score: float | None) -> None:
        manifest = read_manifest(folder)
        if manifest is not None and score is not None:
            amend(folder, manifest, score=score)
            self._remove_old()

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None where there is none; what was begun is written first."""
        self.wait()
        entries = self._entries()
        return entries[-1].path if entries else None

    def set_damaged_aside(self) -> None:
        """Make a newest checkpoint of which a file has changed since it was written no whole one: it goes to no run.

        All files of the newest ones are read for it, back to the first that is as it was. Raises OSError.
        """
        for entry in reversed(self._entries()):
            if unchanged(entry.path):
                return
            (entry.path / MANIFEST).replace(entry.path / DAMAGED)

    def broken(self) -> list[Path]:
        """What would come after the latest one and is no whole checkpoint, as where it was copied in part."""
        latest = self.latest()
        after = latest.name.removeprefix(".") if latest else ""
        steps = sorted(path for path in self.folder.glob("step-[0-9]*") if path.is_dir() and path.name > after)
        return [path for path in steps if read_manifest(path) is None]

    def best(self) -> Path | None:
        """The whole checkpoint with the highest score, the newest among equals; None where none has a score."""
        self.wait()
        return self._best()

    def _best(self) -> Path | None:
        scored = [entry for entry in self._entries() if entry.score is not None]
        return max(scored, key=lambda entry: (entry.score, entry.step)).path if scored else None

    def _entries(self) -> list[_Entry]:
        found = []
        for path in (*self.folder.glob("step-*"), *self._set_aside()):
            manifest = read_manifest(path)
            if manifest is not None:
                found.append(_Entry(manifest.step, manifest.score, path))
        return sorted(found, key=lambda entry: entry.step)

    def _remove_old(self) -> None:
        kept = {entry.path for entry in self._entries()[-self.keep :]} | {self._best()}
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
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"the checkpoint {path} is not whole: resume from an older one")
    refuse_changes(manifest.config, config, source=path)
    try:
        load_state(path / STATE)
    except (Exception, CheckpointException) as error:
        raise UserError(f"the checkpoint {path} is damaged ({last_line(error)}): resume from an older one") from None
    return manifest.step


def _nothing() -> None:
    """A part in what the first rank does."""


def _replace(partial: Path, final: Path) -> None:
    """Rename, with an earlier checkpoint of the same step moved out of the way, and make the rename durable."""
    earlier = final.with_name(f".{final.name}{EARLIER}")
    if final.exists():
        final.rename(earlier)
    partial.rename(final)
    fsync(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove what is kept no longer; where that fails, as on NFS while somebody reads it, it stays and that is said."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s is kept no longer and cannot be removed (%s): remove it by hand", folder, error.strerror)


def _replaced_by(earlier: Path) -> Path:
    return earlier.with_name(earlier.name.removeprefix(".").removesuffix(EARLIER))
