"""What a run leaves to read: metrics.jsonl, samples.jsonl, TensorBoard events and a live display of the current step.

W&B or trackio beside them (`record.trackers`). docs/metrics.md lists the metrics, which have one name in all of these.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self
from uuid import uuid4

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fastgrpo.config import Config, Record
from fastgrpo.config_files import flat, read_saved
from fastgrpo.errors import UserError, this_rank, writing
from fastgrpo.ranks.collectives import gather_all, gather_first, is_first_rank, rank_and_world
from fastgrpo.record.display import Display
from fastgrpo.record.json_lines import JsonLines, RotatingLines, encoded
from fastgrpo.record.phases import PhaseTimer
from fastgrpo.record.trackers import Tracker, find_tracker, tracker_module
from fastgrpo.run_folder import held_name, open_folder


class EventFile:
    """TensorBoard scalars of one stage, written in this thread so that an error is ours to report."""

    def __init__(self, folder: Path, after_step: int) -> None:
        with writing(folder):
            if after_step == 0 and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads files in the order of their names, and a clock may have been set back.
            number = max([time.time_ns(), *(1 + _time_of(path) for path in folder.iterdir())])
        self.path = folder / f"events.out.tfevents.{number}.{os.getpid()}"
        with writing(self.path):
            self._writer = RecordWriter(self.path.open("wb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if after_step:
            # A session log of START makes TensorBoard forget what an interrupted run wrote from this step on.
            start = Event(wall_time=time.time(), step=after_step + 1)
            start.session_log.status = start.session_log.START
            self._write(start)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each metric's curve. Raises `CannotWrite` (disk full)."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        with writing(self.path):
            self._writer.write(event.SerializeToString())
            self._writer.flush()

    def close(self) -> None:
        """Close the file; a full disk was reported by the write itself."""
        with writing(self.path):
            self._writer.close()


def _time_of(events: Path) -> int:
    """When a file of events began, in nanoseconds, by its name; 0 for another file."""
    found = re.match(r"events\.out\.tfevents\.(\d+)\.", events.name)
    return int(found[1]) if found else 0


class RunLog:
    """The log of one run's folder: a context manager; every write raises `CannotWrite` where the disk is full.

    `folder` None writes and shows nothing (the other ranks of a distributed run). `live` None shows the live display
    on a terminal and plain lines elsewhere. `settings`: what a tracker shows as the run's configuration.
    Raises `UserError` where the tracker that `record` names is not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        live: bool | None = None,
        record: Record | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self.timer = PhaseTimer()
        self.phase = self.timer.phase
        self._stage = ""
        self._events: EventFile | None = None
        self._tracker: Tracker | None = None
        if folder is not None:
            record = record or Record()
            self._metrics = JsonLines(folder / "metrics.jsonl")
            self._samples = RotatingLines(folder / "samples.jsonl", record.samples_mib * 2**20)
            self._tracker = find_tracker(record.tracker, folder, settings, self.say)
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
        self._metrics.cut(name, done)
        self._samples.cut(name, done)
        if self._events is not None:
            self._events.close()
        self._events = EventFile(self.folder / "tensorboard" / name, done)
        if self._tracker is not None:
            self._tracker.stage(name)
        self._display.stage(name, total, done)

    def step(self, step: int, metrics: Mapping[str, float], *, waited_for: str = "") -> None:
        """Record the `step`th step (from 1) of the stage, with the seconds of its phases and what it waited for."""
        phases = self.timer.take()
        if self.folder is None:
            return
        seconds = {f"seconds/{name}": spent for name, spent in phases.items()}
        row = {**metrics, "seconds/step": sum(phases.values()), **seconds}
        waiting = {"waited_for": waited_for} if waited_for else {}
        self._metrics.append({"stage": self._stage, "step": step, "time": time.time()} | row | waiting)
        if self._events is not None:
            self._events.append(step, row)
        if self._tracker is not None:
            self._tracker.step(step, row)
        self._display.step(step, row, waited_for)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Append all ranks' plain records of the step (prompt, completions, reward) to samples.jsonl; collective.

        A tracker is shown some of this rank's.
        """
        # Each rank encodes its own: on the first one alone they would take as long as there are ranks.
        lines = [encoded({"stage": self._stage, "step": step, **record}) for record in records]
        ranks = gather_first(lines, "the records of the other ranks' rollouts")
        if self.folder is None:
            return
        self._samples.extend(line for rank in ranks for line in rank)
        if self._tracker is not None:
            self._tracker.samples(step, records)

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
            for part in (self._metrics, self._samples, self._events, self._tracker, self._display):
                if part is not None:
                    closing.callback(part.close)


def refuse_unshared(folder: Path) -> None:
    """Raise UserError where a rank cannot write where the first one reads: into what the run's `folder` is in.

    Each rank writes its part of a checkpoint there. Collective.
    """
    rank, world = rank_and_world()
    if world == 1:
        return
    runs, why = folder.parent, "it is another folder there"
    if rank == 0:
        with writing(f"to {runs}", "free space or set --runs"):
            runs.mkdir(parents=True, exist_ok=True)
    # A name that no file system can have cached.
    mark = gather_all(uuid4().hex, "the folder of runs")[0]
    try:
        (runs / f".{mark}.{rank}").touch()
    except OSError as error:
        why = error.strerror or why
    ranks = gather_all((this_rank(), why), "the marks in the folder of runs")
    # As the first rank sees it.
    unseen = [other for other in range(world) if rank == 0 and not (runs / f".{mark}.{other}").exists()]
    missing = gather_all(unseen, "the look at the marks in the folder of runs")[0]
    with suppress(OSError):
        (runs / f".{mark}.{rank}").unlink(missing_ok=True)
    if missing:
        name, why = ranks[missing[0]]
        raise UserError(
            f"{name} cannot write where {ranks[0][0]} reads, in {runs.absolute()} ({why}): set --runs to a folder on a "
            "file system that all hosts share"
        )


@contextmanager
def open_log(config: Config, *, resume: bool, data: Mapping[str, str] = MappingProxyType({})) -> Iterator[RunLog]:
    """The run's folder, which no other process has meanwhile, and its log; the ranks after the first write nothing.

    `data` on the first rank: a digest of each data set, which one to `resume` must have been begun with.
    A tracker that is not installed is told before the folder is opened, which sets an earlier run aside, and a run that
    is not there to `resume` before its name is held, which makes a file.
    """
    first = is_first_rank()
    if first:
        tracker_module(config.record.tracker)
        if resume:
            read_saved(config.folder)
    with held_name(config.folder) if first else nullcontext():
        folder = open_folder(config, resume=resume, data=data) if first else None
        gather_all(None, "the run's folder")
        with RunLog(folder, record=config.record, settings=flat(config, logins=False)) as log:
            yield log
