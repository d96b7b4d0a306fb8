"""Random bytes on every wire: the host's parsers, the fork server, and the channel of a live job."""

from __future__ import annotations

import asyncio
import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgrpo_sandbox import CheckTests, Limits, SandboxPool
from fastgrpo_sandbox.verdict import DONE, Expected, SessionResult, outcome_of, parse_done

REASONS = st.integers(0, 6)
FRAMES = st.binary(max_size=80)


@given(REASONS, st.integers(0, 0xFFFF), st.integers(0, 3), st.integers(0, 3), FRAMES, FRAMES, st.booleans())
def test_no_random_frame_is_a_pass_and_none_breaks_the_host(reason, status, results, verdicts, result, verdict, judged):
    numbers = (reason, status, 0, 0, results, verdicts, 10, 10, 10, 0, 0, 0, len(result), len(verdict))
    outcome = outcome_of(
        parse_done(DONE.pack(*numbers) + result + verdict), Limits(), Expected(2, judged, b"s" * 32, None)
    )
    assert outcome.tests == (False, False)
    assert outcome.status not in ("ok", "infrastructure")


@given(st.binary(max_size=DONE.size + 40))
def test_a_short_done_frame_is_an_error_not_an_outcome(body):
    try:
        done = parse_done(body)
    except struct.error:
        assert len(body) < DONE.size
        return
    outcome_of(done, Limits(), None)


def test_only_a_session_has_a_value():
    """What nobody asked for is not even decoded: sixteen MB of empty lists would be a gigabyte."""
    frame = bytes.fromhex("94a0a0 dd00000002 9090 90")
    done = parse_done(DONE.pack(0, 0, 0, 0, 1, 0, 10, 10, 10, 0, 0, 0, len(frame), 0) + frame)
    assert outcome_of(done, Limits(), None).status == "failed"
    assert outcome_of(done, Limits(), None, SessionResult).value == [[], []]


@pytest.mark.jail
def test_random_bytes_from_a_job_never_reach_its_verdict(pool):
    code = """
import os, random
random.seed(SEED)
def noise():
    for _ in range(40):
        kind = random.choice((b'C', b'R', b'x', bytes([random.randrange(256)])))
        body = random.randbytes(random.randrange(40))
        os.write(random.choice((3, 4)), random.choice((len(body), 0, 2**31, 7)).to_bytes(4, 'little') + kind + body)
def f(x):
    noise()
    return x + 1
"""
    tests = CheckTests("def check(c):\n    assert c(1) == 3", "f")
    jobs = [{"code": code.replace("SEED", str(seed)), "tests": tests, "limits": Limits(wall_s=5)} for seed in range(30)]
    outcomes = pool.run_all(jobs)
    assert {o.tests for o in outcomes} == {(False,)}
    assert "infrastructure" not in {o.status for o in outcomes}
    assert pool.run("print('alive')").status == "ok"


@pytest.mark.jail
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 5), st.binary(max_size=60)), max_size=6), st.integers())
def test_random_frames_from_the_host_are_refused_or_ignored(pool, frames, seed):
    """The server answers each bad start with a refusal and lives, or ends at an unknown kind; never anything else."""
    cell = pool.pool.cells.all[0]
    rng = random.Random(seed)

    async def send():
        for kind, body in frames:
            if kind <= 3:
                cell._send(rng.choice((50_000, 65_535, 70_000)), kind, body)

    pool.wait(send())
    assert pool.run("print('alive')").stdout == "alive\n"


@pytest.mark.jail
def test_an_unknown_frame_from_the_host_ends_the_cell_and_a_new_one_comes():
    async def main():
        async with SandboxPool(cells=1) as pool:
            pool.cells.all[0]._send(0, 99, b"")
            while not pool.stats()["cells_lost"]:
                await asyncio.sleep(0.01)
            return await pool.run("print('back')")

    assert asyncio.run(main()).stdout == "back\n"
