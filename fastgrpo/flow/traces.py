"""Distilled traces on disk, one JSON line each, and which of them the policy learns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from fastgrpo.config import Sft
from fastgrpo.errors import UserError, writing
from fastgrpo.flow.types import ExecutionStatus, Problem


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """One distilled sample: `text` is what the policy learns to write after `prompt`.

    `sample` counts the problem's traces; `status`, `pass_rate` and `reward` are those of the last round's execution.
    """

    problem_id: str
    prompt: str
    reasoning: str
    workflow: str
    rounds: int
    pass_rate: float
    sample: int = 0
    status: ExecutionStatus = "ok"
    reward: float = 0.0

    @property
    def text(self) -> str:
        """The completion in the policy's format: R^ in think tags, then S^ in one Python block."""
        return f"<think>{self.reasoning}</think>\n```python\n{self.workflow}\n```"


class TraceFile:
    """The traces at `path`, to which more are appended; `found` are those that were there.

    A line that a crash has torn is cut off. Raises `UserError` for a file that cannot be written or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(f"the traces {path}"):
            path.touch()
            with path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self.found = read_traces(path)

    def append(self, trace: Trace) -> None:
        """Write one trace whole, or leave the file as it was and raise `UserError` (disk full)."""
        size = self.path.stat().st_size
        with writing(f"the traces {self.path}"):
            try:
                with self.path.open("ab") as file:
                    file.write(msgspec.json.encode(trace) + b"\n")
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path, size)
                raise


def read_traces(path: Path) -> list[Trace]:
    """The traces of a JSONL file; UserError names the file and line that is not one. A torn last line is left out."""
    decoder, traces = msgspec.json.Decoder(Trace), []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read the traces {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            traces.append(decoder.decode(line))
        except msgspec.MsgspecError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise UserError(f"{path}:{number} is not a trace: {error}") from error
    return traces


def selected(traces: Sequence[Trace], problems: Sequence[Problem], config: Sft) -> list[Trace]:
    """What is worth learning: traces that ended "ok" with `sft.min_pass_rate` at least, and with `sft.keep` "best" each
    problem's one of the highest reward (the first among equals). In the order of `problems` and samples.
    """
    order = {problem.id: index for index, problem in enumerate(problems)}
    good = [trace for trace in traces if trace.status == "ok" and trace.pass_rate >= config.min_pass_rate]
    good.sort(key=lambda trace: (order.get(trace.problem_id, len(order)), trace.problem_id, trace.sample))
    if config.keep == "all":
        return good
    best: dict[str, Trace] = {}
    for trace in good:
        if trace.problem_id not in best or trace.reward > best[trace.problem_id].reward:
            best[trace.problem_id] = trace
    return list(best.values())
