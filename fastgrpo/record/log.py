"""What a run leaves to read: metrics.jsonl, samples.jsonl, TensorBoard events and a live display of the current step.

Metric names, the same in every file: `reward/total`, `reward/performance`, `reward/complexity`, `reward/diversity`,
`reward/format`, `pass_rate`, `complexity`, `loss`, `kl`, `entropy`, `grad_norm`, `tokens_per_s` (generated),
`train_tokens_per_s`, `mfu` and `gpu/...` (see `record.gpu`), `parity` (mean |logprob difference| of vLLM and trainer
after the sync, nats), `jails` (in flight), `seconds/step` and `seconds/<phase>`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import msgspec
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fastgrpo.config import Config
from fastgrpo.config_files import open_folder
from fastgrpo.errors import UserError
from fastgrpo.ranks.collectives import gather_all, rank_and_world
from fastgrpo.record.display import Display
from fastgrpo.record.phases import PhaseTimer


class _Position(msgspec.Struct):
    """The fields of a line that say where in the run it belongs."""

    stage: str
    step: int


class JsonLines:
    """An append-only file of JSON lines, one write a line: a full disk loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise _cannot_write(path, error) from None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record whole, or leave the file as it was and raise `UserError` (disk full)."""
        line = msgspec.json.encode(record) + b"\n"
        size = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, size)
            raise _cannot_write(self.path, error) from None

    def cut(self, stage: str, step: int) -> None:
        """Drop everything from the first line of `stage` after `step` on, and a line torn by a crash."""
        end = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n") or _is_after(line, stage, step):
                    break
                end += len(line)
        os.ftruncate(self._file, end)

    def close(self) -> None:
        """Flush to the disk and close."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        finally:
            os.close(self._file)


def _is_after(line: bytes, stage: str, step: int) -> bool:
    try:
        position = msgspec.json.decode(line, type=_Position)
    except msgspec.DecodeError:
        return True
    return position.stage == stage and position.step > step


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}; free space and continue with --resume (all before is kept)"
    )


class EventFile:
    """TensorBoard scalars of one stage, written in this thread so that an error is ours to report."""

    def __init__(self, folder: Path, after_step: int) -> None:
        if after_step == 0 and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._writer = RecordWriter(self.path.open("wb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if after_step:
            # A session log of START makes TensorBoard forget what an interrupted run wrote from this step on.
            start = Event(wall_time=time.time(), step=after_step + 1)
            start.session_log.status = start.session_log.START
            self._write(start)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each metric's curve. Raises `UserError` (disk full)."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def close(self) -> None:
        """Close the file; a full disk was reported by the write itself."""
        try:
            self._writer.close()
        except OSError as error:
            raise _cannot_write(self.path, error) from None


class RunLog:
    """The log of one run's folder: a context manager; every write raises `UserError` where the disk is full.

    `folder` None writes and shows nothing (the other ranks of a distributed run). `live` None shows the live display
    on a terminal and plain lines elsewhere.
    """

    def __init__(self, folder: Path | None, *, live: bool | None = None) -> None:
        self.folder = folder
        self.timer = PhaseTimer()
        self.phase = self.timer.phase
        self._stage = ""
        self._events: EventFile | None = None
        if folder is not None:
            self._metrics = JsonLines(folder / "metrics.jsonl")
            self._samples = JsonLines(folder / "samples.jsonl")
            self._display = Display(folder.name, self.timer, live=live)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def stage(self, name: str, total: int, *, done: int = 0) -> None:
        """Begin a stage of `total` steps, of which `done` are in the files already; what they hold after it is cut."""
        self._stage = name
        self.timer.take()
        if self.folder is None:
            return
        for file in (self._metrics, self._samples):
            file.cut(name, done)
        if self._events is not None:
            self._events.close()
        try:
            self._events = EventFile(self.folder / "tensorboard" / name, done)
        except OSError as error:
            raise _cannot_write(self.folder / "tensorboard" / name, error) from None
        self._display.stage(name, total, done)

    def step(self, step: int, metrics: Mapping[str, float], *, waited_for: str = "") -> None:
        """Record the `step`th step (from 1) of the stage, with the seconds of its phases and what it waited for."""
        phases = self.timer.take()
        if self.folder is None:
            return
        seconds = {f"seconds/{name}": spent for name, spent in phases.items()}
        row = {**metrics, "seconds/step": sum(phases.values()), **seconds}
        waiting = {"waited_for": waited_for} if waited_for else {}
        self._metrics.append({"stage": self._stage, "step": step, "time": time.time(), **row, **waiting})
        if self._events is not None:
            self._events.append(step, row)
        self._display.step(step, row, waited_for)

    def samples(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Append plain records (prompt, workflow, worker calls, tests, reward) of the step to samples.jsonl."""
        if self.folder is not None:
            for record in records:
                self._samples.append({"stage": self._stage, "step": step, **record})

    def status(self, **values: float) -> None:
        """Show values of the running step, such as `jails` and `tokens_per_s`, on the live display only."""
        if self.folder is not None:
            self._display.status(values)

    def say(self, text: str) -> None:
        """Print a line above the live display."""
        if self.folder is not None:
            self._display.say(text)

    def close(self) -> None:
        """End the display and close the files."""
        if self.folder is None:
            return
        with ExitStack() as closing:
            for part in (self._metrics, self._samples, self._events, self._display):
                if part is not None:
                    closing.callback(part.close)


def open_log(config: Config, *, resume: bool) -> RunLog:
    """The run's folder and its log; the ranks after the first write nothing."""
    first = rank_and_world()[0] == 0
    folder = open_folder(config, resume=resume) if first else None
    gather_all(None, "the run's folder")
    return RunLog(folder)
