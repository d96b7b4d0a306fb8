"""Standard output against what was wanted, as contest graders compare, and one outcome for many cases."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec

from fastgrpo_sandbox.types import RANGES, Limits, Outcome, StdioTests

TOLERANCE = 1e-6
SILENT = "no case wants any output: every silent program would pass"
MOST_OUTPUT = RANGES["output_bytes"][1]
ROOM = 4  # times what is expected: other white space, and more digits
# Nothing is given back: a long token that is none would be read anew from each of its digits.
NUMBER = re.compile(r"[+-]?(\d++\.?+\d*+|\.\d++)([eE][+-]?\d++)?", re.ASCII)
WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
PADDED = re.compile(r"[+-]?0\d+", re.ASCII)
EXACT = 1 << 53  # from here on a float is no nearer to a whole number than the next one


def same_output(actual: str, expected: str, exact: bool = False) -> bool:
    """Whether an output is the wanted one: token by token, so that white space counts for nothing but to part them, and
    two numbers, one of them with a fraction or exponent, within 1e-6 relative or absolute, and nearer to a wanted whole
    number than to any other. Digits that are to begin with a 0, such as binary ones, are a text. `exact` compares every
    character but the line ends at the end."""
    if exact:
        return actual.rstrip("\r\n") == expected.rstrip("\r\n")
    if actual.rstrip() == expected.rstrip():
        return True
    wanted = expected.split()
    ours = actual.split(None, len(wanted))  # and what is left over, in one piece: millions of tokens are not looked at
    return ours == wanted or (len(ours) == len(wanted) and all(map(_same_token, ours, wanted)))


def _same_token(actual: str, expected: str) -> bool:
    if actual == expected:
        return True
    if not (NUMBER.fullmatch(actual) and NUMBER.fullmatch(expected)) or PADDED.fullmatch(expected):
        return False
    if WHOLE.fullmatch(actual) and WHOLE.fullmatch(expected):
        return _digits(actual) == _digits(expected)
    ours, wanted = float(actual), float(expected)  # one too large for a float is close to every other such
    close = math.isfinite(wanted) and math.isclose(ours, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return close and (WHOLE.fullmatch(expected) is None or _is_nearest(actual, expected))


def _is_nearest(actual: str, whole: str) -> bool:
    """Whether a number that is close to a whole one is not another: 1e9 is no answer where 1000000007 is wanted."""
    before, _, after = actual.partition(".")
    if not after.strip("0") and WHOLE.fullmatch(before):
        return _digits(before) == _digits(whole)
    near = float(actual)
    if not math.isfinite(near):
        return False
    return near == int(whole) or (abs(near) < EXACT and abs(near - int(whole)) < 0.5)


def _digits(whole: str) -> tuple[bool, str]:
    """Sign and digits of an integer, however long."""
    digits = whole.lstrip("+-").lstrip("0") or "0"
    return whole.startswith("-") and digits != "0", digits


def with_room(limits: Limits, expected: str) -> Limits:
    """The limits of one case: what it is to print fits, however little the job may print otherwise."""
    room = min(ROOM * len(expected.encode(errors="replace")), MOST_OUTPUT)
    return limits if room <= limits.output_bytes else msgspec.structs.replace(limits, output_bytes=room)


def passes(tests: StdioTests, case: int, outcome: Outcome) -> bool:
    """Whether a run gave the output of a case; of tests with a checker, whether it is worth asking that."""
    same = bool(tests.checker) or same_output(outcome.stdout, tests.cases[case][1], tests.compare == "exact")
    return outcome.status == "ok" and same


def wants_nothing(tests: StdioTests) -> bool:
    """Whether every silent program would pass."""
    return bool(tests.cases) and not tests.checker and not any(wanted.strip() for _, wanted in tests.cases)


class Cases:
    """Outcomes of cases, in whatever order they come, as far as one outcome for all needs them: the texts of one."""

    def __init__(self) -> None:
        self._shown: tuple[tuple[int, ...], Outcome] = ((4,), Outcome("ok"))  # its rank, and the lowest's
        self._broken: tuple[float, str] = (math.inf, "")  # the first case whose check failed, and why
        self._judged = False
        self._cpu_s = self._wall_s = self._memory_mb = 0.0

    def add(self, case: int, run: Outcome, check: Outcome | None = None) -> None:
        """The run of a case, and the checker's word about it where it was asked."""
        self._show((0, 0, case) if run.status == "infrastructure" else (2 + (run.status == "ok"), case), run)
        self._cpu_s += run.cpu_s
        self._wall_s, self._memory_mb = max(self._wall_s, run.wall_s), max(self._memory_mb, run.memory_mb)
        if check is None:
            return
        self._judged = True
        if check.status == "infrastructure":
            self._show((0, 1, case), check)
        if check.error and not check.pass_rate:
            self._broken = min(self._broken, (case, check.error))

    def _show(self, rank: tuple[int, ...], outcome: Outcome) -> None:
        if rank < self._shown[0]:
            self._shown = rank, outcome

    def merged(self, tests: Sequence[bool]) -> Outcome:
        """One outcome for all: infrastructure if any is, else the first that is not ok. `tests`: which cases passed."""
        worst, broken = self._shown[1], self._broken[1]
        wrong = worst.status == "ok" and not all(tests)
        differ = (broken and f"the checker failed: {broken}") or _count(tests)
        return msgspec.structs.replace(
            worst,
            status="failed" if wrong or not tests else worst.status,
            error=differ if wrong else worst.error,
            error_by=("jail" if broken else "host") if wrong else worst.error_by,
            tests=() if worst.status == "infrastructure" else tuple(tests),
            cpu_s=self._cpu_s,
            wall_s=self._wall_s,
            memory_mb=self._memory_mb,
            verdict_by="judge" if self._judged else "host",
        )


def merge_parts(parts: Sequence[Outcome], counts: Sequence[int]) -> Outcome:
    """One outcome for cases that were sent in several requests of so many; those of a refused one are unanswered."""
    answers = [part.tests or (False,) * count for part, count in zip(parts, counts, strict=True)]
    cases = Cases()
    for number, part in enumerate(parts):
        cases.add(number, part)
    merged = cases.merged([passed for answer in answers for passed in answer])
    counted = merged.status == "failed" and merged.error_by == "host"
    error = _count(merged.tests) if counted else merged.error
    return msgspec.structs.replace(merged, error=error, verdict_by=parts[0].verdict_by)


def _count(tests: Sequence[bool]) -> str:
    return f"{tests.count(False)} of {len(tests)} cases differ"
