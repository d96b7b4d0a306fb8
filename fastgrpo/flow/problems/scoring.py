"""Each problem's own solution run in the jails before the run begins: whether it passes its tests, and how fast."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

import fastgrpo_sandbox
from fastgrpo.config import Data, Sandbox
from fastgrpo.errors import CannotWrite, UserError, cache_folder, replace_file
from fastgrpo.flow.jails import new_pool
from fastgrpo.flow.solutions import last_line, run_all_tests
from fastgrpo.flow.types import NO_TESTS, Problem, WorkflowLimits
from fastgrpo_sandbox import BlockingSandboxPool, SandboxPool, SandboxUnavailable, refusal

log = logging.getLogger(__name__)

LEAST_DEADLINE_S = 1.0  # below it a busy machine, not the solution, decides
_SHOWN_REASONS = 3
_REASON_CHARS = 90
_PATIENCE = 6.0
_COMPUTING = 0.05  # share of its wall time that a program which computes has of the CPU, even on a busy machine


class Trial(msgspec.Struct, frozen=True):
    """How a problem's own solution did: passed all tests or not, seconds of the run, and what was wrong."""

    passed: bool
    seconds: float
    reason: str = ""


def solvable(problems: Sequence[Problem], data: Data, sandbox: Sandbox) -> list[Problem]:
    """The problems of one data set whose own solution passes, with the deadline that its time sets.

    Those whose solution fails are left out, or kept with `data.keep_unsolved`; those that have none, or
    no tests, are kept as they are, unless the jails would refuse their tests: all would score 0 there. Raises UserError
    where none is left, no solution passes, or the jails do not work.
    """
    problems = _runnable(problems)
    solved = [problem for problem in problems if problem.solution is not None and problem.hidden_tests != NO_TESTS]
    trials = dict(zip((problem.id for problem in solved), _trials(solved, sandbox), strict=True))
    failed = {name: trial for name, trial in trials.items() if not trial.passed}
    if failed:
        said = f"{len(failed)} of the {len(trials)} solutions of {problems[0].dataset} fail their own tests here"
        said = f"{said}: {_reasons(failed)}"
        if len(failed) == len(trials):
            raise UserError(f"{said}; mend the file, or give the jails what it needs")
        log.warning("%s; they are %s (data.keep_unsolved)", said, "kept" if data.keep_unsolved else "left out")
    kept = [problem for problem in problems if problem.id not in failed or data.keep_unsolved]
    return [_with_deadline(problem, trials.get(problem.id), data, sandbox) for problem in kept]


def _runnable(problems: Sequence[Problem]) -> Sequence[Problem]:
    """The problems but those without a solution to try whose tests the jails refuse, whatever the code."""
    unsolved = [problem for problem in problems if problem.solution is None]
    said = {problem.id: refusal(problem.tests or problem.hidden_tests) for problem in unsolved}
    refused = {name: Trial(False, 0.0, reason[:_REASON_CHARS]) for name, reason in said.items() if reason}
    if not refused:
        return problems
    count = f"the jails refuse the tests of {len(refused)} of the {len(problems)} problems of {problems[0].dataset}"
    if len(refused) == len(problems):
        raise UserError(f"{count}: {_reasons(refused)}; mend the file")
    log.warning("%s: %s; they are left out", count, _reasons(refused))
    return [problem for problem in problems if problem.id not in refused]


def _with_deadline(problem: Problem, trial: Trial | None, data: Data, sandbox: Sandbox) -> Problem:
    if trial is None or not trial.passed or not data.deadline_factor:
        return problem
    wall_s = max(LEAST_DEADLINE_S, data.deadline_factor * trial.seconds)
    return replace(problem, wall_s=min(wall_s, sandbox.wall_s))


def _reasons(failed: dict[str, Trial]) -> str:
    """The commonest reasons, with their counts and a problem for each."""
    counts = Counter(trial.reason for trial in failed.values())
    example = {trial.reason: name for name, trial in reversed(failed.items())}
    shown = [f"{count} x {reason} ({example[reason]})" for reason, count in counts.most_common(_SHOWN_REASONS)]
    rest = len(failed) - sum(count for _, count in counts.most_common(_SHOWN_REASONS))
    return ", ".join(shown) + (f" and {rest} for other reasons" if rest else "")


def _trials(problems: Sequence[Problem], sandbox: Sandbox) -> list[Trial]:
    """One trial for each problem, from the cache where these same problems were tried under the same limits."""
    if not problems:
        return []
    path = cache_folder("solutions") / f"{_digest(problems, sandbox)}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Trial])
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
        pass
    trials = _tried(problems, sandbox)
    _keep(path, msgspec.json.encode(trials))
    return trials


def _digest(problems: Sequence[Problem], sandbox: Sandbox) -> str:
    """A digest of all that trials depend on: problems, the jails' settings, the judge's own code and its Python."""
    jails = replace(sandbox, hosts="", cells=0, workflows=1)
    digest = hashlib.blake2b(msgspec.json.encode([problems, jails, sys.version]), digest_size=16)
    package = Path(fastgrpo_sandbox.__file__).parent
    for file in sorted([*package.glob("*.py"), *package.glob("guest/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _keep(path: Path, content: bytes) -> None:
    """Write the file whole or not at all; where nothing can be written, the next run tries the solutions again."""
    try:
        replace_file(path, content, "the next run tries the solutions again")
    except CannotWrite as error:
        log.warning("%s", error)


def _tried(problems: Sequence[Problem], sandbox: Sandbox) -> list[Trial]:
    at_once = sandbox.cells or os.cpu_count() or 1
    deadline_s = 60 + 2 * (1 + _PATIENCE) * len(problems) * sandbox.wall_s / at_once
    try:
        jails = new_pool(sandbox, at_once)
        with BlockingSandboxPool(jails) as pool:
            return pool.wait(asyncio.wait_for(_try_all(jails, problems, at_once), deadline_s))
    except (SandboxUnavailable, ImportError) as error:
        raise UserError(str(error)) from error
    except TimeoutError:
        raise UserError(f"the jails did not try {len(problems)} solutions within {deadline_s:.0f} s") from None


async def _try_all(pool: SandboxPool, problems: Sequence[Problem], at_once: int) -> list[Trial]:
    """A trial of each problem, as many at once as there are jails, so that each is measured almost alone.

    Solutions that ran out of wall time are tried again with more of it, all together, once the others are done: the
    machine may have been busy, most of them only wait, and CPU time is limited anyway.
    """
    wall_s = pool.limits.wall_s
    slots = asyncio.Semaphore(at_once)

    async def one(problem: Problem) -> Trial:
        async with slots:
            return await _try(pool, problem, wall_s)

    trials = await asyncio.gather(*map(one, problems))
    slow = [index for index, trial in enumerate(trials) if trial.reason.startswith("timeout: wall")]
    again = await asyncio.gather(*(_try(pool, problems[index], _PATIENCE * wall_s) for index in slow))
    for index, trial in zip(slow, again, strict=True):
        trials[index] = trial
    return trials


async def _try(pool: SandboxPool, problem: Problem, wall_s: float, attempts: int = 2) -> Trial:
    limits = WorkflowLimits(tests=replace(pool.limits, wall_s=wall_s))
    outcomes = await run_all_tests(pool, problem, problem.solution or "", limits=limits)
    slowest = max(outcomes, key=lambda outcome: outcome.wall_s)
    worst = next((outcome for outcome in outcomes if outcome.pass_rate < 1.0), slowest)
    if worst.status == "infrastructure":
        if attempts > 1:
            return await _try(pool, problem, wall_s, attempts - 1)
        raise UserError(f"the jails failed at the solution of {problem.id}: {last_line(worst.error)}")
    if worst.pass_rate < 1.0:
        return Trial(False, worst.wall_s, _reason(worst.status, worst.error))
    waits = worst.wall_s > pool.limits.wall_s and worst.cpu_s < _COMPUTING * worst.wall_s
    return Trial(
        not waits, worst.wall_s, f"timeout: it waits for longer than {pool.limits.wall_s:g} s" if waits else ""
    )


def _reason(status: str, error: str) -> str:
    missing = re.search(r"No module named '[^']*'", error)
    said = missing[0] if missing else re.sub(r"^(the tests themselves failed: )?", "", last_line(error))
    return (said if status == "failed" and said else f"{status}: {said}")[:_REASON_CHARS]
