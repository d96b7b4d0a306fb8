# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Memory held by real cgroups, on machines that let this process make some."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgrpo_sandbox import BlockingSandboxPool, CheckTests, Limits, SandboxPool, cgroup
from tests.sandbox.conftest import PRELUDE, REPOSITORY
from tests.sandbox.test_attacks_hiding import watching
from tests.sandbox.test_life import AS_USER, HOST

BASE = cgroup.find_base()
pytestmark = [pytest.mark.jail, pytest.mark.skipif(BASE.folder is None, reason=f"no cgroup: {BASE.reason}")]
PATIENT = Limits(memory_mb=64, wall_s=120, cpu_s=60)
FORKS = """
import os, time
for _ in range(12):
    if os.fork() == 0:
        x = bytearray(20 << 20); time.sleep(60); os._exit(0)
time.sleep(60)
"""
TMPFS = "with open('big', 'wb') as file:\n    while True: file.write(bytes(1 << 20))"
OUTPUT = "import os\nfor _ in range(64): os.write(1, bytes(1 << 16)), os.write(2, bytes(1 << 16))"


def groups(host: int = os.getpid()) -> list[str]:
    """Those of one host: others may run tests beside this one."""
    return sorted(str(path) for path in BASE.folder.glob(f"fastgrpo-{host}-*"))


@pytest.fixture(scope="module")
def grouped():
    with BlockingSandboxPool(cells=1, limits=PATIENT) as pool:
        yield pool


def test_every_form_of_job_says_that_a_cgroup_held_it(grouped):
    tests = CheckTests("def check(f): assert f(3) == 3", "f")
    outcomes = [grouped.run("print(1)"), grouped.run("def f(x): return x", tests=tests)]
    assert {(outcome.status, outcome.memory_by) for outcome in outcomes} == {("ok", "cgroup")}


def test_a_session_is_held_too(grouped):
    async def one():
        async with grouped.pool.session("async def main(call): return 1", None) as opened:
            return await opened.outcome()

    outcome = grouped.wait(one())
    assert (outcome.status, outcome.value, outcome.memory_by) == ("ok", 1, "cgroup")


def test_ten_gigabytes_in_one_list(grouped):
    outcome = grouped.run("x = [0] * (10 * 2**30 // 8)")
    assert (outcome.status, outcome.memory_by) == ("memory", "cgroup")


@pytest.mark.parametrize(
    ("code", "limits"),
    [
        (FORKS, PATIENT),
        (TMPFS, Limits(memory_mb=32, tmp_mb=256, wall_s=120, cpu_s=60)),
        (OUTPUT, Limits(memory_mb=2, output_bytes=4 << 20, wall_s=120, cpu_s=60)),
    ],
    ids=["forks", "tmpfs", "memfd"],
)
def test_all_that_a_job_holds_is_counted_together_and_neighbours_go_on(grouped, code, limits):
    hostile, neighbour = grouped.run_all(
        [{"code": code, "limits": limits}, {"code": "x = bytearray(30 << 20); print(len(x))"}]
    )
    assert (hostile.status, hostile.error) == ("memory", "memory limit reached")
    assert (neighbour.status, neighbour.memory_by) == ("ok", "cgroup")
    assert grouped.run("print('after')").stdout == "after\n"


def test_what_epolls_watch_is_bounded_here_too(grouped):
    """All jobs' watches are together bounded for their one user, and a group may hold millions of them."""
    limits = Limits(memory_mb=512, wall_s=30, files=256)
    assert grouped.run(watching(60, 30, 256, 9), limits=limits).status == "memory"
    assert grouped.run(watching(20, 20, 64, 0.3), limits=limits).status == "ok"


def test_a_judged_solution_that_runs_out_is_a_memory_outcome(grouped):
    tests = CheckTests("def check(f): assert f(3) == 3", "f")
    outcome = grouped.run(
        "def f(x):\n    with open('big', 'wb') as file:\n        while True: file.write(bytes(1 << 20))",
        tests=tests,
        limits=Limits(memory_mb=32, tmp_mb=256, wall_s=120),
    )
    assert (outcome.status, outcome.tests) == ("memory", (False,))


def test_the_peak_is_that_of_all_processes_and_of_no_earlier_job(grouped):
    code = "import os\nfor _ in range(2):\n    if os.fork() == 0: x = bytearray(20 << 20); import time; time.sleep(0.5); os._exit(0)\nos.wait(); os.wait()"
    small, big = grouped.run("print(1)"), grouped.run(code)
    assert big.memory_mb > small.memory_mb + 40
    assert max(grouped.run("print(1)").memory_mb for _ in range(6)) < small.memory_mb + 5


def test_groups_are_used_again(grouped):
    cell = Path(groups()[0])
    for _ in range(10):
        grouped.run("print(1)")
    before = sum(path.is_dir() for path in cell.iterdir())
    grouped.run_all([{"code": "print(1)"}] * 30)
    assert sum(path.is_dir() for path in cell.iterdir()) <= before + 8


def test_a_job_neither_sees_nor_reaches_its_cgroup(grouped):
    code = (
        PRELUDE
        + """
print(raised(os.listdir, "/tmp/cgroup"), raised(os.listdir, "/sys/fs/cgroup"), raised(os.listdir, "/proc/self"))
print(sorted(os.listdir("/")), os.listdir("/tmp"))
flags = 0x200000000
print(sysno(435, (ctypes.c_uint64 * 11)(flags, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), ctypes.c_size_t(88)))
print(sysno(165, b"none", b"/tmp", b"cgroup2", ctypes.c_ulong(0), None))
found = []
for fd in range(256):
    for path in ("memory.max", "../memory.max", "1/memory.max", "cgroup.procs"):
        try: os.close(os.open(path, os.O_RDONLY, dir_fd=fd)); found.append((fd, path))
        except OSError: pass
print(found)
"""
    )
    outcome = grouped.run(code, limits=Limits(wall_s=60))
    seen, root, clone, mount, found = outcome.stdout.splitlines()
    assert seen == "ENOENT ENOENT ENOENT"
    assert "cgroup" not in root
    assert (clone, mount, found) == ("ENOSYS", "EPERM", "[]")


def test_the_cell_is_below_the_base_and_this_process_stays_where_it_was():
    place, before = Path("/proc/self/cgroup").read_text(), set(groups())

    async def work():
        async with SandboxPool(cells=2) as pool:
            await pool.run("print(1)")
            made = [Path(path) for path in set(groups()) - before]
            held = " ".join((path / "server/cgroup.procs").read_text() for path in made)
            return held.split(), [str(cell._process.pid) for cell in pool.cells.all]

    held, launched = asyncio.run(work())
    assert set(held) > set(launched)
    assert Path("/proc/self/cgroup").read_text() == place
    assert set(groups()) == before


def test_a_closed_pool_and_a_lost_cell_leave_no_group():
    before = groups()

    async def work():
        async with SandboxPool(cells=1, limits=PATIENT) as pool:
            jobs = [asyncio.ensure_future(pool.run("import time; time.sleep(60)")) for _ in range(4)]
            await asyncio.sleep(1)
            os.kill(pool.cells.all[0]._process.pid, signal.SIGKILL)
            await asyncio.gather(*jobs)
            assert (await pool.run("print('back')")).memory_by == "cgroup"
            assert len(groups()) <= len(before) + 2

    asyncio.run(work())
    assert groups() == before


def test_a_killed_hosts_groups_go_with_the_next_pool():
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert host.stdout.readline() == "ready\n"
    assert len(groups(host.pid)) == 2
    host.kill()
    host.wait()
    host.stdout.close()
    deadline = time.monotonic() + 30
    while groups(host.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
        cgroup.open_base()
    assert not groups(host.pid)


PROGRAM = """
from fastgrpo_sandbox import BlockingSandboxPool
with BlockingSandboxPool(cells=1) as pool: print(pool.run("import os; print(os.getuid())").memory_by)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can delegate")
@pytest.mark.parametrize("given", [True, False])
def test_an_ordinary_user_with_and_without_delegation(given):
    unit = BASE.folder / "test-delegated"
    own = unit / "own"
    own.mkdir(parents=True)
    (unit / "cgroup.subtree_control").write_text("+memory +pids")
    for path in (unit, unit / "cgroup.procs", unit / "cgroup.subtree_control") if given else ():
        os.chown(path, 4242, 4242)
    enter = f"open('{own}/cgroup.procs', 'w').write('0')\n"
    done = subprocess.run(
        [sys.executable, "-c", enter + AS_USER, PROGRAM],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=240,
        check=False,
    )
    left = list(unit.glob("fastgrpo-*"))
    own.rmdir()
    unit.rmdir()
    assert done.stdout.splitlines() == ["cgroup" if given else "rlimit + resident polling"], done.stderr
    assert left == []
