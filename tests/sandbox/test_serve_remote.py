"""Jails on other hosts: the least busy first, full and failing hosts, keys, and rewards from servers."""

from __future__ import annotations

import asyncio
import signal
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
from aiohttp import web

from fastgrpo_sandbox import (
    AssertTests,
    CheckTests,
    Limits,
    Outcome,
    RemotePool,
    SandboxPool,
    SandboxUnavailable,
    SpreadPool,
    StdioTests,
    UnittestTests,
    remote,
)
from fastgrpo_sandbox.rewards import code_reward, configure
from tests.sandbox.server import Server, running_server

pytestmark = pytest.mark.jail
Answer = Callable[[dict[str, Any]], Awaitable[web.Response]]


# ---- hosts that say what a test wants ----


def outcome(status: str = "ok", **parts: Any) -> web.Response:
    body = msgspec.msgpack.encode(Outcome(status, **parts))
    return web.Response(body=body, content_type="application/msgpack")


async def fine(_: dict[str, Any]) -> web.Response:
    return outcome(stdout="42\n")


class Host:
    """A server without jails: `answer` decides; `asked` has the requests."""

    def __init__(self, answer: Answer = fine) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    async def start(self, stack: AsyncExitStack) -> str:
        app = web.Application()
        app.router.add_post("/run", self._run)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return "http://{}:{}".format(*runner.addresses[0])

    async def _run(self, request: web.Request) -> web.Response:
        body = msgspec.msgpack.decode(await request.read())
        self.asked.append(body)
        return await (fine(body) if body["code"] == "print(6 * 7)" else self.answer(body))


def with_hosts(work: Callable[[RemotePool], Awaitable[Any]], *hosts: Host, **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncExitStack() as stack:
            urls = [await host.start(stack) for host in hosts]
            pool = await stack.enter_async_context(RemotePool(urls, **options))
            return await asyncio.wait_for(work(pool), 60)

    return asyncio.run(run())


def jobs_of(host: Host) -> list[str]:
    return [body["code"] for body in host.asked[1:]]


def test_the_least_busy_host_is_asked_first():
    first, second, gate = Host(), Host(), asyncio.Event()

    async def wait(_: dict[str, Any]) -> web.Response:
        await gate.wait()
        return outcome()

    first.answer = second.answer = wait

    async def work(pool: RemotePool) -> None:
        jobs = [asyncio.ensure_future(pool.run(str(i))) for i in range(10)]
        while len(jobs_of(first)) + len(jobs_of(second)) < 10:
            await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(*jobs)

    with_hosts(work, first, second)
    assert (len(jobs_of(first)), len(jobs_of(second))) == (5, 5)


def test_no_more_jobs_are_under_way_than_a_host_may_have():
    host, now, most = Host(), 0, 0

    async def count(_: dict[str, Any]) -> web.Response:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0)
        now -= 1
        return outcome()

    host.answer = count

    async def work(pool: RemotePool) -> list[Outcome]:
        return await asyncio.gather(*(pool.run(str(i)) for i in range(50)))

    assert {o.status for o in with_hosts(work, host, in_flight=3)} == {"ok"}
    assert (len(jobs_of(host)), most <= 3) == (50, True)


def test_a_full_host_is_asked_again_when_it_says():
    host, times = Host(), []

    async def full_once(_: dict[str, Any]) -> web.Response:
        times.append(time.monotonic())
        return web.Response(status=429, headers={"Retry-After": "1"}) if len(times) == 1 else outcome()

    host.answer = full_once
    assert with_hosts(lambda pool: pool.run("x"), host).status == "ok"
    assert times[1] - times[0] >= 0.99


@pytest.mark.parametrize("said", ["\u00b2", "9" * 400, "-1", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_full_host_is_left_alone_for_half_a_minute_at_most(said, monkeypatch):
    """Whatever it says: a number that is none ended a job with a ValueError, one of years the host's use."""
    monkeypatch.setattr(remote, "PAUSE_S", 0.1)
    monkeypatch.setattr(remote, "MAX_PAUSE_S", 0.1)
    asked = 0

    async def full_once(_: dict[str, Any]) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=429, headers={"Retry-After": said}) if asked == 1 else outcome()

    assert with_hosts(lambda pool: pool.run("x"), Host(full_once), deadline_s=20).status == "ok"


def test_hosts_that_stay_full_are_named():
    async def full(_: dict[str, Any]) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": "30"})

    found = with_hosts(lambda pool: pool.run("x"), Host(full), deadline_s=0.3)
    assert (found.status, found.error.endswith(": its queue is full")) == ("infrastructure", True)


def test_a_full_host_is_passed_over():
    async def full(_: dict[str, Any]) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": "30"})

    busy, free = Host(full), Host()

    async def work(pool: RemotePool) -> list[Outcome]:
        return [await pool.run(str(i)) for i in range(4)]

    assert {o.status for o in with_hosts(work, busy, free)} == {"ok"}
    assert (len(jobs_of(busy)), len(jobs_of(free))) == (1, 4)


async def _broken(_: dict[str, Any]) -> web.Response:
    return web.Response(status=500)


async def _unauthorised(_: dict[str, Any]) -> web.Response:
    return web.json_response({"error": "send the server's key"}, status=401)


async def _no_outcome(_: dict[str, Any]) -> web.Response:
    return web.Response(body=b"<html>", content_type="text/html")


async def _another(_: dict[str, Any]) -> web.Response:
    return web.Response(body=msgspec.msgpack.encode({"status": "new"}), content_type="application/msgpack")


async def _no_text(_: dict[str, Any]) -> web.Response:
    body = msgspec.msgpack.encode(Outcome("ok", stdout="said")).replace(b"said", b"\xffaid")
    return web.Response(body=body, content_type="application/msgpack")


async def _lost(_: dict[str, Any]) -> web.Response:
    return outcome("infrastructure", error="the jail failed")


async def _nested(_: dict[str, Any]) -> web.Response:
    body = b"\x82\xa6status\xa2ok\xa5value" + b"\x91" * 100_000 + b"\xc0"
    return web.Response(body=body, content_type="application/msgpack")


async def _nested_error(_: dict[str, Any]) -> web.Response:
    return web.Response(body=b"[" * 100_000, status=500)


async def _endless(_: dict[str, Any]) -> web.Response:
    return web.Response(body=b"\xc4" * (remote.MOST_ANSWER + 1), content_type="application/msgpack")


FAILING = [_broken, _unauthorised, _no_outcome, _another, _no_text, _lost, _nested, _nested_error, _endless]


@pytest.mark.parametrize("failing", FAILING)
def test_a_failing_host_is_replaced_by_another(failing):
    bad, good = Host(failing), Host()

    async def work(pool: RemotePool) -> list[Outcome]:
        return [await pool.run(str(i)) for i in range(3)]

    assert {o.status for o in with_hosts(work, bad, good)} == {"ok"}
    assert (len(jobs_of(bad)), len(jobs_of(good))) == (1, 3)


def test_a_failing_host_is_told_once_and_tried_again(monkeypatch, caplog):
    """One line when it fails, though all its jobs say so and it is asked again, and one when it answers again."""
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    asked = 0

    async def at_last(_: dict[str, Any]) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=500) if asked < 12 else outcome()

    async def work(pool: RemotePool) -> list[Outcome]:
        return list(await asyncio.gather(*(pool.run(str(i)) for i in range(8))))

    assert {o.status for o in with_hosts(work, Host(at_last))} == {"ok"}
    said = [record.message for record in caplog.records if "jail server" in record.message]
    assert [line.split(":")[0] for line in said] == ["jail server failed", "jail server answers again"]


@pytest.mark.parametrize("failing", [_broken, _lost, _no_outcome])
def test_no_host_left_is_an_infrastructure_outcome(failing, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    assert with_hosts(lambda pool: pool.run("x"), Host(failing), deadline_s=0.5).status == "infrastructure"


def test_a_host_that_never_answers_ends_by_the_deadline():
    async def silent(_: dict[str, Any]) -> web.Response:
        await asyncio.sleep(60)
        return outcome()

    found = with_hosts(lambda pool: pool.run("x"), Host(silent), deadline_s=0.3)
    assert (found.status, "within 0 s" in found.error) == ("infrastructure", True)


def test_jobs_of_a_closed_pool_hear_it():
    """Those under way, those that wait for a turn, and later ones."""

    async def silent(_: dict[str, Any]) -> web.Response:
        await asyncio.sleep(60)
        return outcome()

    async def work(pool: RemotePool) -> list[Any]:
        jobs = [asyncio.ensure_future(pool.run("x")) for _ in range(4)]
        while pool.stats()["running"] < 2:
            await asyncio.sleep(0.01)
        await pool.aclose()
        return [*await asyncio.gather(*jobs, pool.run("x"), return_exceptions=True)]

    ends = with_hosts(work, Host(silent), in_flight=2)
    assert [(type(end), str(end)) for end in ends] == [(SandboxUnavailable, remote.CLOSED)] * 5


def test_what_cannot_be_sent_is_rejected():
    async def work(pool: RemotePool) -> list[Outcome]:
        return [await pool.run("\ud800"), await pool.run("x", files={"a": "\ud800"})]

    host = Host()
    assert [o.status for o in with_hosts(work, host)] == ["rejected", "rejected"]
    assert jobs_of(host) == []


def test_what_a_server_refuses_is_rejected_with_its_sentence():
    async def refuse(_: dict[str, Any]) -> web.Response:
        return web.json_response({"error": "the request is malformed: $.limits"}, status=422)

    found = with_hosts(lambda pool: pool.run("x", limits=Limits()), Host(refuse))
    assert (found.status, found.error) == ("rejected", "the request is malformed: $.limits")


# ---- entry ----


def entered(*urls: str, **options: Any) -> RemotePool:
    async def enter() -> RemotePool:
        async with RemotePool(urls, **options) as pool:
            return pool

    return asyncio.run(enter())


def test_a_login_in_an_address_is_not_told(caplog):
    with pytest.raises(SandboxUnavailable, match=r"no jail server works: http://127\.0\.0\.1:9: ") as raised:
        entered("http://any:geheim@127.0.0.1:9")
    assert "jail server failed: url=http://127.0.0.1:9 " in caplog.text
    with pytest.raises(ValueError, match="urls must be addresses") as odd:
        RemotePool(["otto:geheim@jails:8080"])
    assert "geheim" not in f"{raised.value} {odd.value} {caplog.text}"


def test_no_server_is_one_sentence():
    with pytest.raises(SandboxUnavailable, match=r"no jail server works: http://127.0.0.1:9: .*; http://127.0.0.1:19"):
        entered("http://127.0.0.1:9/", "http://127.0.0.1:19")


def test_a_host_that_has_no_name_is_one_sentence():
    with pytest.raises(SandboxUnavailable, match=r"no jail server works: http://a\.\.b:80: "):
        entered("http://a..b:80")


@pytest.mark.parametrize("urls", ["http://127.0.0.1:8080", []])
def test_urls_are_a_list(urls):
    with pytest.raises(ValueError, match="list"):
        RemotePool(urls)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    with pytest.raises(ImportError, match=r"fastgrpo\[serve\]"):
        entered("http://127.0.0.1:9")


# ---- real servers ----


def test_a_wrong_key_is_said_on_entry():
    with running_server("--cells", "1", "--key-env", "K", K="right") as server:
        with pytest.raises(SandboxUnavailable, match="key"):
            entered(server.url, key="wrong")
        assert entered(server.url, "http://127.0.0.1:9", key="right").stats()["hosts_failed"] == 1


JOBS: list[dict[str, Any]] = [
    {"code": "print(input())", "stdin": "in"},
    {"code": "print(open('a').read())", "files": {"a": "text", "b/c": b"\xff"}},
    {"code": "def f(x): return x", "tests": AssertTests(("assert f(1) == 1", "assert f(1) == 2"))},
    {"code": "def f(x): return x", "tests": CheckTests("def check(c):\n    assert c(1) == 1", "f", select=(0,))},
    {
        "code": "def f(x): return x",
        "tests": UnittestTests("import unittest\nclass T(unittest.TestCase):\n    def test_a(self): f(1)"),
    },
    {"code": "print(int(input()) + 1)", "tests": StdioTests((("1", "2"), ("2", "2")))},
    {"code": "while True: pass", "limits": Limits(wall_s=0.5)},
    {"code": "x", "files": {"../x": "y"}},
]


def test_a_job_has_the_same_outcome_here_and_there():
    def known(outcome: Outcome) -> tuple[Any, ...]:
        return outcome.status, outcome.stdout, outcome.error, outcome.tests, outcome.verdict_by, outcome.error_by

    async def both(url: str) -> tuple[list[Any], list[Any]]:
        async with SandboxPool(cells=1) as here, RemotePool([url]) as there:
            return [known(await here.run(**job)) for job in JOBS], [known(await there.run(**job)) for job in JOBS]

    with running_server("--cells", "1") as server:
        here, there = asyncio.run(both(server.url))
    assert there == here


@pytest.mark.parametrize(("bound", "most"), [("MOST_BYTES", 100), ("MOST_CASES", 3)])
def test_cases_that_are_too_much_for_one_request_are_sent_in_several(monkeypatch, bound, most):
    """A server takes 16 MiB and 4096 cases at once, and contests have more."""
    monkeypatch.setattr(remote, bound, most)
    tests = StdioTests(cases=tuple((f"{n} 1", "x" if n == 3 else str(n + 1)) for n in range(20)))

    async def jobs(urls):
        async with RemotePool(urls) as pool:
            codes = ("print(sum(map(int, input().split())))", "raise ValueError('no')")
            return [await pool.run(code, tests=tests) for code in codes]

    with running_server("--cells", "1") as server:
        right, raising = asyncio.run(jobs([server.url]))
    assert right.tests == tuple(n != 3 for n in range(20))
    assert (right.status, right.error, right.verdict_by) == ("failed", "1 of 20 cases differ", "host")
    assert raising.tests == (False,) * 20
    assert raising.error.endswith("ValueError: no\n")


def test_cases_that_a_server_refuses_pass_nothing(monkeypatch):
    monkeypatch.setattr(remote, "MOST_BYTES", 100)
    refused = web.json_response({"error": "too long"}, status=413)

    async def answer(job):
        known = [case[0] == "0" for case in job["tests"]["cases"]]
        return refused if not any(known) else outcome(tests=tuple(known), verdict_by="host")

    tests = StdioTests(cases=(("0", "1" * 60), ("2", "3" * 60)))
    merged = with_hosts(lambda pool: pool.run("x", tests=tests), Host(answer))
    assert (merged.status, merged.error, merged.tests) == ("rejected", "too long", (True, False))


def test_a_job_that_looks_again_and_again_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(remote, "LOOK_S", 0.001)

    async def answer(_):
        await asyncio.sleep(0.3)
        return outcome()

    async def work(pool: RemotePool) -> int:
        host = pool._hosts[0]
        host._room = 1.0
        jobs = [asyncio.ensure_future(pool.run(str(i))) for i in range(3)]
        await asyncio.sleep(0.2)
        waiting = len(pool._waiting)
        await asyncio.gather(*jobs)
        return max(waiting, len(pool._waiting))

    assert with_hosts(work, Host(answer), in_flight=8) <= 2


def test_jobs_that_wait_for_their_turn_are_not_encoded_yet():
    code = "x" * (1 << 18)
    held: list[int] = []

    async def answer(_):
        held.append(tracemalloc.get_traced_memory()[0])
        return outcome()

    async def work(pool: RemotePool) -> None:
        tracemalloc.start()
        await asyncio.gather(*(pool.run(code, files={"data": code}) for _ in range(100)))
        tracemalloc.stop()

    with_hosts(work, Host(answer), in_flight=2)
    assert held[0] < 12 << 20


def test_a_host_that_is_killed_costs_no_job():
    async def work(first: Server, second: Server) -> list[Outcome]:
        async with RemotePool([first.url, second.url]) as pool:
            code = "import time; time.sleep(2); print({})"
            jobs = [asyncio.ensure_future(pool.run(code.format(i))) for i in range(8)]
            while await asyncio.to_thread(first.metric, "sandbox_running") < 2:
                await asyncio.sleep(0.02)
            first.process.send_signal(signal.SIGKILL)
            return await asyncio.gather(*jobs)

    with running_server("--cells", "1") as first, running_server("--cells", "1") as second:
        outcomes = asyncio.run(asyncio.wait_for(work(first, second), 60))
    assert [o.stdout for o in outcomes] == [f"{i}\n" for i in range(8)]


def test_runs_go_to_servers_and_sessions_stay():
    """As training has them: limits are the pool's own, and no cell is started here before the first session."""

    async def on_call(method: str, params: dict[str, Any]) -> int:
        return 2 * params["x"]

    async def work(server: Server) -> None:
        async with SpreadPool([server.url], key="key", cells=1, limits=Limits(wall_s=0.5, cpu_s=0.5)) as pool:
            assert (await pool.run("print(1)")).stdout == "1\n"
            assert (await pool.run("while True: pass")).status == "timeout"
            assert pool.stats()["cells"] == 0
            code = "async def main(call, x):\n    return await call('double', x=x)"
            async with pool.session(code, on_call, {"x": 4}) as session:
                assert (await session.outcome()).value == 8
            assert (pool.stats()["cells"], pool.stats()["hosts"], pool.stats()["running"]) == (1, 1, 0)

    with running_server("--cells", "1", "--key-env", "K", K="key") as server:
        asyncio.run(asyncio.wait_for(work(server), 60))


def test_cancelling_ends_the_job_on_the_host():
    async def work(server: Server) -> None:
        async with RemotePool([server.url]) as pool:
            job = asyncio.ensure_future(pool.run("import time; time.sleep(60)", limits=Limits(wall_s=60)))
            while await asyncio.to_thread(server.metric, "sandbox_running") < 1:
                await asyncio.sleep(0.02)
            job.cancel()
            while await asyncio.to_thread(server.metric, "sandbox_running") > 0:
                await asyncio.sleep(0.02)

    with running_server("--cells", "1") as server:
        asyncio.run(asyncio.wait_for(work(server), 30))


def test_rewards_come_from_servers(monkeypatch):
    """As a trainer's worker has them: two variables, no call."""
    answers = ["```python\ndef f(x):\n    return x\n```", "```python\ndef f(x):\n    return 3\n```"]
    with running_server("--cells", "1", "--key-env", "K", K="key") as server:
        monkeypatch.setenv("FASTGRPO_SANDBOX_URLS", f"{server.url}, http://127.0.0.1:9")
        monkeypatch.setenv("FASTGRPO_SANDBOX_KEY", "key")
        configure()
        try:
            assert code_reward(answers, asserts=[["assert f(3) == 3", "assert f(4) == 4"]] * 2) == [1.0, 0.5]
            assert server.post("/run", {"code": ""}).status == 401
        finally:
            configure()
