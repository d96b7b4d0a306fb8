"""Rewards for code in the forms that trainers call: TRL's reward function, verl's compute_score, firejail's executor.

They score by the fraction of tests passed, run in jails of this process' own pool (see shared.py), or of the servers
that `configure(urls=[...])` or FASTGRPO_SANDBOX_URLS name: many processes that score on one machine share its cores
best through one server. A failure of the jails is never a score.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fastgrpo_sandbox.calls import with_imports
from fastgrpo_sandbox.columns import COLUMNS, entry_point_of, read_tests
from fastgrpo_sandbox.extract import defined_names, extract_code
from fastgrpo_sandbox.given import require_text
from fastgrpo_sandbox.shared import jails
from fastgrpo_sandbox.source_text import preamble
from fastgrpo_sandbox.types import NoTestError, Outcome, SandboxUnavailable, StdioTests, Tests

log = logging.getLogger("fastgrpo_sandbox")
STDIO_BYTES = 4 << 20  # of output: what contests ask for does not fit the usual limit
UNREADABLE_ROWS = 16  # of a source of which nothing was ever read: that is how its rows are given, and not a bad row
# What trainers give beside a row's own columns, which differs by its completions.
OF_COMPLETIONS = frozenset({"completion_ids", "num_turns", "rollout_reward_scores"})
Completion = str | Sequence[Mapping[str, Any]]  # text, or chat messages of which the last has it


def configure(**options: Any) -> None:
    """Sets what this process' pool is opened with: RemotePool's arguments where `urls` is among them, else
    SandboxPool's (cells, limits, preload). Without a call the variables FASTGRPO_SANDBOX_URLS (separated by commas) and
    FASTGRPO_SANDBOX_KEY name servers, and without these the jails are this machine's."""
    jails.configure(**options)


def code_reward(
    completions: Sequence[Completion], prompts: Sequence[Completion] | None = None, **columns: Any
) -> list[float | None]:
    """TRL's reward function: `GRPOTrainer(reward_funcs=[code_reward])`, the data set's columns having the tests.

    Returns, for each completion, the fraction of its tests that the program in it passes, in [0, 1], or None where that
    is not known: the jails failed, the row has no tests that can be read (see columns.read_tests for their forms), or
    only such as any program would pass. A
    prompt that is the beginning of a Python program, as HumanEval's, is put before a completion that does not define
    the row's `entry_point`, and what it gives beside that before any other and the tests. Raises ValueError where no
    column has tests, or none of UNREADABLE_ROWS could be read and no other ever, SandboxUnavailable where jails cannot
    run.
    """
    if isinstance(completions, str):
        raise ValueError("completions must be a list, got one text: put it into a list, and so its columns")
    count = len(completions)
    rows = [{name: values[i] for name, values in columns.items() if _is_column(values, count)} for i in range(count)]
    jobs: dict[int, dict[str, Any]] = {}
    faults: dict[int, str] = {}
    for i, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        try:
            prompt = prompts[i] if prompts else ""
            code = _program(completion, prompt, entry_point_of(row))
            jobs[i] = _job(code, read_tests({"prompt": prompt, **row}, code))
        except ValueError as error:
            faults[i] = str(error)
            _all_rows.refuse(_row_text(row), error)
    _all_rows.is_read = _all_rows.is_read or bool(jobs)
    if faults and not jobs:
        reason = _no_column(columns, count)
        if reason or not _may_have_tests(columns) or not any(map(_is_answer, completions)) or _all_rows.is_hopeless:
            raise ValueError(f"code_reward can score none of {count} rows: {reason or next(iter(faults.values()))}")
    outcomes = dict(zip(jobs, jails.run_all(list(jobs.values())), strict=True))
    faults |= {i: outcome.error for i, outcome in outcomes.items() if outcome.status == "infrastructure"}
    if faults:
        log.warning("no reward: rows=%d of=%d first=%r", len(faults), count, next(iter(faults.values())))
    return [None if i in faults else outcomes[i].pass_rate for i in range(count)]


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **_: Any
) -> float:
    """verl's reward function: `custom_reward_function.path=.../rewards.py`, its default name.

    ground_truth: the tests in any of the forms of columns.read_tests, as JSON or as they are; verl's own sets have
    `{"inputs": [...], "outputs": [...]}`, with `fn_name` for calls, or `{"assert_case": [...]}`. extra_info: columns
    beside them, such as `entry_point` and `setup`. data_source and what else verl passes decide nothing here.
    Returns the fraction of tests passed. verl ends at what is no number, so a row whose tests cannot be read, or would
    be passed by any program, has 0 for every solution (a group's advantages are then 0, too) and a warning. Raises
    ValueError where no row of a data_source could be read, and that is known of UNREADABLE_ROWS, and SandboxUnavailable
    where the jails fail, since a float could not say so.
    """
    require_text("solution_str", solution_str)
    extra = extra_info or {}
    source = _sources.setdefault(str(data_source), _Source())
    try:
        code = extract_code(solution_str, entry_point_of(extra))
        job = _job(code, read_tests({**extra, "tests": ground_truth}, code))
    except ValueError as error:
        count = source.refuse(f"{ground_truth} {_row_text(extra)}", error)
        if source.is_hopeless:
            raise ValueError(f"compute_score can score no row of {str(data_source)!r}: {error}") from None
        if count & (count - 1) == 0:  # the first, second, fourth ... time
            log.warning("no tests, so a score of 0: source=%r solutions=%d reason=%r", data_source, count, str(error))
        return 0.0
    source.is_read = True
    return _known(jails.run_all([job])[0]).pass_rate


class _Source:
    """What was seen of the rows of one source: a bad row is left out, and of a source of which none was ever read that
    is how its rows are given."""

    def __init__(self) -> None:
        self.is_read = False
        self._unreadable: set[int] = set()  # each row once, of which there are as many solutions as a group has
        self._count = 0
        self._lock = threading.Lock()

    def refuse(self, row: str, error: ValueError) -> int:
        """Notes a solution of a `row`, as text, whose tests were refused; returns how many there were."""
        with self._lock:
            self._count += 1
            self.is_read = self.is_read or isinstance(error, NoTestError)
            if len(self._unreadable) < UNREADABLE_ROWS:
                self._unreadable.add(hash(row))
            return self._count

    @property
    def is_hopeless(self) -> bool:
        """Whether none of UNREADABLE_ROWS could be read, nor any other."""
        return not self.is_read and len(self._unreadable) >= UNREADABLE_ROWS


_sources: dict[str, _Source] = {}  # compute_score's, by data_source
_all_rows = _Source()  # code_reward's


def code_exec(code: str, stdin: str | None = None, timeout: float = 10.0) -> tuple[bool, str]:
    """firejail's executor of Code-R1: (True, stdout) when the script ended without an error, else (False, what it
    printed and raised). On its own word: use tests where forging matters. timeout: seconds of wall clock and CPU.
    Raises SandboxUnavailable where the jails fail."""
    limits = msgspec.structs.replace(jails.limits, wall_s=timeout, cpu_s=timeout)
    outcome = _known(jails.run_all([{"code": code, "stdin": stdin or "", "limits": limits}])[0])
    if outcome.status == "ok":
        return True, outcome.stdout
    return False, "\n".join(filter(None, (outcome.stdout, outcome.stderr, outcome.error)))


def _job(code: str, tests: Tests) -> dict[str, Any]:
    if not isinstance(tests, StdioTests):
        return {"code": with_imports(code, tests), "tests": tests, "limits": jails.limits}
    return {"code": code, "tests": tests, "limits": msgspec.structs.replace(jails.limits, output_bytes=STDIO_BYTES)}


def _known(outcome: Outcome) -> Outcome:
    if outcome.status == "infrastructure":
        raise SandboxUnavailable(f"the jails lost a job, which says nothing of its code: {outcome.error}")
    return outcome


def _row_text(row: Mapping[str, Any]) -> str:
    """By which a row is known again, whatever its completion."""
    return str({name: value for name, value in row.items() if name not in OF_COMPLETIONS})


def _is_column(values: Any, count: int) -> bool:
    """TRL passes its own state and loggers beside the data set's columns."""
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == count


def _may_have_tests(columns: Mapping[str, Any]) -> bool:
    return not columns.keys().isdisjoint((*COLUMNS, "inputs"))


def _is_answer(completion: Any) -> bool:
    return isinstance(completion, str | Sequence | Mapping)


def _no_column(columns: Mapping[str, Any], count: int) -> str:
    """Which of the columns that tests stand in is none; empty where all are."""
    odd = [name for name, values in columns.items() if name in COLUMNS and not _is_column(values, count)]
    return f"{odd[0]} must be a list with a value for each completion, here {count}" if odd else ""


def _program(completion: Completion, prompt: Completion, entry_point: str) -> str:
    code = extract_code(_text(completion), entry_point)
    if not isinstance(prompt, str) or entry_point not in defined_names(prompt):
        return code
    return f"{preamble(prompt, entry_point)}\n{code}" if entry_point in defined_names(code) else prompt + code


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence) or not all(isinstance(each, Mapping) for each in completion):
        raise ValueError(f"a completion is text or chat messages, got {type(completion).__name__}")
    last: Any = completion[-1] if completion else {}
    content = last.get("content")
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or ())
