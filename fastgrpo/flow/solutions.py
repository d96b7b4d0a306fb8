"""A solution: cut from a reply, run against its problem's tests, and what of that may be shown."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from fastgrpo.flow.problems.numbers import is_right
from fastgrpo.flow.problems.splitting import describe_tests
from fastgrpo.flow.types import NO_TESTS, Problem, WorkflowLimits
from fastgrpo_sandbox import Outcome, SandboxPool, StdioTests, Tests, extract_code
from fastgrpo_sandbox.extract import without_thought
from fastgrpo_sandbox.source_text import preamble

_SHOWN_TESTS = 3
_SHOWN_CHARS = 400
NO_PUBLIC_TESTS = "This problem has no public tests."
_FUTURE = re.compile(r"^from __future__ import (\([^()]*\)|.*)", re.MULTILINE)


def solution_of(problem: Problem, reply: str) -> str:
    """The solution in a reply: its program, or all that it says where a number is asked for."""
    if problem.answer is not None:
        return without_thought(reply).strip()
    return extract_code(reply, problem.entry_point)


async def run_tests(pool: SandboxPool, problem: Problem, code: str, *, public: bool, limits: WorkflowLimits) -> Outcome:
    """Run a solution against the problem's public or hidden tests, with the imports and helpers its prompt gives.

    Where there are none, none passes; an answer that the host knows is the only hidden test.
    """
    tests = problem.public_tests if public else problem.hidden_tests
    if tests == NO_TESTS:
        return _compared(problem, code) if not public and problem.answer is not None else Outcome("failed")
    return await run_program(pool, problem, code, tests, limits)


def _compared(problem: Problem, text: str) -> Outcome:
    """Whether a solution's text gives the number that is asked for: no jail is needed."""
    right = is_right(text, problem.answer or "")
    return Outcome("ok" if right else "failed", tests=(right,), verdict_by="host")


async def run_all_tests(
    pool: SandboxPool, problem: Problem, code: str, *, limits: WorkflowLimits
) -> tuple[Outcome, Outcome]:
    """(public, hidden) outcomes of one run of all tests; what ends the run, as a loop without end, ends it for both.

    Cases of StdioTests have a jail each, so each part is a run of its own, and in no more jails. Elsewhere a solution
    may know hidden inputs when it fails: where its error is shown, a run of the public tests alone says what it is.
    """
    alone = partial(run_tests, pool, problem, code, limits=limits)
    if isinstance(problem.tests, StdioTests) and not problem.shared_test:
        first, rest = await asyncio.gather(alone(public=True), alone(public=False))
        return first, rest
    if problem.tests is None:
        return await alone(public=True), await alone(public=False)
    outcome = await run_program(pool, problem, code, problem.tests, limits)
    public = [passed for index, passed in enumerate(outcome.tests) if index in problem.public]
    hidden = [passed for index, passed in enumerate(outcome.tests) if index not in problem.public] or public
    shown = _outcome_of(outcome, public)
    if shown.error and shown.error_by != "host" and _shows_tests(problem):
        again = await alone(public=True)
        ours = again.status == "infrastructure"  # whose reason is nothing of the solution's
        shown = replace(shown, error="" if ours else again.error, error_by="" if ours else again.error_by)
    return shown, _outcome_of(outcome, hidden)


def judged_in_one_run(problem: Problem) -> bool:
    """Whether one run judges public and hidden tests, so that what ends it ends both; StdioTests have a jail a case."""
    return problem.tests is not None and not isinstance(problem.tests, StdioTests)


async def run_program(
    pool: SandboxPool, problem: Problem, code: str, tests: Tests | None, limits: WorkflowLimits
) -> Outcome:
    """One run of `code` after what the problem gives, within the problem's deadline if any; without tests a script."""
    given = given_to(problem)
    bounds = limits.tests
    if problem.wall_s is not None:
        bounds = bounds or pool.limits
        bounds = replace(bounds, wall_s=min(bounds.wall_s, problem.wall_s))
    return await pool.run(program_after(given, code), tests=tests, limits=bounds, order=limits.order)


def given_to(problem: Problem) -> str:
    """The imports and helpers that every solution of the problem may lean on."""
    return problem.given or preamble(problem.prompt, problem.entry_point)


def _outcome_of(whole: Outcome, tests: Sequence[bool]) -> Outcome:
    """The outcome of some of the tests of a run; a count in its error is that of all."""
    part = replace(whole, tests=tuple(tests))
    if whole.status not in ("ok", "failed"):
        return part
    if tests and all(tests):
        return replace(part, status="ok", error="", error_by="")
    return replace(part, status="failed")


def program_after(given: str, code: str) -> str:
    """`code` after the imports and helpers that the problem gives; its `from __future__` imports stay the first."""
    future = "\n".join(found[0] for found in _FUTURE.finditer(code))
    return f"{future}\n{given}\n{_FUTURE.sub('', code)}" if given else code


def public_feedback(problem: Problem, outcome: Outcome) -> str:
    """What the public tests say, in a few lines that may be shown to worker and policy.

    A test that is hidden as well, because the problem has no other, is not shown: its text holds the answer.
    """
    if not problem.shown_tests:
        return NO_PUBLIC_TESTS
    described = describe_tests(problem.public_tests)
    passed = outcome.tests or (False,) * len(described)
    if outcome.pass_rate == 1.0:
        return f"All {len(described)} public tests pass."
    failed = [text for text, good in zip(described, passed, strict=False) if not good]
    count = f"{len(failed)} of {len(described)} public tests fail"
    if not _shows_tests(problem):
        return f"{count}."
    lines = [f"{count}:"]
    lines += [text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + " ..." for text in failed[:_SHOWN_TESTS]]
    counts = outcome.status == "failed" and outcome.error_by == "host"  # hidden tests, too
    if outcome.status != "ok" and outcome.error and not counts:
        lines.append(last_line(outcome.error))
    elif outcome.status not in ("ok", "failed"):
        lines.append(f"The run ended with: {outcome.status}.")
    return "\n".join(lines)


def _shows_tests(problem: Problem) -> bool:
    """Whether feedback shows the public tests that fail, and the error: where none of them is hidden as well."""
    hidden = describe_tests(problem.hidden_tests)
    return problem.shown_tests and set(describe_tests(problem.public_tests)).isdisjoint(hidden)


def last_line(error: str) -> str:
    """The last line of a traceback, shortened."""
    lines = error.strip().splitlines()
    return lines[-1][:_SHOWN_CHARS] if lines else ""
