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
    row has tests of any kind, SandboxUnavailable where jails cannot run.
    """
    if isinstance(completions, str):
        raise ValueError("completions must be a list, got one text: put it into a list, and so its columns")
    count = len(completions)
    rows = [{name: values[i] for name, values in columns.items() if _is_column(values, count)} for i in range(count)]
    jobs: dict[int, dict[str, Any]] = {}
    faults: dict[int, str] = {}
    are_read = False
    for i, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        try:
            prompt = prompts[i] if prompts else ""
            code = _program(completion, prompt, entry_point_of(row))
            jobs[i] = _job(code, read_tests({"prompt": prompt, **row}, code))
        except ValueError as error:
            faults[i] = str(error)
            are_read = are_read or isinstance(error, NoTestError)
    if faults and not jobs and not are_read:
        reason = _no_column(columns, count) or next(iter(faults.values()))
        raise ValueError(f"code_reward can score none of {count} rows: {reason}")
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
        source.refused(str(data_source), f"{ground_truth} {extra}", error)
        return 0.0
    source.is_read = True
    return _known(jails.run_all([job])[0]).pass_rate


class _Source:
    """What compute_score has seen of the rows of one data_source."""

    def __init__(self) -> None:
        self.is_read = False
        self._unreadable: set[int] = set()  # each row once, of which there are as many solutions as a group has
        self._count = 0
        self._lock = threading.Lock()

    def refused(self, name: str, row: str, error: ValueError) -> None:
        """Warns of a row, given as text, at the first, second, fourth ... solution. Raises ValueError where none of the
        source's rows can be read."""
        with self._lock:
            self._count += 1
            self.is_read = self.is_read or isinstance(error, NoTestError)
            if not self.is_read:
                self._unreadable.add(hash(row))
            count, rows = self._count, len(self._unreadable)
        if not self.is_read and rows >= UNREADABLE_ROWS:
            raise ValueError(f"compute_score can score none of {rows} rows of {name!r}: {error}")
        if count & (count - 1) == 0:
            log.warning("no tests, so a score of 0: data_source=%r solutions=%d reason=%r", name, count, str(error))


_sources: dict[str, _Source] = {}


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


def _is_column(values: Any, count: int) -> bool:
    """TRL passes its own state and loggers beside the data set's columns."""
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == count


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
