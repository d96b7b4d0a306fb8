"""The server's life: keys, sizes, back-pressure, clients that leave, a graceful stop, and what it refuses to start."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
from prometheus_client import parser

from fastgrpo_sandbox import Limits, Outcome, StdioTests
from fastgrpo_sandbox.remote import RunRequest
from fastgrpo_sandbox.serving import ai2, connections, e2b
from fastgrpo_sandbox.serving.jails import Busy, Jails, Refused
from fastgrpo_sandbox.serving.main import CAPS, main
from fastgrpo_sandbox.turns import LANE
from tests.sandbox.conftest import REPOSITORY
from tests.sandbox.server import Server, basic, running_server

pytestmark = pytest.mark.jail
SLEEP = {"code": "import time; time.sleep(60)"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--cells", "1", "--wall-s", "2", "--key-env", "TEST_KEY", TEST_KEY="s3cret") as server:
        yield server


@pytest.fixture
def small() -> Iterator[Server]:
    """Eight places, none to wait in."""
    with running_server("--cells", "1", "--queue", "0") as server:
        yield server


KEY = {"Authorization": "Bearer s3cret"}


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends, "waited for 30 s"
        time.sleep(0.02)


def posted(server: Server, body: object, path: str = "/run") -> http.client.HTTPConnection:
    """A request whose answer nobody has read yet."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


# ---- who may ask, and for what ----


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer \u00e9"}, 401),
        ({"Authorization": "Basic !"}, 401),
        (basic("wrong"), 401),
        (KEY, 200),
        (basic("s3cret"), 200),
    ],
)
def test_a_key_is_asked_for(server, headers, status):
    assert server.post("/run", {"code": "print(1)"}, headers).status == status
    assert server.ask("/metrics", headers=headers).status == status
    assert server.ask("/healthz").body == {"status": "healthy"}


def test_the_pools_own_form_in_both_encodings(server):
    answer = server.post("/run", {"code": "print(input())", "stdin": "hello"}, KEY)
    assert answer.body["stdout"] == "hello\n"
    tests = {"type": "assert", "asserts": ["assert f(1) == 2", "assert f(1) == 3"]}
    body = msgspec.msgpack.encode({"code": "def f(x): return x + 1", "tests": tests})
    answer = server.ask("/run", body, {**KEY, "Content-Type": "application/msgpack"})
    assert (answer.body["status"], answer.body["tests"]) == ("failed", [True, False])


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/run", b"{", 422, "malformed"),
        ("/run", b"\xff", 422, "malformed"),
        ("/run", {"code": 3}, 422, "$.code"),
        ("/run", {"code": "", "unknown": 1}, 422, "unknown"),
        ("/run", {"code": "", "limits": {"wall_s": "1"}}, 422, "$.limits.wall_s"),
        ("/run", {"code": "", "tests": {"type": "no"}}, 422, "$.tests"),
        ("/run", b"x" * (17 << 20), 413, "Too Large"),
        ("/run_code", {"code": "", "language": "cobol"}, 422, "runs python"),
        ("/run_code", {"code": "", "language": "python", "run_timeout": 0}, 422, "more than 0"),
        ("/run_code", {"code": "", "language": "python", "fetch_files": ["x"]}, 422, "fetch_files"),
        ("/nothing", {}, 404, "/nothing is not offered; there are /execute_batch, "),
        ("/healthz", {}, 405, "Not Allowed"),
    ],
)
def test_a_bad_request_gets_one_sentence(server, path, body, status, said):
    answer = server.post(path, body, KEY)
    assert answer.status == status
    assert said in answer.body["error"]
    assert "\n" not in answer.body["error"]
    assert server.post("/run", {"code": "print(1)"}, KEY).body["stdout"] == "1\n"


def test_a_form_that_a_web_page_could_send_is_turned_away(server):
    answer = server.ask("/run", b"{}", {**KEY, "Content-Type": "text/plain"})
    assert (answer.status, "Content-Type" in answer.body["error"]) == (415, True)


def test_no_limit_is_above_the_servers(server):
    code = "import resource, time\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)\ntime.sleep(60)"
    limits = {"wall_s": 1000, "cpu_s": 1000, "memory_mb": 500_000, "files": 4096, "output_bytes": 4 << 20}
    answer = server.post("/run", {"code": code, "limits": limits}, KEY)
    assert (answer.body["status"], answer.body["stdout"]) == ("timeout", "256\n")
    assert answer.body["wall_s"] < 5


def test_metrics_are_prometheus(server):
    server.post("/run", {"code": "1 / 0"}, KEY)
    families = {
        family.name: family
        for family in parser.text_string_to_metric_families(server.ask("/metrics", headers=KEY).body)
    }
    jobs = {sample.labels["status"]: sample.value for sample in families["sandbox_jobs"].samples}
    assert jobs["failed"] >= 1
    assert set(jobs) >= {"ok", "timeout", "infrastructure"}
    paths = {sample.labels["path"] for sample in families["sandbox_requests"].samples}
    assert "/run" in paths
    assert families["sandbox_places"].samples[0].value == 8 + 1024


# ---- load, clients that leave, the end ----


def test_a_full_queue_is_429_with_a_time_to_come_back(small):
    waiting = [posted(small, SLEEP) for _ in range(8)]
    until(lambda: small.metric("sandbox_running") == 8)
    answer = small.post("/run", {"code": "print(1)"})
    assert (answer.status, int(answer.headers["Retry-After"]) >= 1) == (429, True)
    assert "full" in answer.body["error"]
    for connection in waiting:
        connection.close()
    until(lambda: small.metric("sandbox_running") == 0)
    assert small.post("/run", {"code": "print(1)"}).body["stdout"] == "1\n"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/run", SLEEP),
        ("/run_code", {**SLEEP, "language": "python", "run_timeout": 60}),
        ("/execute_batch", {"scripts": [SLEEP["code"]] * 3, "timeout": 60}),
        (
            "/test_program_stdio",
            {"program": SLEEP["code"], "tests": [{"input": "", "output": ""}] * 3, "max_execution_time": 60},
        ),
    ],
)
def test_a_client_that_leaves_ends_its_jobs(small, path, body):
    connection = posted(small, body, path)
    until(lambda: small.metric("sandbox_running") >= 1)
    connection.close()
    until(lambda: small.metric("sandbox_running") == 0)


def test_sigterm_lets_what_runs_end_and_takes_nothing_new(small):
    connection = posted(small, {"code": "import time; time.sleep(2); print('done')"})
    until(lambda: small.metric("sandbox_running") == 1)
    stopped: list[int] = []
    thread = threading.Thread(target=lambda: stopped.append(small.stop()))
    thread.start()
    until(lambda: small.ask("/healthz").status == 503)
    assert small.post("/run", {"code": "print(1)"}).status == 503
    assert json.loads(connection.getresponse().read())["stdout"] == "done\n"
    thread.join()
    assert stopped == [0]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(small.url).port), timeout=5)


# ---- what it refuses to start ----


def refused(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_other_machines_need_a_key(capsys, host):
    assert "--key-env" in refused(capsys, "--host", host)


def test_a_module_that_is_not_installed_is_named(capsys):
    assert "--preload names no_such_module.part" in refused(capsys, "--preload", "no_such_module.part")


def test_a_key_that_is_not_set_is_said(capsys, monkeypatch):
    monkeypatch.setenv("EMPTY_KEY", "")
    assert "EMPTY_KEY" in refused(capsys, "--key-env", "EMPTY_KEY")
    assert "NO_SUCH_KEY" in refused(capsys, "--key-env", "NO_SUCH_KEY")


@pytest.mark.parametrize(
    "option", ["--wall-s=0", "--wall-s=nan", "--memory-mb=0", "--queue=-1", "--cells=0", "--port=99999"]
)
def test_an_option_out_of_range_is_said_alone(capsys, option):
    name, _, value = option.partition("=")
    said = refused(capsys, option)
    assert said.startswith(f"error: {name} must be ")
    assert said.count("--") == 1
    assert said.endswith(f"got {float(value) if name == '--wall-s' else value}\n")


def test_a_busy_port_is_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refused(capsys, "--cells", "1", "--port", port)


def test_an_address_of_another_machine_is_said(capsys, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "k")
    assert "203.0.113.1" in refused(capsys, "--cells", "1", "--host", "203.0.113.1", "--key-env", "SOME_KEY")


def test_a_missing_library_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fastgrpo_sandbox.serving.app", raising=False)
    assert "fastgrpo[serve]" in refused(capsys)


# ---- admission without a server ----


class Pool:
    """A pool whose jobs end when they are told to."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.go = asyncio.Event()
        self.limits: list[Limits] = []

    def stats(self) -> dict[str, float]:
        return {"run_s_p50": 2.0, "cells": 1.0}

    async def read(self, tests: object) -> None:
        pass

    async def run(self, code: str, *, limits: Limits, **_: object) -> Outcome:
        self.limits.append(limits)
        await self.go.wait()
        return self.outcome


def test_places_are_counted_in_jails_and_given_back():
    async def work():
        pool = Pool(Outcome("ok"))
        jails = Jails(pool, 2, 0, Limits())
        cases = asyncio.ensure_future(jails.run(RunRequest("", tests=StdioTests((("", ""),) * 5))))
        await asyncio.sleep(0)
        with pytest.raises(Busy) as busy:
            jails.admit()
        taken = jails.taken
        cases.cancel()
        await asyncio.gather(cases, return_exceptions=True)
        return taken, busy.value.retry_after_s, jails.taken

    assert asyncio.run(work()) == (5, 2, 0)


def test_a_client_with_all_places_leaves_others_turns_and_places():
    """One request of 4,096 cases had all places, and sixteen such all turns, until one of them had ended."""

    async def ask(jails, client, cases):
        LANE.set(client)
        return await jails.run(RunRequest(client, tests=StdioTests((("", ""),) * cases)))

    async def work():
        pool = Pool(Outcome("ok"))
        jails = Jails(pool, 2, 0, Limits())
        large = [asyncio.ensure_future(ask(jails, "large", 100)) for _ in range(3)]
        small = [asyncio.ensure_future(ask(jails, "small", 1)) for _ in range(3)]
        await asyncio.sleep(0.01)
        begun = len(pool.limits)
        pool.go.set()
        ended = await asyncio.gather(*large, *small, return_exceptions=True)
        return begun, [type(each) for each in ended], jails.taken, jails._taken_by

    begun, ended, taken, by = asyncio.run(work())
    assert begun == 3  # one of the large, whose places are all, and two of the small
    assert ended == [Outcome, Busy, Busy, Outcome, Outcome, Busy]
    assert (taken, by) == (0, {})


def test_requests_of_many_cases_hold_up_no_other_client():
    slow = {"code": "import time; time.sleep(0.1)", "tests": {"type": "stdio", "cases": [["", ""]] * 400}}
    with running_server("--cells", "1", "--queue", "10000") as server, contextlib.ExitStack() as opened:
        for _ in range(8):
            address = ("127.0.0.2", 0)
            other = http.client.HTTPConnection("127.0.0.1", urlsplit(server.url).port, source_address=address)
            opened.callback(other.close)
            other.request("POST", "/run", json.dumps(slow), {"Content-Type": "application/json"})
        while server.metric("sandbox_queued") < 50:
            time.sleep(0.01)
        began = time.monotonic()
        answer = server.post("/run", {"code": "print(1)"})
        took = time.monotonic() - began
        assert server.metric("sandbox_queued") > 50
    assert answer.body["stdout"] == "1\n"
    assert took < 2  # it has the next turn: 3,200 cases take 40 s


def test_the_reason_of_a_lost_job_stays_here():
    async def work():
        pool = Pool(Outcome("infrastructure", error="mount /root/secret on /tmp/3"))
        pool.go.set()
        return await Jails(pool, 2, 0, Limits()).run(RunRequest(""))

    outcome = asyncio.run(work())
    assert (outcome.status, "/root" in outcome.error) == ("infrastructure", False)


def test_bodies_that_never_come_to_their_end_do_not_fill_the_server(server):
    """Twenty of 16 MiB would be more than all may be; what is announced and has not come is nothing."""
    address = urlsplit(server.url)
    head = f"POST /run HTTP/1.1\r\nHost: jails\r\nAuthorization: {KEY['Authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {16 << 20}\r\n\r\n"
    opened = [socket.create_connection((address.hostname, address.port), timeout=10) for _ in range(20)]
    for each in opened:
        each.sendall(head.encode())
    assert server.post("/run", {"code": "print(1)"}, KEY).status == 200
    for each in opened:
        with contextlib.suppress(OSError):  # some are turned away
            each.sendall(b"x" * (15 << 20))
    assert peak_mb(server) < 550
    for each in opened:
        each.close()
    until(lambda: server.post("/run", {"code": "print(1)"}, KEY).status == 200)


def test_bodies_that_grow_when_they_are_decoded_are_refused(server):
    """Each of 12 MB is 300 MB of empty lists, and these are in no process of the server's but a reader."""
    data = b'{"test": "assert f() == 1", "junk": [' + b"[]," * 4_000_000 + b"1]}"
    body = b'{"dataset": "", "id": 1, "completion": "def f(): return 1", "config": {"provided_data": ' + data + b"}}"
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda _: server.post("/submit", body, KEY), range(6)))
    assert {answer.status for answer in answers} <= {422, 429}
    assert any(answer.status == 422 for answer in answers)
    assert peak_mb(server) < 400


def peak_mb(server: Server) -> float:
    """The most resident memory that the server's process has had."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


class Printing(Jails):
    """Jails whose jobs print as much as they may."""

    def __init__(self) -> None:
        super().__init__(None, at_once=8, queue=992, caps=CAPS)  # type: ignore[arg-type]
        self.printed = 0

    async def read(self, function, *given):
        return function(*given)

    async def _run(self, job: RunRequest) -> Outcome:
        self.printed += job.limits.output_bytes
        return Outcome("ok")


@pytest.mark.parametrize(("count", "each"), [(1, 4 << 20), (32, 4 << 20), (128, 1 << 20), (4096, 1 << 16)])
def test_what_a_batch_may_print_is_bounded_for_all_its_scripts(count, each):
    jails = Printing()
    answers = asyncio.run(e2b.execute_batch(jails, e2b.Batch(["1"] * count)))
    assert len(answers) == count
    assert jails.printed == count * each


def test_what_tests_print_that_nobody_is_told_is_not_kept():
    jails = Printing()
    answer = asyncio.run(ai2.test_program(jails, ai2.TestProgram("x = 1", ["x"] * 500)))
    assert answer.results == [1] * 500
    assert jails.printed <= 500 << 16


@contextlib.contextmanager
def unread(server: Server, count: int, body: object) -> Iterator[list[socket.socket]]:
    """So many requests whose answers nobody reads."""
    data = json.dumps(body).encode()
    head = f"POST /run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with contextlib.ExitStack() as opened:
        kept = []
        for _ in range(count):
            each = opened.enter_context(socket.socket())
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.connect((urlsplit(server.url).hostname, urlsplit(server.url).port))
            each.sendall(head.encode() + data)
            kept.append(each)
        yield kept


def test_answers_that_nobody_reads_do_not_fill_the_server_and_hold_nobody_up():
    """24 answers of 24 MB, as their JSON is: no more jobs begin than fill a bound, until the first are cut off."""
    body = {"code": "print(chr(1) * 4000000)", "limits": {"output_bytes": 4 << 20}}
    program = """
import sys
from fastgrpo_sandbox.serving import app, jails, main
app.SEND_S, app.SLOWEST, jails.MOST_UNREAD = 1.0, 1 << 26, 64 << 20
main.main(sys.argv[1:])
"""
    with running_server("--cells", "1", program=("-c", program)) as server, unread(server, 24, body) as kept:
        until(lambda: server.metric("sandbox_running") > 0)
        assert server.post("/run", {"code": "print(1)"}).body["stdout"] == "1\n"
        assert peak_mb(server) < 550
        until(lambda: kept[0].recv(1 << 20) == b"")  # cut off: it ends before what was announced


def test_requests_whose_tests_take_long_to_read_hold_up_no_other():
    """32 of them, of which each takes a second or more; those that come after run meanwhile."""
    rows = [[f"assert f({[number + 1000 * each] * 40}) == 1" for number in range(300)] for each in range(32)]
    with running_server("--cells", "1") as server, contextlib.ExitStack() as opened:
        for row in rows:
            opened.callback(posted(server, {"code": "x = 1", "tests": {"type": "assert", "asserts": row}}).close)
        began = time.monotonic()
        for number in range(3):
            tests = {"type": "assert", "asserts": [f"assert f({number}) == {number}"]}
            assert server.post("/run", {"code": "def f(x): return x", "tests": tests}).body["status"] == "ok"
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("path", "begin", "value"),
    [
        ("/run", {"code": "x", "tests": {"type": "assert", "asserts": 1}}, b"\xa0"),
        ("/run", {"code": "x", "tests": {"type": "stdio", "cases": 1}}, b"\x92\xa0\xa0"),
        ("/submit", {"dataset": "", "id": 1, "completion": "", "config": {"provided_data": {"test": 1}}}, b"\x90"),
    ],
)
def test_a_body_of_a_million_empty_values_holds_nobody_up(path, begin, value):
    count = 3 << 20
    body = msgspec.msgpack.encode(begin)[:-1] + b"\xdd" + count.to_bytes(4, "big") + value * count
    with running_server("--cells", "1") as server, ThreadPoolExecutor(1) as beside:
        refused = beside.submit(server.ask, path, body, {"Content-Type": "application/msgpack"})
        worst = 0.0
        while not refused.done():
            began = time.monotonic()
            assert server.ask("/healthz").status == 200
            worst = max(worst, time.monotonic() - began)
        assert refused.result().status == 422
        assert "more than 1048576 values" in refused.result().body["error"]
        assert peak_mb(server) < 250
    assert worst < 2


FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (140, 140))
from fastgrpo_sandbox.serving import connections, main
connections.ASK_S = float(sys.argv.pop(1))
main.main(sys.argv[1:])
"""


def silent(server: Server, count: int) -> Iterator[socket.socket]:
    for _ in range(count):
        yield socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=30)


def test_connections_take_no_descriptor_that_the_jails_need():
    """Whoever opens them need have no key; and a cell that is lost meanwhile is started anew."""
    asked = {"code": "def f(x): return x", "tests": {"type": "assert", "asserts": ["assert f(1) == 1"]}}
    with running_server("--cells", "1", program=("-c", FEW, "60")) as server, contextlib.ExitStack() as opened:
        kept = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        kept.request("GET", "/healthz")
        kept.getresponse().read()
        many = [opened.enter_context(each) for each in silent(server, 160)]
        assert many[-1].recv(1) == b""  # closed at once
        for cell in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split():
            os.kill(int(cell), signal.SIGKILL)
        kept.request("POST", "/run", json.dumps(asked), {"Content-Type": "application/json"})
        assert json.loads(kept.getresponse().read())["status"] in ("ok", "infrastructure")
        kept.request("POST", "/run", json.dumps(asked), {"Content-Type": "application/json"})
        assert json.loads(kept.getresponse().read())["status"] == "ok"


@pytest.mark.parametrize(("opened", "closed"), [(20, False), (270, True)])
def test_cells_of_a_large_machine_have_the_descriptors_to_start_anew(monkeypatch, opened, closed):
    """128 have 256 of 1,024, and while they are replaced twice as many."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(os, "listdir", lambda _: ["3"] * opened)

    class Listening:
        connections = range(500)

        def __call__(self) -> asyncio.Protocol:
            return asyncio.Protocol()

    async def work() -> asyncio.Protocol:
        return connections.Connections(Listening())()

    assert isinstance(asyncio.run(work()), connections._Closed) == closed


def test_a_connection_that_asks_nothing_is_closed():
    with running_server("--cells", "1", program=("-c", FEW, "1")) as server, contextlib.ExitStack() as opened:
        (one,) = (opened.enter_context(each) for each in silent(server, 1))
        one.sendall(b"POST /run HTTP/1.1\r\nHost: ")
        assert one.recv(1) == b""
        assert server.ask("/healthz").status == 200


def test_a_request_of_a_million_cases_is_refused(server):
    cases = [["", "1"]] * 100_000
    answer = server.post("/run", {"code": "", "tests": {"type": "stdio", "cases": cases}}, KEY)
    assert answer.status == 422
    assert "tests with 100000 cases are too many for one request: send 4096 in each" in answer.body["error"]
    answer = server.post("/test_program", {"program": "", "tests": ["assert f"] * 100_000}, KEY)
    assert (answer.status, answer.body["error"]) == (422, "tests must be a list of at most 4096")


def test_caps_hold_for_every_limit():
    caps = Limits(wall_s=3, cpu_s=2, memory_mb=100, processes=5, output_bytes=10, tmp_mb=2, files=20)
    jails = Jails(Pool(Outcome("ok")), 1, 0, caps)
    huge = Limits(wall_s=100, cpu_s=100, memory_mb=9999, processes=99, output_bytes=9999, tmp_mb=99, files=99)
    assert jails.capped(huge) == caps
    assert jails.capped(Limits(wall_s=1)).wall_s == 1
    assert jails.limits(9, 9999) == msgspec.structs.replace(caps, cpu_s=3)
    with pytest.raises(Refused):
        jails.limits(float("nan"))


def test_the_example_runs():
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'sandbox'}"}
    command = [sys.executable, str(REPOSITORY / "examples" / "serve_jails.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.stdout == "failed (True, True, False) 67%\nSuccess 42\n", done.stderr
