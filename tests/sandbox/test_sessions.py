# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Sessions: code in the jail that talks to its host while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import tracemalloc
from pathlib import Path

import pytest

from fastgrpo_sandbox import CallError, EndSession, Limits, Outcome, SandboxPool, job
from fastgrpo_sandbox.job import RunningSession
from tests.sandbox.conftest import descendants

pytestmark = [pytest.mark.jail, pytest.mark.usefixtures("steady")]


def session(pool, code, handler=None, inputs=None, limits=None) -> Outcome:
    async def echo(method, params):
        return params

    async def run() -> Outcome:
        async with pool.pool.session(code, handler or echo, inputs, limits) as opened:
            return await opened.outcome()

    return pool.wait(run())


def test_inputs_calls_and_value(pool):
    code = "async def main(call, n):\n    answer = await call('twice', x=n)\n    print('said', answer)\n    return [answer, {'k': None}]"

    async def handler(method, params):
        assert method == "twice"
        return params["x"] * 2

    outcome = session(pool, code, handler, {"n": 21})
    assert (outcome.status, outcome.value, outcome.stdout) == ("ok", [42, {"k": None}], "said 42\n")


def test_calls_overlap(pool):
    code = "import asyncio\nasync def main(call):\n    return sorted(await asyncio.gather(*(call('x', i=i) for i in range(20))))"
    waiting, all_came = set(), asyncio.Event()

    async def handler(method, params):
        waiting.add(params["i"])
        if len(waiting) == 20:
            all_came.set()
        await all_came.wait()
        return params["i"]

    assert session(pool, code, handler).value == list(range(20))


def test_call_error_is_raised_in_the_jail(pool):
    async def handler(method, params):
        raise CallError("no such operator")

    code = "async def main(call):\n    try: await call('x')\n    except Exception as error: return type(error).__name__ + ': ' + str(error)"
    assert session(pool, code, handler).value == "CallError: no such operator"
    uncaught = session(pool, "async def main(call): await call('x')", handler)
    assert uncaught.status == "failed"
    assert "no such operator" in uncaught.error


def test_a_broken_handler_is_infrastructure(pool):
    async def handler(method, params):
        raise RuntimeError("worker down")

    outcome = session(pool, "async def main(call): await call('x')", handler)
    assert outcome.status == "infrastructure"
    assert "worker down" in outcome.error


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("x = 1", "failed", "async def main"),
        ("async def main(call): return object()", "failed", "TypeError"),
        ("async def main(call): await call('x', y=object())", "failed", "TypeError"),
        ("async def main(call): raise KeyError(1)", "failed", "KeyError"),
        ("async def main(call):\n    while True: pass", "timeout", "CPU"),
        ("import asyncio\nasync def main(call): await asyncio.sleep(60)", "timeout", "wall"),
        ("async def main(call): return [0] * 10 ** 10", "memory", "MemoryError"),
        ("def main(call:", "failed", "SyntaxError"),
        (
            "import os\nasync def main(call): os.write(3, b'\\x02\\0\\0\\0C\\xc1\\xc1'); await call('x')",
            "failed",
            "malformed call",
        ),
        ("import os\nasync def main(call): os.write(3, b'\\xff\\xff\\xff\\xffC')", "failed", "malformed frame"),
        (
            "import asyncio\nasync def main(call):\n    await asyncio.gather(*(call('wait') for _ in range(400)))",
            "failed",
            "calls unanswered",
        ),
    ],
)
def test_every_bad_session_has_its_outcome(pool, code, status, said):
    async def handler(method, params):
        if method == "wait":
            await asyncio.sleep(20)
        return 1

    outcome = session(pool, code, handler, limits=Limits(wall_s=4, cpu_s=0.4))
    assert outcome.status == status
    assert said in outcome.error


NOT_PLAIN = {
    "object": object(),
    "integer": 2**64,
    "text": "\ud800",
    "nested": functools.reduce(lambda x, _: [x], range(5000), 1),
}


@pytest.mark.parametrize("value", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_inputs_that_are_not_plain_are_rejected(pool, value):
    assert session(pool, "async def main(call, x): pass", inputs={"x": value}).status == "rejected"


@pytest.mark.parametrize("value", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_an_answer_that_is_not_plain_is_infrastructure_at_once(pool, value):
    """A number of 65 bits let the session wait for its answer until its time was over, which was its own fault."""

    async def handler(method, params):
        return value

    outcome = session(pool, "async def main(call): return await call('x')", handler)
    assert outcome.status == "infrastructure"
    assert outcome.error.startswith("answer to 'x' is not plain data: ")


def test_an_error_that_has_no_text_is_infrastructure(pool):
    class Mute(Exception):
        def __repr__(self):
            raise ValueError

    async def handler(method, params):
        raise Mute

    outcome = session(pool, "async def main(call): return await call('x')", handler)
    assert (outcome.status, outcome.error) == ("infrastructure", "no answer to a call: ValueError")


def test_a_handler_may_run_jobs(pool):
    async def handler(method, params):
        return (await pool.pool.run(params["code"])).stdout

    code = "async def main(call): return await call('run', code='print(6 * 7)')"
    assert session(pool, code, handler).value == "42\n"


def test_leaving_the_block_ends_the_session_and_its_handlers(pool):
    cancelled, called = [], asyncio.Event()

    async def handler(method, params):
        called.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(method)
            raise

    async def run() -> None:
        async with pool.pool.session("async def main(call): await call('x')", handler):
            await called.wait()

    pool.wait(asyncio.wait_for(run(), 30))
    assert cancelled == ["x"]
    assert pool.pool.stats()["sessions"] == 0


def test_an_answer_too_long_for_the_jail_is_infrastructure_and_takes_no_neighbour_along(pool):
    async def handler(method, params):
        return b"x" * (33 << 20)

    outcome = session(pool, "async def main(call): await call('x')", handler)
    assert outcome.status == "infrastructure"
    assert "answer to 'x'" in outcome.error


def test_calls_that_would_fill_the_host_are_stopped(pool):
    """Decoded, an empty list takes seventy times its byte."""
    calls = 0

    async def handler(method, params):
        nonlocal calls
        calls += 1

    code = """
import os
async def main(call):
    body = b'\\x93\\x01\\xa1x\\x81\\xa1a' + b'\\xdb' + (1 << 19).to_bytes(4, 'big') + b'y' * (1 << 19)
    while True:
        left = memoryview(len(body).to_bytes(4, 'little') + b'C' + body)
        while left: left = left[os.write(3, left):]
"""
    outcome = session(pool, code, handler, limits=Limits(wall_s=60))
    assert (outcome.status, outcome.error) == ("failed", "more than 16777216 bytes of calls")
    assert calls <= 32


@pytest.mark.parametrize("body", [b"", b"\x93\x01\xa0\x80"], ids=["malformed", "well formed"])
def test_a_flood_of_small_calls_is_stopped_before_the_host(pool, monkeypatch, body):
    """The host takes its time over each frame, also over those that a session which it has stopped had still sent."""
    heard, take = [], RunningSession.on_call
    monkeypatch.setattr(RunningSession, "on_call", lambda job, body: heard.append(take(job, body)))
    code = f"""
import os
async def main(call):
    frames = (len({body!r}).to_bytes(4, "little") + b"C" + {body!r}) * 100_000
    while True: os.write(3, frames)
"""
    assert session(pool, code, limits=Limits(wall_s=60)).status == "failed"
    assert len(heard) <= 512


def test_calls_are_counted_however_small_they_are(pool, monkeypatch):
    monkeypatch.setattr(job, "MAX_SAID", 100 * 256)
    code = "async def main(call, n):\n    for i in range(n): await call('x')"
    assert session(pool, code, inputs={"n": 100}).status == "ok"
    outcome = session(pool, code, inputs={"n": 101})
    assert (outcome.status, outcome.error) == ("failed", f"more than {100 * 256} bytes of calls")


def test_a_handler_may_end_a_session_that_goes_on_and_on(pool):
    async def handler(method, params):
        if params["i"] == 3:
            raise EndSession("enough of it")

    code = "async def main(call):\n    for i in range(9):\n        try: await call('x', i=i)\n        except BaseException: pass"
    outcome = session(pool, code, handler)
    assert (outcome.status, outcome.error, outcome.error_by) == ("failed", "enough of it", "host")


def test_a_session_that_does_not_read_costs_the_server_nothing(pool):
    code = """
import asyncio, socket
async def main(call):
    channel = socket.socket(fileno=3)
    channel.shutdown(socket.SHUT_RD)
    asyncio.get_running_loop().remove_reader(3)
    task = asyncio.ensure_future(call('x'))
    await asyncio.sleep(1.5)
"""
    before = _jail_cpu_s(pool)
    session(pool, code, limits=Limits(wall_s=20))
    assert _jail_cpu_s(pool) - before < 0.7


def test_answers_that_a_session_does_not_read_are_bounded(pool):
    """200 of 4 MiB were 800 MB of this process."""
    code = """
import msgspec, os, struct, time
async def main(call):
    for number in range(200):
        body = msgspec.msgpack.encode([number, "x", {}])
        os.write(3, struct.pack("<I", len(body)) + b"C" + body)
    time.sleep(15)
"""
    answer = "x" * (4 << 20)

    async def handler(method, params):
        return answer

    tracemalloc.start()
    outcome = session(pool, code, handler, limits=Limits(wall_s=20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcome.status == "failed"
    assert peak < 100 << 20


def _jail_cpu_s(pool) -> float:
    """CPU of all live processes in the session cells, and of those that they waited for."""
    cells = [cell for cell in pool.pool.cells.all if cell.kind == "session"]
    spent = 0
    for pid in set().union(*(descendants(cell._process.pid) for cell in cells)):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            spent += sum(map(int, fields[11:15]))
    return spent / 100


def test_large_values_cross_both_ways(pool):
    async def handler(method, params):
        return params["text"] * 2

    code = "async def main(call): return len(await call('x', text='a' * 1_000_000))"
    assert session(pool, code, handler).value == 2_000_000


@pytest.mark.parametrize("code", ["await call('x', text='a' * 2**20)", "return 'a' * 2**20"])
def test_a_value_too_long_to_cross_is_an_error_of_the_code(pool, code):
    outcome = session(pool, f"async def main(call): {code}")
    assert outcome.status == "failed"
    assert "ValueError" in outcome.error
    assert "at most 1048576 can cross at once" in outcome.error


def test_a_call_too_long_to_cross_costs_no_other(pool):
    code = "async def main(call):\n    try: await call('x', text='a' * 2**20)\n    except ValueError: return await call('x', text='b')"
    assert session(pool, code).value == {"text": "b"}


def test_what_sessions_are_given_is_held_neither_while_they_wait_nor_once_it_is_sent():
    text = "x" * (1 << 20)
    code = "async def main(call, text): await call('x')"

    async def main() -> int:
        begun, end = asyncio.Event(), asyncio.Event()

        async def handler(method, params):
            begun.set()
            await end.wait()

        async def one() -> Outcome:
            async with pool.session(code, handler, {"text": text}) as opened:
                return await opened.outcome()

        async with SandboxPool(cells=1, sessions=16) as pool:
            async with pool.session("async def main(call): pass", handler) as opened:
                await opened.outcome()
            tracemalloc.start()
            tasks = [asyncio.create_task(one()) for _ in range(64)]
            await begun.wait()
            while pool.stats()["sessions"] < 16:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # the last are written
            held, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            end.set()
            assert {outcome.status for outcome in await asyncio.gather(*tasks)} == {"ok"}
            return held

    assert asyncio.run(asyncio.wait_for(main(), 60)) < 8 << 20


@pytest.mark.parametrize("where", ["call", "result"])
def test_a_megabyte_of_empty_lists_is_counted_not_decoded(pool, where):
    """Decoded, each takes seventy times its byte; in a string the same bytes cost nothing."""
    body = "b'\\xdd' + (1_000_000).to_bytes(4, 'big') + bytes([0x90]) * 1_000_000"
    frames = {
        "call": f"b'C', b'\\x93\\x01\\xa1x\\x81\\xa1a' + {body}",
        "result": f"b'R', b'\\x94\\xa0\\xa0' + {body} + b'\\x90'",
    }
    code = f"""
import os
kind, body = {frames[where]}
left = len(body).to_bytes(4, 'little') + kind + body
while left: left = left[os.write(3, left):]
async def main(call): await call('x')
"""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = session(pool, code)
    assert outcome.status == "failed"
    assert "more than 65536 values" in outcome.error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 << 10
    assert session(pool, "async def main(call, data): return data", inputs={"data": b"\x90" * 500_000}).status == "ok"


def test_a_fault_stands_however_the_session_ends(pool):
    code = "import os\nasync def main(call): os.write(3, b'\\x02\\0\\0\\0C\\xc1\\xc1'); return 1"
    outcome = session(pool, code)
    assert (outcome.status, outcome.value) == ("failed", None)


def test_a_handler_that_is_cancelled_is_infrastructure(pool):
    async def handler(method, params):
        raise asyncio.CancelledError

    outcome = session(pool, "async def main(call): await call('x')", handler, limits=Limits(wall_s=30))
    assert outcome.status == "infrastructure"
    assert "cancelled" in outcome.error


def test_many_sessions_at_once(pool):
    async def handler(method, params):
        await gate.wait()
        return params["i"]

    gate = asyncio.Event()

    async def one(i):
        async with pool.pool.session(
            "async def main(call, i): return await call('x', i=i)", handler, {"i": i}
        ) as opened:
            return (await opened.outcome()).value

    async def run():
        tasks = [asyncio.ensure_future(one(i)) for i in range(150)]
        while sum(pool.pool.stats()[name] for name in ("sessions",)) < 150:
            await asyncio.sleep(0.02)
        gate.set()
        return await asyncio.gather(*tasks)

    assert pool.wait(asyncio.wait_for(run(), 60)) == list(range(150))
