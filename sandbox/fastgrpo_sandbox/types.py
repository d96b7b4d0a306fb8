"""The nouns of the jail pool: what a job may use, how it is tested, and what became of it."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import msgspec

from fastgrpo_sandbox.given import (
    require_cases,
    require_files,
    require_kind,
    require_text,
    require_texts,
    require_whole,
)

DAY_S = 86400
RUNS_PER_CELL = 8  # at once
MOST_CASES = 4096  # of StdioTests in one request to a server
MAX_PROCESSES = 256  # the fork server follows chains of as many, so none is out of its sight
RANGES: dict[str, tuple[int, int]] = {
    "memory_mb": (1, 1 << 20),
    "processes": (1, MAX_PROCESSES),
    "output_bytes": (0, 4 << 20),
    "tmp_mb": (1, 4096),
    "files": (16, 4096),
}

Status = Literal["ok", "failed", "timeout", "memory", "output_limit", "killed", "rejected", "infrastructure"]
VerdictBy = Literal["", "judge", "host", "same-process"]
ErrorBy = Literal["", "host", "jail"]


class CallError(Exception):
    """Raised by a session's handler to raise the same text inside the jail (an expected failure of the call)."""


class EndSession(Exception):
    """Raised by a session's handler to end the session at once: it has failed by its own fault, which the text says."""


class NoTestError(ValueError):
    """Tests that can be read and that any program would pass: a fault of one row's, and not of how rows are given."""


class SandboxUnavailable(RuntimeError):
    """This machine cannot run jails; the message is one sentence that says what is missing and how to fix it."""


class Limits(msgspec.Struct, frozen=True):
    """What one job may use; every limit is enforced by the kernel or by the cell's fork server, never by the job.

    wall_s and cpu_s are seconds; what a job waits for a processor, at most 7 wall_s and 30 s, does not count in wall_s:
    else its neighbours would decide about its verdict. memory_mb (MiB) bounds each process' address space growth and
    what all processes of the job hold: by cgroup everything, /tmp and captured output too; by polling (see
    Outcome.memory_by) their private pages as seen every 20 ms, those that they share once, but in all, counted for
    each, no more than eight times memory_mb. processes counts threads too, and is at most 256;
    output_bytes bounds stdout and stderr each, but where a verdict asks for neither, as of asserts, a check or
    unittest: there a job may print 4 MiB, of which so much is kept. tmp_mb sizes the private /tmp; files is the number
    of open descriptors. Memory that processes share without a file is denied, since polling would not count it. CPU
    time is that of live processes and of children that were waited for: what a job lets go unseen, by ignoring
    SIGCHLD, only wall_s and processes bound.

    Seconds may be fractions, the rest are whole numbers. Raises ValueError for another type or a value out of range.
    """

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_mb: int = 512
    processes: int = 32
    output_bytes: int = 65536
    tmp_mb: int = 16
    files: int = 64

    def __post_init__(self) -> None:
        for name in ("wall_s", "cpu_s"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= DAY_S:
                raise ValueError(f"Limits.{name} is {value!r}: give seconds, more than 0 and at most a day ({DAY_S}).")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"Limits.{name} is {value!r}: give a whole number from {least} to {most}.")


class CheckTests(msgspec.Struct, frozen=True, tag="check"):
    """HumanEval's form: `source` defines `check(candidate)`; `setup` is trusted code the tests may use.
    `entry_point` is a function, a class or, as in `Solution().add`, a method.

    The assertions run in a judge process that calls the solution over RPC, so the solution can neither see the
    expected values nor report its own success. An assertion passes if it ran, held every time, and the code around
    it ran to its end: of one in a loop the loop, of one in a helper the tests as a whole. `assert False` holds if
    the tests end without coming to it. `select` names the assertions that count, by their order.

    Plain data and the values of the standard library cross as themselves; functions, iterators and objects stay in
    their process, and the other side uses them through proxies, whichever side made them. A class that the tests
    derive from one of the solution's is made in the solution's process, with methods that ask back. An object of the
    solution's equals only what is the solution's too, by its own class, and never plain data; one of a subclass of
    a plain type equals what that value does, whatever its class says. With plain data, other operators work on what
    the tests made by calling a class, not on what a function returned. A StopIteration that a function raises
    arrives as a RuntimeError.
    """

    source: str
    entry_point: str
    setup: str = ""
    select: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("source", "entry_point", "setup"):
            require_text(f"CheckTests.{name}", getattr(self, name))
        require_kind("CheckTests.select", self.select, (list, tuple))
        for number, index in enumerate(self.select or ()):
            require_whole(f"CheckTests.select[{number}]", index, 0)
        if self.select is not None:
            msgspec.structs.force_setattr(self, "select", tuple(self.select))


class AssertTests(msgspec.Struct, frozen=True, tag="assert"):
    """MBPP's form: one assertion a line, over names that the solution defines. Judged like CheckTests. Names of
    `setup`, builtins and the standard library are never taken from the solution, but for what the tests import from
    `solution` and for a builtin where they test nothing else, and a line whose only wanted value comes from another
    function of the solution fails."""

    asserts: tuple[str, ...]
    setup: str = ""

    def __post_init__(self) -> None:
        require_texts("AssertTests.asserts", self.asserts)
        require_text("AssertTests.setup", self.setup)
        msgspec.structs.force_setattr(self, "asserts", tuple(self.asserts))


class UnittestTests(msgspec.Struct, frozen=True, tag="unittest"):
    """BigCodeBench's form: `source` defines unittest.TestCase classes that share a process with the solution.

    Guaranteed: exit codes, prints, output floods and missing, doubled or malformed verdicts never count as a pass. Nor
    do a `unittest`, its classes, contextlib, builtins or assertions that are found changed once the solution is
    imported or once the tests have run. Nor does an object pass by an `__eq__`, order or subtraction that the solution
    wrote, or a mock's, against what has none such; nor, unless the tests name its class, by a `__contains__`, in whose
    place its items are looked through. Nor does an empty array agree with one that is not, nor with a number. What
    tests use as a module without an import, `np` say, is that module, or what the solution imported. Nor does a module
    of the standard library that the tests import help, if its functions or constants are found changed, but for mocks
    at the tests' end, nor a package of the solution's by the name of one that is not there. Builtins are Python's own
    by their names, unless the tests only call one with data and ask no function beside it, or give the name another
    meaning anywhere. Plain data that `setup` gives a name is what the tests read by it, while the solution keeps its
    own; where that is the same it is one object. A test that is expected to fail passes by failing;
    one under `skip` is not counted. One that is skipped by a condition which asks the machine and not the solution
    passes, as it would for every solution, if not all are (skipping.py); any other that is skipped fails.

    Not guaranteed, since the solution's code runs beside the tests. It can still forge a verdict by reaching the
    running tests or this project's code through frames, the garbage collector, tracing, threads or native memory;
    by undoing its changes before they are looked at; by changing what the modules that the tests import use in turn,
    or `sys`; by answers that the tests take at their word (`assertTrue(f(x).is_right())`), numbers among them that its
    own operators, other than subtraction, made of the wanted value; by an `__eq__` compiled under a library's file
    name. So the outcome is labelled `verdict_by == "same-process"`: use the other forms where forging matters.
    """

    source: str
    setup: str = ""

    def __post_init__(self) -> None:
        for name in ("source", "setup"):
            require_text(f"UnittestTests.{name}", getattr(self, name))


class StdioTests(msgspec.Struct, frozen=True, tag="stdio"):
    """(stdin, expected stdout) pairs, one fresh jail each; the expected text never leaves the host, which compares it.

    compare "tokens": split at white space; numbers within 1e-6 relative or absolute, unless both are integers;
    "exact": every character but the line ends at the end. A case may print four times what is expected, whatever
    `Limits.output_bytes` says. A `checker`, trusted code that defines `checker(input, output, expected) -> bool`,
    decides instead, in a jail without the solution.
    """

    cases: tuple[tuple[str, str], ...]
    compare: Literal["tokens", "exact"] = "tokens"
    checker: str = ""

    def __post_init__(self) -> None:
        require_cases(self.cases)
        require_text("StdioTests.checker", self.checker)
        if self.compare not in ("tokens", "exact"):
            raise ValueError(f"StdioTests.compare must be 'tokens' or 'exact', got {self.compare!r}")


JailedTests = CheckTests | AssertTests | UnittestTests  # which run in a jail themselves
Tests = JailedTests | StdioTests


def require_loop(opened: asyncio.AbstractEventLoop | None) -> None:
    """Raises SandboxUnavailable where this is another event loop than the one that a pool was `opened` in, None = none.

    Its answers would wake nobody here.
    """
    if opened is None:
        raise SandboxUnavailable("the pool is not open: use it inside its `async with`")
    if asyncio.get_running_loop() is not opened:
        raise SandboxUnavailable(
            "the pool was opened in another event loop: use it there, or BlockingSandboxPool, which any thread may ask"
        )


def require_job(code: Any, stdin: Any, files: Any, tests: Any, limits: Any, order: Any = 0) -> None:
    """Raises ValueError, naming the argument, where one that a pool's `run` was given is of another type."""
    require_text("code", code)
    require_text("stdin", stdin)
    require_files(files)
    require_kind("tests", tests, (CheckTests, AssertTests, UnittestTests, StdioTests))
    require_kind("limits", limits, (Limits,))
    require_whole("order", order, 0)


class Outcome(msgspec.Struct, frozen=True):
    """What became of one job.

    With tests, `status` is "ok" only when every counted test passed; `tests` holds one bool for each, in order, and an
    unanswered one is False. Without tests "ok" says only that the code ended without an error, on its own word.
    `infrastructure` means the jail failed, not the code: never a score. cpu_s and wall_s are seconds, wall_s without
    the job's waits for a processor; memory_mb is the peak in MiB, the interpreter included, and memory_by what held it:
    "cgroup" where this process may make cgroups (version 2; `python -m fastgrpo_sandbox` says why not), else "rlimit +
    resident polling".

    `error_by` tells whose words `error` is, as the host knows it, whatever the words are: "host" for a sentence into
    which nothing went that ran in a jail (a limit, a count of failed tests, a fault of ours), "jail" for one that has a
    traceback, exit status or signal from there, which the code may have chosen by what its tests ask, "" where nobody
    says. A traceback of the judge's is "jail" too: the solution may have raised what it repeats.
    """

    status: Status
    value: Any = None
    stdout: str = ""
    stderr: str = ""
    error: str = ""
    tests: tuple[bool, ...] = ()
    cpu_s: float = 0.0
    wall_s: float = 0.0
    memory_mb: float = 0.0
    memory_by: str = ""
    verdict_by: VerdictBy = ""
    error_by: ErrorBy = ""

    @property
    def pass_rate(self) -> float:
        """Fraction of tests passed, in [0, 1]; 0.0 without tests."""
        return sum(self.tests) / len(self.tests) if self.tests else 0.0
