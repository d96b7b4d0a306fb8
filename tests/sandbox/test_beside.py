"""Signals to all processes of a program do not decide about its jobs, and none of them outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.sandbox.conftest import REPOSITORY, descendants
from tests.sandbox.server import running_server

# Jobs, a session and tests that are being read, whose host still wants to know how they end.
DRAINS = """
import asyncio, signal
from fastgrpo_sandbox import AssertTests, SandboxPool

SLOW = "import time\\ndef f(x):\\n    time.sleep(1)\\n    return x"
QUICK = "def f(x):\\n    return x"
SESSION = "async def main(call):\\n    return await call('three')"
TESTS = AssertTests(("assert f(1) == 1", "assert f(2) == 3"))
LONG = AssertTests(tuple(f"assert f({[number] * 60}) == {[number] * 60}" for number in range(1000)))

async def main():
    asked = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)

    async def three(method, params):
        await asked.wait()
        return 3

    async def ask(pool):
        async with pool.session(SESSION, three) as opened:
            return (await opened.outcome()).value

    async with SandboxPool(cells=1) as pool:
        slow, session = asyncio.ensure_future(pool.run(SLOW, tests=TESTS)), asyncio.ensure_future(ask(pool))
        while pool.stats()["running"] < 2 and not slow.done():
            await asyncio.sleep(0.01)
        # Their reading begins while the others run: all three are under way at once on a busy machine, too.
        long = asyncio.ensure_future(pool.run(QUICK, tests=LONG))
        while not pool.readers._busy and not long.done():
            await asyncio.sleep(0.01)
        print("ready", flush=True)
        await asked.wait()
        judged, read, value = await asyncio.gather(slow, long, session)
        late = await pool.run("import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))")
        print(judged.tests, read.status, value, late.stdout, pool.stats()["cells_lost"])

asyncio.run(main())
"""
READS = """
import asyncio, signal, time
from fastgrpo_sandbox.reading import Readers

async def main():
    readers = Readers()
    await readers.ask(str.upper, "it has started")
    work = asyncio.ensure_future(readers.ask(sum, range(10 ** 12)))
    await asyncio.sleep(0.2)
    print("ready", flush=True)
    await work

asyncio.run(main())
"""


@contextmanager
def host(program: str) -> Iterator[subprocess.Popen[str]]:
    """A program that said that it is ready, in a process group of its own."""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'sandbox'}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.jail
# Terminals and torchrun ask the group, Slurm each process, where Python in a job, too, takes SIGINT for Ctrl-C.
@pytest.mark.parametrize(
    ("to", "sent"),
    [
        ("their groups", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
        ("each of its processes", (signal.SIGTERM, signal.SIGHUP)),
    ],
)
def test_what_runs_ends_as_it_would_where_all_processes_are_asked_to_end(to, sent):
    with host(DRAINS) as process:
        below = descendants(process.pid)
        for number in sent:
            for pid in (process.pid, *below):
                with suppress(ProcessLookupError):
                    if to == "each of its processes":
                        os.kill(pid, number)
                    elif os.getpgid(pid) == pid and os.getsid(pid) == process.pid:  # a jail's session is its own
                        os.killpg(pid, number)
        said, _ = process.communicate(timeout=60)
    assert said == "(True, False) ok 3 set()\n 0.0\n"


@pytest.mark.jail
def test_a_server_drains_where_its_whole_group_is_asked_to_end():
    job = {"code": "import time; time.sleep(3); print('done')"}
    with running_server("--cells", "1") as server, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.post, "/run", job)
        while not server.metric("sandbox_running"):
            time.sleep(0.01)
        os.killpg(server.process.pid, signal.SIGTERM)
        assert answer.result(60).body["stdout"] == "done\n"
        assert server.process.wait(60) == 0


def test_a_reader_does_not_outlive_its_host():
    with host(READS) as process:
        (reader,) = descendants(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while _runs(reader) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _runs(reader)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
