"""One run for all tests of a problem, its verdicts dealt out to the public and the hidden part."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from fastgrpo.flow.problems.splitting import describe_tests
from fastgrpo.flow.problems.tested import made
from fastgrpo.flow.solutions import public_feedback, run_all_tests, run_tests
from fastgrpo.flow.types import NO_TESTS, Problem, WorkflowLimits
from fastgrpo_sandbox import AssertTests, Limits, Outcome, SandboxPool, StdioTests, Tests
from tests.flow.conftest import ADD

TESTS = AssertTests(asserts=tuple(f"assert add({n}, 1) == {n + 1}" for n in range(5)))
FIVE = replace(ADD, tests=TESTS, public=(0, 3))
SHOWN = AssertTests(asserts=(TESTS.asserts[0], TESTS.asserts[3]))


class Pool:
    """Answers every run with one outcome, and remembers tests and limits."""

    limits = Limits(wall_s=7.0, memory_mb=99)

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.runs: list[tuple[Tests, Limits | None]] = []

    async def run(self, code: str, *, tests: Tests, limits: Limits | None, order: int) -> Outcome:
        self.runs.append((tests, limits))
        return self.outcome


def both(pool: Any, problem: Problem) -> tuple[Outcome, Outcome]:
    return asyncio.run(run_all_tests(pool, problem, "", limits=WorkflowLimits()))


@pytest.mark.parametrize(
    ("verdicts", "public", "hidden"),
    [
        ((True,) * 5, "ok", "ok"),
        ((True, False, True, True, True), "ok", "failed"),
        ((True, True, True, False, True), "failed", "ok"),
        ((False,) * 5, "failed", "failed"),
    ],
)
def test_each_part_has_its_own_verdicts(verdicts: tuple[bool, ...], public: str, hidden: str) -> None:
    whole = Outcome(
        "ok" if all(verdicts) else "failed",
        tests=verdicts,
        error="" if all(verdicts) else f"{verdicts.count(False)} of 5 tests failed",
        error_by="" if all(verdicts) else "host",
    )
    pool = Pool(whole)
    outcomes = both(pool, FIVE)
    assert [tests for tests, _ in pool.runs] == [TESTS]
    assert [outcome.status for outcome in outcomes] == [public, hidden]
    assert outcomes[0].tests == (verdicts[0], verdicts[3])
    assert outcomes[1].tests == (verdicts[1], verdicts[2], verdicts[4])
    assert all(bool(outcome.error) == (outcome.status == "failed") for outcome in outcomes)
    assert all(bool(outcome.error) == bool(outcome.error_by) for outcome in outcomes)
    feedback = public_feedback(replace(FIVE, public_tests=SHOWN), outcomes[0])
    assert ("of 2 public tests fail" in feedback, "of 5" in feedback) == (public == "failed", False)


@pytest.mark.parametrize("status", ["timeout", "memory", "killed", "infrastructure"])
def test_what_ends_the_run_ends_it_for_both(status: Any) -> None:
    pool = Pool(Outcome(status, error="reason", tests=(False,) * 5, error_by="host"))
    outcomes = both(pool, FIVE)
    assert len(pool.runs) == 1
    assert [(outcome.status, outcome.error) for outcome in outcomes] == [(status, "reason")] * 2


def test_a_single_test_is_in_both_parts() -> None:
    one = replace(FIVE, tests=AssertTests(asserts=TESTS.asserts[:1]), public=(0,))
    assert [outcome.tests for outcome in both(Pool(Outcome("ok", tests=(True,))), one)] == [(True,), (True,)]


def test_a_problem_made_of_two_parts_is_run_twice() -> None:
    pool = Pool(Outcome("ok"))
    both(pool, ADD)
    assert [tests for tests, _ in pool.runs] == [ADD.public_tests, ADD.hidden_tests]


@pytest.mark.parametrize(("own", "wall_s"), [(2.0, 2.0), (50.0, 7.0)])
def test_the_problems_deadline_shortens_the_jails(own: float, wall_s: float) -> None:
    pool = Pool(Outcome("ok"))
    asyncio.run(run_tests(pool, replace(ADD, wall_s=own), "", public=True, limits=WorkflowLimits()))  # type: ignore[arg-type]
    assert pool.runs == [(ADD.public_tests, Limits(wall_s=wall_s, memory_mb=99))]


class TellingPool(Pool):
    """Its solution raises what it was given."""

    async def run(self, code: str, *, tests: Tests, limits: Limits | None, order: int) -> Outcome:
        self.runs.append((tests, limits))
        last = describe_tests(tests)[-1]
        none = (False,) * len(describe_tests(tests))
        return replace(self.outcome, tests=none, error=f"ValueError: {last}")


@pytest.mark.parametrize("status", ["failed", "memory"])
@pytest.mark.parametrize("error_by", ["jail", ""])
def test_what_a_solution_says_of_hidden_tests_is_not_shown(status: Any, error_by: Any) -> None:
    """Nor what nobody answers for, as of a server that does not know the field."""
    pool = TellingPool(Outcome(status, error_by=error_by))
    public, hidden = both(pool, replace(FIVE, public_tests=SHOWN))
    assert TESTS.asserts[4] in hidden.error
    assert (public.tests, public.error) == ((False, False), f"ValueError: {TESTS.asserts[3]}")
    feedback = public_feedback(FIVE, public)
    assert all(text not in feedback for text in (TESTS.asserts[1], TESTS.asserts[2], TESTS.asserts[4]))


def test_an_error_that_nobody_is_shown_costs_no_second_run() -> None:
    one = AssertTests(asserts=TESTS.asserts[:1])
    hidden_alone = replace(FIVE, public_tests=NO_TESTS, public=())
    for problem in (replace(FIVE, tests=one, public=(0,), public_tests=one, hidden_tests=one), hidden_alone):
        pool = TellingPool(Outcome("failed", error_by="jail"))
        public, _ = both(pool, problem)
        assert len(pool.runs) == 1
        assert "ValueError" not in public_feedback(problem, public)


def test_a_jail_that_is_lost_meanwhile_says_nothing_of_the_solution() -> None:
    class LosingPool(TellingPool):
        async def run(self, code: str, *, tests: Tests, limits: Limits | None, order: int) -> Outcome:
            if self.runs:
                return Outcome("infrastructure", error="the host's /secret is gone", error_by="host")
            return await super().run(code, tests=tests, limits=limits, order=order)

    public, _ = both(LosingPool(Outcome("failed", error_by="jail")), replace(FIVE, public_tests=SHOWN))
    assert (public.status, public.tests, public.error) == ("failed", (False, False), "")


CASES = StdioTests(cases=(("1", "2"), ("secret", "3"), ("2", "3")))


def test_parts_of_cases_that_have_a_jail_each_are_run_once_by_themselves() -> None:
    problem = made("cases", "Add one.", "", "", CASES, (0, 2))
    pool = TellingPool(Outcome("failed", error_by="jail"))
    public, hidden = both(pool, problem)
    assert [tests for tests, _ in pool.runs] == [problem.public_tests, problem.hidden_tests]
    assert "secret" in hidden.error
    assert "secret" not in public_feedback(problem, public)
    shared = made("case", "Add one.", "", "", StdioTests(cases=CASES.cases[:1]))
    pool = TellingPool(Outcome("failed", error_by="jail"))
    assert [outcome.tests for outcome in both(pool, shared)] == [(False,), (False,)]
    assert len(pool.runs) == 1


@pytest.mark.jail
def test_a_traceback_of_a_hidden_case_stays_with_the_hidden_part() -> None:
    code = "text = input()\nassert text != 'secret', text\nprint(int(text) + (2 if text == '1' else 1))"

    async def run() -> tuple[Outcome, Outcome]:
        async with SandboxPool(cells=1) as pool:
            return await run_all_tests(pool, problem, code, limits=WorkflowLimits())

    problem = made("cases", "Add one.", "", "", CASES, (0, 2))
    public, hidden = asyncio.run(run())
    assert (public.tests, public.error_by) == ((False, True), "host")
    assert (hidden.tests, hidden.error_by, "AssertionError: secret" in hidden.error) == ((False,), "jail", True)
