"""Traces on disk, torn lines included, and the choice of what is learned."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from fastgrpo.config import Sft
from fastgrpo.errors import UserError
from fastgrpo.flow.distill import TeacherTrace, TraceFile, read_traces, selected
from tests.flow.conftest import ADD

TRACE = TeacherTrace(problem_id="add", prompt="é\n", reasoning="r", workflow="w", rounds=1, pass_rate=1.0)


def test_traces_survive_the_file_and_a_broken_line_is_named(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "traces.jsonl"
    file = TraceFile(path)
    written = [replace(TRACE, sample=sample, pass_rate=draw.random()) for sample in range(3)]
    for trace in written:
        file.append(trace)
    assert read_traces(path) == TraceFile(path).found == written
    whole = path.read_bytes()
    for broken in (b'{"prompt": 1}\n', b'{"prompt": "\xff"}\n'):
        path.write_bytes(whole + broken)
        with pytest.raises(UserError, match=r"traces\.jsonl:4"):
            read_traces(path)
    with pytest.raises(UserError, match="absent"):
        read_traces(tmp_path / "absent")


@pytest.mark.parametrize("torn", [b"{", b'{"problem_id": "\xc3', b"null"])
def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "traces.jsonl"
    TraceFile(path).append(TRACE)
    path.write_bytes(path.read_bytes() + torn)
    assert read_traces(path) == [TRACE]
    TraceFile(path).append(replace(TRACE, sample=1))
    assert [trace.sample for trace in read_traces(path)] == [0, 1]


def test_a_full_disk_is_a_users_error(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "traces.jsonl")
    file.path.unlink()
    file.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write the traces .*: No space left"):
        file.append(TRACE)
    with pytest.raises(UserError, match="cannot write the traces"):
        TraceFile(tmp_path / "no folder" / "traces.jsonl")


def test_a_line_of_an_older_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(
        '{"problem_id": "add", "prompt": "p", "reasoning": "r", "workflow": "w", "rounds": 1, "pass_rate": 0.5}\n'
    )
    assert [(trace.sample, trace.status) for trace in read_traces(path)] == [(0, "ok")]


def test_what_is_learned() -> None:
    last, first = replace(ADD, id="last"), replace(ADD, id="first")
    made = [
        replace(TRACE, problem_id="last", sample=0, reward=0.5),
        replace(TRACE, problem_id="first", sample=2, reward=0.9),
        replace(TRACE, problem_id="first", sample=1, reward=0.9),
        replace(TRACE, problem_id="first", sample=0, reward=0.3, pass_rate=0.5),
        replace(TRACE, problem_id="last", sample=1, reward=2.0, status="timeout", pass_rate=0.0),
        replace(TRACE, problem_id="last", sample=2, reward=1.0, pass_rate=0.4),
        replace(TRACE, problem_id="gone", sample=0),
    ]

    def chosen(**settings: object) -> list[tuple[str, int]]:
        found = selected(made, [first, last], Sft(**settings))  # type: ignore[arg-type]
        return [(trace.problem_id, trace.sample) for trace in found]

    assert chosen() == [("first", 1), ("last", 0), ("gone", 0)]
    assert chosen(keep="all", min_pass_rate=1.0) == [("first", 1), ("first", 2), ("last", 0), ("gone", 0)]
    assert chosen(min_pass_rate=0.0) == [("first", 1), ("last", 2), ("gone", 0)]
