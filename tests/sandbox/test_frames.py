"""What a job may write on its channel, read on the host: it ends that job, typed, and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo_sandbox import AssertTests, CheckTests, Limits, StdioTests, UnittestTests, job
from fastgrpo_sandbox.guest import wire
from fastgrpo_sandbox.weight import count_values
from tests.sandbox.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "bench"))

from frame_fuzz import fuzz, mutate

FORMS = {
    "script": None,
    "check": CheckTests("def check(f): assert f(1) == 2", "f"),
    "assert": AssertTests(("assert f(1) == 2",)),
    "unittest": UnittestTests("import unittest\nclass T(unittest.TestCase):\n    def test(self): pass\n"),
    "stdio": StdioTests((("", "x"),)),
}
BAD = {
    "not UTF-8": b"\x94\xa2\xff\xfe\xa0\xc0\x90",
    "not UTF-8 in the value": b"\x94\xa0\xa0\x91\xa1\xff\x90",
    "not UTF-8 in the kind": b"\x94\xa0\xa3\xed\xa0\x80\xc0\x90",
    "nested": b"\x94\xa0\xa0" + b"\x91" * 5000 + b"\xc0\x90",
    "unhashable key": b"\x94\xa0\xa0\x81\x80\xc0\x90",
    "map for an array": b"\x84\xa0\xa0\xc0\x90",
    "no such byte": b"\xc1",
    "ends early": b"\x94\xa0\xa0",
    "bad timestamp": b"\x94\xa0\xa0\xd7\xff" + b"\xff" * 8 + b"\x90",
    "nothing": b"",
}
FRAME = "import os\nbody = {body!r}\nos.write(3, len(body).to_bytes(4, 'little') + {kind!r} + body)\n"
FRAME_AND_EXIT = FRAME + "os._exit(0)\n"
SESSION = "async def main(call): await call('x')\n"
NEIGHBOUR = "import time; time.sleep(0.2); print('slept')"


async def echo(method, params):
    return params


async def _session(pool, code, handler=echo):
    async with pool.session(code, handler, limits=Limits(wall_s=20)) as opened:
        return await opened.outcome()


def beside_neighbours(pool, *works):
    """What became of `works`, once they and their neighbours in both kinds of cell have ended, the neighbours well."""

    async def run():
        async def slow(method, params):
            await asyncio.sleep(0.2)

        others = [pool.pool.run(NEIGHBOUR), *(_session(pool.pool, SESSION, slow) for _ in range(2))]
        outcomes = await asyncio.wait_for(asyncio.gather(*others, *works), 60)
        assert [o.status for o in outcomes[:3]] == ["ok"] * 3
        return outcomes[3:]

    return pool.wait(run())


def in_every_form(pool, code):
    return [pool.pool.run(code, tests=tests) for tests in FORMS.values()]


@pytest.mark.jail
@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_malformed_result_fails_its_own_job(pool, body):
    code = FRAME_AND_EXIT.format(kind=b"R", body=body)
    outcomes = beside_neighbours(pool, _session(pool.pool, code), *in_every_form(pool, code))
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert not any(any(outcome.tests) for outcome in outcomes)


@pytest.mark.jail
@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_malformed_call_fails_its_own_job(pool, body):
    frame = FRAME.format(kind=b"C", body=body)
    jobs = in_every_form(pool, frame + "import time; time.sleep(20)")
    called, *others = beside_neighbours(pool, _session(pool.pool, frame + SESSION), *jobs)
    assert called.status == "failed"
    assert {outcome.status for outcome in others} <= {"failed", "killed"}


ERRORS = (
    *(ValueError("x"), MemoryError(), RecursionError(), AttributeError("x"), SystemError("x")),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
)


@pytest.mark.jail
@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("decoder", ["parse_done", "outcome_of", "count_values", "decode"])
def test_whatever_a_decoder_raises_ends_its_own_job(pool, monkeypatch, decoder, error):
    place = msgspec.msgpack if decoder == "decode" else job
    real = getattr(place, decoder)

    def raising(*args, **kwargs):
        if b"MARKED" in msgspec.msgpack.encode(args[0]):
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(place, decoder, raising)
    jobs = [
        _session(pool.pool, "async def main(call):\n    print('MARKED', flush=True); return await call('MARKED')\n")
    ]
    if decoder in ("parse_done", "outcome_of"):
        jobs.append(pool.pool.run("def f(x): return 2\nprint('MARKED')", tests=FORMS["check"]))
    outcomes = beside_neighbours(pool, *jobs)
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert not any(any(outcome.tests) for outcome in outcomes)


@pytest.mark.jail
@pytest.mark.usefixtures("steady")
def test_no_job_ends_as_infrastructure_by_what_it_writes_at_once(pool):
    """Its judge, perhaps not begun, is no excuse."""
    writes = [
        "os.write(3, b'\\xff' * 64)",
        "os.write(3, 2 * b'\\0\\0\\0\\0R')",
        "os.write(3, b'\\0\\0\\0\\0C')",
        "os.closerange(0, 10)",
        "os.write(1, b'x' * 10**6)",
    ]
    jobs = [{"code": f"import os\n{write}\nos._exit(0)", "tests": FORMS["check"]} for write in writes * 30]
    outcomes = pool.run_all(jobs)
    assert {outcome.status for outcome in outcomes} <= {"failed", "output_limit"}
    assert {outcome.tests for outcome in outcomes} == {(False,)}


def test_fuzzed_frames_do_not_break_the_fork_server(tmp_path):
    """`make sanitize` runs a million rounds."""
    sources = [REPOSITORY / "tests/sandbox/fuzz_frames.c", REPOSITORY / "csrc/arena.c"]
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"]
    built = subprocess.run(
        ["cc", *flags, "-o", tmp_path / "fuzz", *sources], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    done = subprocess.run([tmp_path / "fuzz", "20000"], capture_output=True, text=True, timeout=240, check=False)
    assert (done.stdout, done.returncode) == ("20000 rounds\n", 0), built.stderr + done.stderr


def test_fuzzed_frames_end_their_own_jobs():
    assert fuzz(3000).total() > 3000


LEAVES = (st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=40), st.binary())
VALUES = st.recursive(
    st.one_of(*LEAVES),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=40), inner, max_size=20),
)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_values_are_counted_as_the_decoder_makes_them(value):
    def count(value):
        if isinstance(value, dict):
            return 1 + sum(1 + count(item) for item in value.values())
        return 1 + sum(map(count, value)) if isinstance(value, list) else 1

    frame = msgspec.msgpack.encode(value)
    assert count_values(frame, 1 << 20) == count(value)
    assert count_values(frame, 3) == min(count(value), 4)


def test_values_of_every_width_are_counted():
    long = ["s" * n for n in (31, 32, 255, 256, 65535, 65536)] + [b"b" * n for n in (255, 256, 65536)]
    assert (
        count_values(msgspec.msgpack.encode([*long, [None] * 15, [None] * 16, [None] * 65536]), 1 << 20)
        == 10 + 16 + 17 + 65537
    )
    for size in (1, 2, 3, 4, 8, 16, 255, 256, 65536):
        assert count_values(msgspec.msgpack.encode([msgspec.msgpack.Ext(5, b"e" * size), 7]), 9) == 3


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 50))
def test_counting_never_raises(frame, most):
    assert 0 <= count_values(frame, most) <= most + 1


def _frames_in(data: bytes) -> list[bytes]:
    """What the guest reads from a peer that sends `data` and ends."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    frames = []
    with os.fdopen(read, "rb"), contextlib.suppress(EOFError, ValueError):
        while True:
            frames.append(wire.read_peer(read, wire.MAX_PEER_FRAME))
    return frames


def test_a_frame_too_long_is_refused_before_it_is_sent():
    read, write = os.pipe()
    with pytest.raises(ValueError, match="too long to send"):
        wire.send_frame(write, wire.CALL, bytes(wire.MAX_FRAME + 1))
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.binary(max_size=40), max_size=4))
def test_the_guest_reads_whole_frames_or_an_end(rng, bodies):
    whole = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    assert _frames_in(whole) == bodies
    for frame in _frames_in(mutate(rng, whole)):
        assert len(frame) <= len(whole) + 1000
