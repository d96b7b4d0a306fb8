"""Many cases make one outcome, of whose texts no more is kept meanwhile than it will have."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo_sandbox import Limits, Outcome, SandboxPool, StdioTests
from fastgrpo_sandbox.stdio import Cases

MB = 1 << 20
RUNS = st.builds(
    Outcome,
    st.sampled_from(["ok", "ok", "failed", "timeout", "infrastructure"]),
    stdout=st.sampled_from("ab"),
    error=st.sampled_from(["", "it broke"]),
    error_by=st.sampled_from(["host", "jail"]),
    cpu_s=st.integers(0, 3),
    wall_s=st.integers(0, 3),
    memory_mb=st.integers(0, 3),
)
CHECKS = st.builds(
    Outcome,
    st.sampled_from(["ok", "failed", "infrastructure"]),
    error=st.sampled_from(["", "no", "never"]),
    tests=st.sampled_from([(), (True,), (False,)]),
)


@given(st.lists(st.tuples(RUNS, st.none() | CHECKS), max_size=6), st.randoms(use_true_random=False), st.booleans())
def test_in_whatever_order_cases_end_the_outcome_is_the_first_that_says_most(cases, draw, passed):
    tests = [passed] * len(cases)
    merged = Cases()
    for case, (run, check) in draw.sample(list(enumerate(cases)), len(cases)):
        merged.add(case, run, check)
    outcome = merged.merged(tests)
    runs, checks = [run for run, _ in cases], [check for _, check in cases if check is not None]
    lost = next((each for each in (*runs, *checks) if each.status == "infrastructure"), None)
    shown = lost or next((each for each in runs if each.status != "ok"), None) or (runs or [Outcome("ok")])[0]
    assert (outcome.stdout, outcome.cpu_s) == (shown.stdout, sum(run.cpu_s for run in runs))
    assert outcome.memory_mb == max((run.memory_mb for run in runs), default=0)
    assert outcome.wall_s == max((run.wall_s for run in runs), default=0)
    assert outcome.verdict_by == ("judge" if checks else "host")
    assert outcome.tests == (() if lost else tuple(tests))
    if shown.status != "ok":
        assert (outcome.status, outcome.error, outcome.error_by) == (shown.status, shown.error, shown.error_by)
    elif passed and cases:
        assert (outcome.status, outcome.error) == ("ok", shown.error)
    else:
        broken = next((check.error for check in checks if check.error and not check.pass_rate), "")
        assert outcome.status == "failed"
        if cases:
            assert outcome.error == (
                f"the checker failed: {broken}" if broken else f"{len(cases)} of {len(cases)} cases differ"
            )
            assert outcome.error_by == ("jail" if broken else "host")


@pytest.mark.jail
@pytest.mark.parametrize("checker", ["", "def checker(given, output, expected): return output == expected"])
@pytest.mark.parametrize("end", ["", "\nraise ValueError('y' * (1 << 19))"], ids=["right", "raises"])
def test_what_many_cases_print_is_not_all_held(checker, end):
    """Nor what they say as they fail."""
    wanted = "x" * MB
    tests = StdioTests((("", wanted),) * 96, checker=checker)

    async def main() -> tuple[Outcome, int]:
        async with SandboxPool(cells=1, limits=Limits(wall_s=60)) as pool:
            tracemalloc.start()
            outcome = await pool.run(f"print({'x'!r} * (1 << 20), end=''){end}", tests=tests)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return outcome, peak

    outcome, peak = asyncio.run(asyncio.wait_for(main(), 240))
    assert outcome.tests == (not end,) * 96, outcome.error[-300:]
    assert peak < 64 * MB
