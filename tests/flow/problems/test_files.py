"""Files as people have them: how they are packed, encoded, named and listed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.errors import UserError
from fastgrpo.flow.problems import files
from fastgrpo.flow.problems.files import load

OWN: dict[str, Any] = {
    "id": "add",
    "prompt": "Add two numbers.",
    "entry_point": "add",
    "solution": "def add(a, b):\n    return a + b\n",
    "asserts": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
}
LINE = json.dumps(OWN).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.jsonl", LINE),
        ("own.jsonl", b"\xef\xbb\xbf" + LINE),
        ("own.jsonl", LINE.replace(b"\n", b"\r\n") + b"\r\n"),
        ("own.jsonl", json.dumps([OWN]).encode()),
        ("own.json", json.dumps([OWN], indent=1).encode()),
        ("own.json", json.dumps(OWN, indent=1).encode()),
        ("own.json", LINE),
        ("own.jsonl.gz", gzip.compress(LINE)),
        ("own.jsonl", gzip.compress(LINE)),
        ("own[1] #2, é.jsonl", LINE),
    ],
)
def test_however_it_is_packed(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    [problem] = load(str(path))
    assert (problem.id, problem.dataset) == ("add", name.partition(".")[0])


@pytest.mark.parametrize(
    "change",
    [
        {"id": 7},
        {"setup": None, "check": None},
        {"solution": None},
        {"solution": ""},
        {"solution": "add = lambda a, b: a + b"},
        {"solution": "from operator import add"},
        {"solution": "import operator\nif True:\n    add, sub = operator.add, operator.sub"},
        {"solution": "class add:\n    pass"},
        {"solution": "async def add(a, b): return a + b"},
        {"entry_point": "Solution().add", "solution": "class Solution:\n    def add(self, a, b): return a + b"},
        {"asserts": ["with raises(TypeError):\n    add(1)"]},
        {"asserts": ["try:\n    add(1)\n    assert False\nexcept TypeError:\n    pass"]},
        {"asserts": None, "entry_point": None, "stdio": [["1", "1"]], "solution": None},
    ],
)
def test_what_own_problems_may_say(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(OWN | change))
    [problem] = load(str(path))
    assert problem.id == str(change.get("id", "add"))
    assert problem.solution == ((OWN | change)["solution"] or None)


def test_difficulty_without_a_solution_is_the_statements(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    records = [
        OWN | {"id": n, "prompt": "word " * (9 - n), "solution": None if n else OWN["solution"]} for n in range(3)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [problem.difficulty for problem in load(str(path))] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("as_given", [list, ",".join, " , ".join])
def test_several_files_are_a_list_or_have_commas_between(tmp_path: Path, as_given: Callable[[list[str]], Any]) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text(json.dumps(OWN | {"id": path.stem}))
    problems = load(as_given([str(path) for path in paths]))
    assert [(problem.id, problem.dataset) for problem in problems] == [("a", "a"), ("b", "b")]


@pytest.mark.parametrize("named", ["", " , ", [], [""]])
def test_no_data_set_is_one_sentence(named: Any) -> None:
    with pytest.raises(UserError, match=r"data\.dataset names no data set"):
        load(named)


@pytest.mark.parametrize("name", ["humaneval", "HumanEval", "openai_humaneval"])
def test_humaneval_by_its_names(name: str) -> None:
    assert {problem.dataset for problem in load(name)} == {"humaneval"}


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.jsonl").write_bytes(LINE)
    assert len(load("~/own.jsonl")) == 1


def test_parquet_needs_pyarrow_and_is_then_as_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.parquet"
    path.write_bytes(b"PAR1...")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="is parquet: install pyarrow, or give the problems as JSON lines"):
        load(str(path))
    monkeypatch.setattr(files, "_parquet", lambda _: [OWN])
    assert [problem.id for problem in load(str(path))] == ["add"]
