"""One pool of real jails for all tests of the folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgrpo_sandbox import AssertTests, BlockingSandboxPool, Limits, Outcome, bwrap, cell

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
QUICK = Limits(wall_s=20, cpu_s=5)

# In the jail: what a raw system call answers, and what a call raises.
PRELUDE = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def sysno(number, *arguments):
    ctypes.set_errno(0)
    answer = libc.syscall(ctypes.c_long(number), *arguments)
    return "allowed" if answer >= 0 else errno.errorcode[ctypes.get_errno()]
def raised(function, *arguments):
    try:
        return f"allowed {function(*arguments)!r}"
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    except BaseException as error:
        return type(error).__name__
"""


@pytest.fixture(scope="session", autouse=True)
def sanitized() -> Iterator[None]:
    """Under `make sanitize`: jails whose native module ends, with a report, at its first wrong access or undefined
    operation. The sanitizers' runtime is loaded before Python and looks for /proc."""
    module, runtime = os.environ.get("SANITIZED_JAIL"), os.environ.get("SANITIZER_RUNTIME")
    if module is None or runtime is None:
        yield
        return
    whole = cell.bwrap_spec
    # A job's own crash and refused allocation stay what they are.
    options = "detect_leaks=0:allocator_may_return_null=1:handle_segv=0:handle_sigfpe=0:handle_sigbus=0"
    settings = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": options}

    def spec(*arguments: Any) -> dict[str, Any]:
        made: dict[str, Any] = whole(*arguments)
        program = made["arguments"].index("--")
        environment = [part for item in settings.items() for part in ("--setenv", *item)]
        before, after = made["arguments"][:program], made["arguments"][program:]
        return made | {"arguments": ["--symlink", "tmp/proc", "/proc", *before, *environment, *after]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell, "bwrap_spec", spec)
        patch.setattr(bwrap, "native_module", lambda: Path(module))
        yield


@pytest.fixture(scope="session")
def pool() -> Iterator[BlockingSandboxPool]:
    with BlockingSandboxPool(cells=2, limits=QUICK) as pool:
        yield pool


@pytest.fixture(scope="module")
def numpy_pool() -> Iterator[BlockingSandboxPool]:
    with BlockingSandboxPool(cells=1, preload=("numpy",)) as pool:
        yield pool


@pytest.fixture(scope="session")
def every_assertion_passes(pool: BlockingSandboxPool) -> Callable[[str, str, tuple[str, ...]], None]:
    """A check of a right solution: each of the assertions, after their setup, is judged and passes."""

    def check(code: str, setup: str, asserts: tuple[str, ...]) -> None:
        outcome = pool.run(code, tests=AssertTests(asserts, setup))
        assert len(outcome.tests) == len(asserts), outcome
        assert [each for each, passed in zip(asserts, outcome.tests, strict=True) if not passed] == []

    return check


@pytest.fixture(scope="session")
def lines(pool: BlockingSandboxPool) -> Callable[..., list[str]]:
    """Runs code after the prelude and returns what it printed, line by line."""

    def run(code: str, **options: object) -> list[str]:
        outcome = pool.run(PRELUDE + code, **options)
        assert outcome.status == "ok", outcome
        return outcome.stdout.splitlines()

    return run


@pytest.fixture
def steady(pool: BlockingSandboxPool) -> Iterator[None]:
    """The neighbours of whatever the test does still run afterwards, in the same cells."""
    before = {cell.number for cell in pool.pool.cells.all}
    yield
    assert pool.run("print('alive')").stdout == "alive\n"
    assert {cell.number for cell in pool.pool.cells.all if not cell.lost} >= before


def status_of(outcome: Outcome) -> str:
    return outcome.status


def descendants(pid: int) -> set[int]:
    """Every process below `pid`, by the host's numbers."""
    found: set[int] = set()
    for task in _listdir(f"/proc/{pid}/task"):
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            found |= {child} | descendants(child)
    return found


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
