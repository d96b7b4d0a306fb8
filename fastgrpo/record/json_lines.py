"""Files of JSON lines that survive crashes and full disks; one that is cut into parts as it grows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.errors import CannotWrite, writing

# A file of bounded size is this many parts, of which the oldest is dropped where a new one begins.
PARTS = 8


class _Position(msgspec.Struct):
    """The fields of a line that say where in the run it belongs."""

    stage: str
    step: int


class JsonLines:
    """An append-only file of JSON lines, one write a line: a full disk loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _written(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file).st_size

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record whole, or leave the file as it was and raise `CannotWrite` (disk full)."""
        self.write(encoded(record))

    def write(self, lines: bytes) -> None:
        """As `append`, of one or more encoded lines."""
        size, written = self.size, 0
        with _written(self.path):
            self._refuse_lost()
            try:
                while written < len(lines):
                    written += os.write(self._file, lines[written:])
            except OSError:
                os.ftruncate(self._file, size)
                raise

    def _refuse_lost(self) -> None:
        """Raise CannotWrite where another file, or none, is at the path by now: nobody would read what is written."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file), os.stat(self.path)):
                return
        raise CannotWrite(
            f"{self.path} was moved or removed while the run goes on, or the task's code left the working directory "
            "(os.chdir): start it anew, or put it back"
        )

    def cut(self, stage: str, step: int) -> bool:
        """Drop everything from the first line of `stage` after `step` on; True if there was any.

        What is no line of a run, as a crash or a disk's error leaves it, goes where nothing to be kept comes after it.
        """
        read, end, after = 0, 0, False
        with self.path.open("rb") as lines:
            for line in lines:
                read += len(line)
                position = _position(line)
                if position is not None:
                    after = position.stage == stage and position.step > step
                    if after:
                        break
                    end = read
        os.ftruncate(self._file, end)
        return after

    def close(self) -> None:
        """Flush to the disk and close."""
        try:
            with _written(self.path):
                os.fsync(self._file)
        finally:
            os.close(self._file)


class RotatingLines:
    """A `JsonLines` of `limit` bytes at most, 0 = any: NAME.jsonl is the newest of its parts, NAME.1.jsonl the next.

    A line longer than a part, of which there are `PARTS`, is a part of its own.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._part_bytes = path, limit // PARTS
        self._newest = JsonLines(path)

    def extend(self, lines: Iterable[bytes]) -> None:
        """Write encoded `lines`, those of one part at once: all of them, or none and `CannotWrite` (disk full)."""
        together, size = list[bytes](), self._newest.size
        for line in lines:
            if self._part_bytes and size and size + len(line) > self._part_bytes:
                self._newest.write(b"".join(together))
                self._rotate()
                together, size = [], 0
            together.append(line)
            size += len(line)
        self._newest.write(b"".join(together))

    def cut(self, stage: str, step: int) -> None:
        """As `JsonLines.cut`, through all parts from the oldest on."""
        for number in range(PARTS - 1, 0, -1):
            if self._part(number).exists() and self._cut_part(number, stage, step):
                return
        self._newest.cut(stage, step)

    def close(self) -> None:
        """Flush to the disk and close."""
        self._newest.close()

    def _cut_part(self, number: int, stage: str, step: int) -> bool:
        """Cut an older part; True where that dropped a line: newer parts are gone then, and this one is the newest."""
        part = JsonLines(self._part(number))
        lost = part.cut(stage, step)
        part.close()
        if lost:
            self._newest.close()
            with _written(self._path):
                for newer in range(number):
                    self._part(newer).unlink(missing_ok=True)
                self._part(number).rename(self._path)
            self._newest = JsonLines(self._path)
        return lost

    def _rotate(self) -> None:
        self._newest.close()
        with _written(self._path):
            for number in range(PARTS - 1, 0, -1):
                if self._part(number - 1).exists():
                    self._part(number - 1).replace(self._part(number))
        self._newest = JsonLines(self._path)

    def _part(self, number: int) -> Path:
        return self._path.with_suffix(f".{number}{self._path.suffix}") if number else self._path


def encoded(record: Mapping[str, Any]) -> bytes:
    """The record's line; what is no plain data is shown as Python shows it, what is no Unicode as a question mark."""
    try:
        return msgspec.json.encode(record, enc_hook=repr) + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record, default=repr, ensure_ascii=False).encode(errors="replace") + b"\n"


def lines_of(records: Iterable[Mapping[str, Any]]) -> str:
    """The records' lines."""
    return b"".join(map(encoded, records)).decode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none where it is missing. Lines that are torn or damaged are left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            rows.append(msgspec.json.decode(line, type=dict[str, Any]))
    return rows


def _position(line: bytes) -> _Position | None:
    """Where a line belongs; None for one that is torn or damaged."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(line, type=_Position) if line.endswith(b"\n") else None
    return None


def _written(path: Path) -> AbstractContextManager[None]:
    return writing(path, "free space and continue with --resume (all before is kept)")
