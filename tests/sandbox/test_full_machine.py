# ruff: noqa: E501 - programs are strings, one statement a line
"""No processes left, no room on any disk: outcomes say so or are right, and the pool lives."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from fastgrpo_sandbox import AssertTests, Limits, SandboxPool
from tests.sandbox.conftest import REPOSITORY
from tests.sandbox.test_life import AS_USER

pytestmark = pytest.mark.jail

FULL = """
import asyncio, os, resource
from fastgrpo_sandbox import SandboxPool
async def main():
    async with SandboxPool(cells=1) as pool:
        resource.prlimit(pool.cells.all[0]._process.pid, resource.RLIMIT_NPROC, (30, 30))
        server = int(open(f"/proc/{pool.cells.all[0]._process.pid}/task/{pool.cells.all[0]._process.pid}/children").read().split()[0])
        server = int(open(f"/proc/{server}/task/{server}/children").read().split()[0])
        resource.prlimit(server, resource.RLIMIT_NPROC, (6, 6))
        jobs = [asyncio.ensure_future(pool.run("import time; time.sleep(1.5)")) for _ in range(8)]
        outcomes = await asyncio.gather(*jobs)
        print(sorted({o.status for o in outcomes}), next(o.error for o in outcomes if o.status != "ok"))
        busy = sum(map(int, open(f"/proc/{server}/stat").read().rsplit(")", 1)[1].split()[11:13]))
        print(busy < 60, (await pool.run("print('after')")).stdout.strip())
asyncio.run(main())
"""


def test_exhausted_processes_are_infrastructure_and_pass():
    command = [sys.executable, "-c", AS_USER, FULL] if os.getuid() == 0 else [sys.executable, "-c", FULL]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=240, check=False)
    first, second = done.stdout.splitlines() or (done.stderr, "")
    assert first.startswith("['infrastructure', 'ok']")
    assert "Resource temporarily unavailable" in first
    assert second == "True after"


# A folder that holds the project or the interpreter stays as it is: the jails need both.
FULL_DISK = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0
assert libc.mount(b"none", b"/", b"", ctypes.c_ulong(0x44000), b"") == 0
needed = [os.path.realpath(path) + "/" for path in (os.getcwd(), sys.prefix, sys.base_prefix)]
for folder in filter(os.path.isdir, ("/tmp", "/var/tmp", "/dev/shm")):
    if any(path.startswith(folder + "/") for path in needed): continue
    assert libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(0), b"size=4k,nr_inodes=2,mode=1777") == 0
    open(folder + "/full", "w").write("x" * 4096)
from fastgrpo_sandbox import BlockingSandboxPool
with BlockingSandboxPool(cells=1) as pool:
    print(pool.run("open('x', 'w').write('y' * 10000); print(len(open('x').read()))").stdout, end="")
    os.kill(pool.pool.cells.all[0]._process.pid, 9)
    while (outcome := pool.run("print('again')", stdin="z" * 100000)).status == "infrastructure": pass
    print(outcome.stdout, end="")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a full disk")
def test_a_full_disk_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK], capture_output=True, text=True, cwd=REPOSITORY, timeout=240, check=False
    )
    assert done.stdout.splitlines() == ["10000", "again"], done.stderr


def test_neighbours_that_take_the_processor_do_not_decide_about_a_right_solution():
    """Five share one processor: 0.4 s of work end after 2 s."""
    tests, limits = AssertTests(("assert f(1) == 1",)), Limits(wall_s=1.5, cpu_s=0.6)
    work = "import threading, time\ndef g():\n    while time.process_time() < 0.4: pass\n"
    right = work + "def f(x):\n    t = threading.Thread(target=g)\n    t.start()\n    t.join()\n    return x"

    async def outcomes():
        async with SandboxPool(cells=1, limits=limits) as pool:
            loops = [pool.run("def f(x):\n    while True: pass", tests=tests) for _ in range(4)]
            sleeper = pool.run("import time\ndef f(x): time.sleep(60)", tests=tests)
            return await asyncio.gather(pool.run(right, tests=tests), sleeper, *loops)

    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(all_cores)})
    try:
        done, slept, *looped = asyncio.run(outcomes())
    finally:
        os.sched_setaffinity(0, all_cores)
    assert (done.status, done.tests) == ("ok", (True,))
    assert 0.3 < done.wall_s < 1.8  # of more than 2
    assert (slept.status, slept.error) == ("timeout", "wall clock limit reached")
    assert slept.wall_s < 3.0
    assert [each.status for each in looped] == ["timeout"] * 4
