# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Long life: killed cells and servers, cancellation, fairness, recycling, and the host's own death."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import uvloop

from fastgrpo_sandbox import Limits, SandboxPool, SandboxUnavailable, StdioTests, cell, cells
from fastgrpo_sandbox import pool as pool_module
from tests.sandbox.conftest import REPOSITORY, descendants

pytestmark = pytest.mark.jail
SLEEP = "import time; time.sleep(30)"


def in_pool(work, **options):
    async def run():
        async with SandboxPool(**{"cells": 1, **options}) as pool:
            return await asyncio.wait_for(work(pool), 60)

    return asyncio.run(run())


def server_of(pool: SandboxPool) -> int:
    return server_of_cell(pool.cells.all[0])


def server_of_cell(one: cell.Cell) -> int:
    """bubblewrap, its pid 1, then the fork server."""
    return _only_child(_only_child(one._process.pid))


def _only_child(pid: int) -> int:
    (child,) = _children(pid)
    return child


def _children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "bwrap"


async def _running(pool: SandboxPool, count: int) -> None:
    while pool.stats()["running"] < count:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("victim", ["cell", "server"])
def test_23_a_killed_cell_or_server_is_an_infrastructure_outcome_and_a_restart(victim, caplog):
    async def work(pool):
        job = asyncio.ensure_future(pool.run(SLEEP))
        await _running(pool, 1)
        os.kill(pool.cells.all[0]._process.pid if victim == "cell" else server_of(pool), signal.SIGKILL)
        lost, after = await job, await pool.run("print('back')")
        return lost, after, pool.stats()

    with caplog.at_level(logging.WARNING, "fastgrpo_sandbox"):
        lost, after, stats = in_pool(work)
    assert lost.status == "infrastructure"
    assert after.stdout == "back\n"
    assert (stats["infrastructure"], stats["cells_lost"], stats["cells"]) == (1, 1, 1)
    assert [record for record in caplog.records if "cell lost: cell=1" in record.message]


def test_a_server_that_stops_answering_is_given_up(monkeypatch):
    monkeypatch.setattr(cell, "ANSWER_GRACE_S", 0.5)
    monkeypatch.setattr(cells, "WATCH_S", 0.5)

    async def work(pool):
        server = server_of(pool)
        long = asyncio.ensure_future(pool.run(SLEEP, limits=Limits(wall_s=1)))
        await _running(pool, 1)
        os.kill(server, signal.SIGSTOP)
        return await long, await pool.run("print('back')")

    lost, after = in_pool(work)
    assert (lost.status, lost.error) == ("infrastructure", "the fork server does not answer")
    assert after.stdout == "back\n"


def test_a_killed_job_is_killed_not_infrastructure():
    async def work(pool):
        job = asyncio.ensure_future(pool.run(SLEEP))
        await _running(pool, 1)
        (process,) = descendants(server_of(pool))
        os.kill(process, signal.SIGKILL)
        return await job, await pool.run("print('back')"), pool.stats()["cells_lost"]

    # Without armed children the job's process is the fork server's only one.
    outcome, after, lost = in_pool(work, armed=0)
    assert (outcome.status, after.stdout, lost) == ("killed", "back\n", 0)


def test_a_killed_armed_child_costs_its_cell_and_no_later_job():
    async def work(pool):
        for child in descendants(server_of(pool)):
            os.kill(child, signal.SIGKILL)
        while not pool.stats()["cells_lost"]:
            await asyncio.sleep(0.01)
        return await pool.run("print('back')")

    assert in_pool(work).stdout == "back\n"


def test_cancelling_kills_the_job_at_once():
    async def work(pool):
        job = asyncio.ensure_future(pool.run(SLEEP))
        await _running(pool, 1)
        job.cancel()
        began = time.monotonic()
        while pool.stats()["running"]:
            await asyncio.sleep(0.01)
        assert job.cancelled()
        assert (await pool.run("print(1)")).status == "ok"
        return time.monotonic() - began

    assert in_pool(work) < 25


def test_runs_wait_their_turn_in_order_and_never_exceed_the_slots():
    async def work(pool):
        began, most, begin = [], 0, pool.cells.all[0].begin

        def watched(occupant, limits, stdin, *rest):
            nonlocal most
            began.append(int(stdin))
            number = begin(occupant, limits, stdin, *rest)
            most = max(most, len(pool.cells.all[0].occupants))
            return number

        pool.cells.all[0].begin = watched
        await asyncio.gather(*(pool.run("import time; time.sleep(0.02)", stdin=str(i)) for i in range(40)))
        return most, began

    assert in_pool(work) == (8, list(range(40)))


def test_cells_are_replaced_after_their_share_of_jobs():
    async def work(pool):
        outcomes = [await pool.run("print(1)") for _ in range(30)]
        while len(pool.cells.all) > 1:
            await asyncio.sleep(0.05)
        return outcomes, pool.cells.started

    outcomes, started = in_pool(work, recycle_after=10)
    assert {o.status for o in outcomes} == {"ok"}
    assert started >= 3


def test_a_closed_pool_leaves_no_process_and_no_descriptor():
    before = set(os.listdir("/proc/self/fd"))

    async def work(pool):
        jobs = [asyncio.ensure_future(pool.run(SLEEP)) for _ in range(4)]
        await _running(pool, 4)
        for job in jobs:
            job.cancel()
        return set().union(*(descendants(cell._process.pid) | {cell._process.pid} for cell in pool.cells.all))

    processes = in_pool(work, cells=2)
    deadline = time.monotonic() + 30
    while (left := [pid for pid in processes if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0


@pytest.mark.parametrize("refused", ["beside.subprocess.Popen", "cell.socket.socketpair", "cell.os.memfd_create"])
def test_a_machine_that_refuses_a_cell_says_why_and_nothing_is_left(refused, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def begin():
        async with SandboxPool(cells=2):
            pass

    async def again():
        before = os.listdir("/proc/self/fd")
        monkeypatch.setattr(f"fastgrpo_sandbox.{refused}", refuse)
        with pytest.raises(SandboxUnavailable, match=r"did not start: .* Too many open files; .* `ulimit -n`"):
            await begin()
        monkeypatch.undo()
        return len(os.listdir("/proc/self/fd")) - len(before)

    assert asyncio.run(again()) == 0


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_start_that_is_cancelled_leaves_no_process_and_no_descriptor(factory):
    """It left bubblewraps that were starting and, under uvloop, two descriptors of each."""

    async def begin():
        before = len(os.listdir("/proc/self/fd"))
        pools = [asyncio.ensure_future(SandboxPool(cells=2).__aenter__()) for _ in range(3)]
        while not _children(os.getpid()):
            await asyncio.sleep(0)
        for number, pool in enumerate(pools):
            await asyncio.sleep(0.02 * number)
            pool.cancel()
        # Where the loop was late a pool was open before it was cancelled.
        opened = [end for end in await asyncio.gather(*pools, return_exceptions=True) if isinstance(end, SandboxPool)]
        await asyncio.gather(*(pool.aclose() for pool in opened))
        return _children(os.getpid()), len(os.listdir("/proc/self/fd")) - before

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(begin())  # a loop's first has the loop's own, which stay
        before = _children(os.getpid())
        children, descriptors = runner.run(begin())
    assert (children - before, descriptors) == (set(), 0)


def test_a_first_session_that_is_cancelled_leaves_all_cells_to_others():
    """The cells that had started were all that sessions ever had."""

    async def session(pool):
        async with pool.session("async def main(call): return 1", None) as opened:
            return await opened.outcome()

    async def work(pool):
        first = asyncio.ensure_future(session(pool))
        while pool.stats()["cells"] < 4:
            await asyncio.sleep(0)
        first.cancel()
        outcome = await session(pool)
        return first.cancelled(), outcome.value, pool.stats()["cells"]

    assert in_pool(work, cells=3) == (True, 1, 6)


def test_what_waits_is_not_packed(monkeypatch):
    """300 cases of a code of 4 MiB took 1.3 GB of this process."""
    packed, whole = 0, pool_module.pack_job

    def pack(*arguments):
        nonlocal packed
        packed += 1
        return whole(*arguments)

    async def work(pool):
        monkeypatch.setattr(pool_module, "pack_job", pack)
        job = asyncio.ensure_future(pool.run(SLEEP, tests=StdioTests(cases=(("", ""),) * 40)))
        await _running(pool, 8)
        job.cancel()
        return packed, pool.stats()["queued"]

    assert in_pool(work) == (8, 0)


def test_a_job_of_many_cases_holds_up_no_other():
    """100,000 took 16 s to begin, 9 to end, and whoever came after them waited for all."""

    async def work(pool):
        many = asyncio.ensure_future(pool.run("print(1)", tests=StdioTests(cases=(("", "1"),) * 100_000)))
        await _running(pool, 8)
        began = time.thread_time()
        others = [(await pool.run("print(2)")).stdout for _ in range(3)]
        many.cancel()
        await asyncio.gather(many, return_exceptions=True)
        return others, time.thread_time() - began

    others, seconds = in_pool(work)
    assert others == ["2\n"] * 3
    assert seconds < 1


HOST = """
import asyncio, os
from fastgrpo_sandbox import Limits, SandboxPool
async def main():
    async with SandboxPool(cells=2, limits=Limits(wall_s=300)) as pool:
        jobs = [asyncio.ensure_future(pool.run("import time; time.sleep(300)")) for _ in range(6)]
        while pool.stats()["running"] < 6: await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        print("ready", flush=True)
        await asyncio.gather(*jobs)
asyncio.run(main())
"""


def test_22_the_hosts_death_leaves_no_process_mount_or_file():
    mounts, files = Path("/proc/self/mountinfo").read_text(), set(os.listdir("/tmp"))
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert host.stdout.readline() == "ready\n"
    processes = descendants(host.pid)
    assert len(processes) > 8
    host.kill()
    host.wait()
    host.stdout.close()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in processes if _comm(pid) != "bwrap" or _alive(pid)]) and time.monotonic() < deadline:
        left = [pid for pid in processes if _alive(pid)]
        if not left:
            break
        time.sleep(0.05)
    assert left == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert {
        name for name in set(os.listdir("/tmp")) - files if "jail" in name or "sandbox" in name or "cell" in name
    } == set()


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


# Root covers its private home, where the interpreter may live, with readable binds in a mount namespace of its own.
AS_USER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, kind, flags, data=b""):
    if libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), data): raise OSError(ctypes.get_errno(), target)
assert libc.unshare(0x20000) == 0
mount("none", "/", b"", 0x44000)
prefix = os.path.realpath(sys.base_prefix)
if prefix.startswith("/root/"):
    fd = os.open(prefix, os.O_PATH)
    mount("tmpfs", "/root", b"tmpfs", 0, b"mode=0755")
    os.makedirs(prefix)
    mount(f"/proc/self/fd/{fd}", prefix, b"", 0x5000)
os.setgroups([]); os.setresgid(4242, 4242, 4242); os.setresuid(4242, 4242, 4242)
os.environ["HOME"] = "/nonexistent"
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
# In a user namespace, as the ids that are written into its map: a line has theirs there, those outside, and how many.
IN_NAMESPACE = """
import ctypes, os, sys
uid, line = os.getuid(), sys.argv[1]
here, there = os.pipe()
if (child := os.fork()) == 0:
    os.read(here, 1)
    for kind in ("uid", "gid"):
        if len(sys.argv) > 3 and kind == "gid": open(f"/proc/{os.getppid()}/setgroups", "w").write("deny")
        open(f"/proc/{os.getppid()}/{kind}_map", "w").write(line)
    os._exit(0)
assert ctypes.CDLL(None).unshare(0x10000000) == 0
os.write(there, b"1")
assert os.waitpid(child, 0)[1] == 0
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""
PROGRAM = """
import os
from fastgrpo_sandbox import BlockingSandboxPool, CheckTests
with BlockingSandboxPool(cells=1) as pool:
    code = "import os\\ntry: open('/etc/shadow')\\nexcept OSError as e: print(type(e).__name__, os.getuid(), os.getpid())\\ndef f(x): return x"
    print(os.getuid(), pool.run(code).stdout.strip())
    print(pool.run(code, tests=CheckTests("def check(c): assert c(3) == 3", "f")).status)
"""


def test_works_for_an_ordinary_user():
    command = [sys.executable, "-c", AS_USER, PROGRAM] if os.getuid() == 0 else [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=240, check=False)
    uid = 4242 if os.getuid() == 0 else os.getuid()
    assert done.stdout.splitlines() == [f"{uid} FileNotFoundError 1000 1", "ok"], done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become others, and map them")
@pytest.mark.parametrize(("line", "uid", "inside"), [
    ("0 4242 1", 4242, 0),  # as `unshare -r` makes it: an ordinary user, there called root
    ("0 0 65536", 0, 0),  # root with users, as in a container's namespace
    ("7 4242 1", 4242, 7),
])  # fmt: skip
def test_works_in_user_namespaces_with_one_user_and_with_many(line, uid, inside):
    deny = ("deny",) if uid else ()
    command = [sys.executable, "-c", AS_USER, IN_NAMESPACE] if uid else [sys.executable, "-c", IN_NAMESPACE]
    done = subprocess.run(
        [*command, line, PROGRAM, *deny], capture_output=True, text=True, cwd="/", timeout=240, check=False
    )
    assert done.stdout.splitlines() == [f"{inside} FileNotFoundError 1000 1", "ok"], done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may map itself")
@pytest.mark.parametrize("line", ["0 0 1", "1000 0 1"])
def test_the_machines_root_gets_no_jail_by_another_name(line):
    """It owns what is in /proc/sys there, too."""
    command = [sys.executable, "-c", IN_NAMESPACE, line, PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=240, check=False)
    assert done.stdout == ""
    (said,) = [line for line in done.stderr.splitlines() if "SandboxUnavailable: " in line]
    assert "nobody but the machine's root; start this outside of it" in said


@pytest.mark.skipif(os.getuid() != 0, reason="only root is dropped to another uid")
def test_root_is_dropped_before_bubblewrap_starts():
    async def work(pool):
        await pool.run("print(1)")
        return [os.stat(f"/proc/{pid}").st_uid for pid in descendants(pool.cells.all[0]._process.pid) if _alive(pid)]

    uids = in_pool(work)
    assert uids
    assert 0 not in uids


def test_a_host_loop_that_stands_still_loses_nothing():
    async def work(pool):
        code = "import time; time.sleep(0.5); print('x' * 60000)"
        jobs = [asyncio.ensure_future(pool.run(code)) for _ in range(16)]
        await _running(pool, 8)
        time.sleep(1.5)  # the loop answers nobody; the server waits
        return await asyncio.gather(*jobs)

    outcomes = in_pool(work, limits=Limits(wall_s=20))
    assert [o.status for o in outcomes] == ["ok"] * 16


def test_uvloop_works_too():
    async def main():
        async with SandboxPool(cells=1) as pool:
            return await pool.run("print('uv')")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()).stdout == "uv\n"


def test_bad_jobs_are_rejected_before_they_run():
    async def work(pool):
        return [
            await pool.run("x", files={"../x": "y"}),
            await pool.run("x", files={"/etc/x": "y"}),
            await pool.run("x" * (9 << 20)),
            await pool.run("x = '\ud800'"),
            await pool.run("x", stdin="\ud800"),
            await pool.run("x", files={"x": "\ud800"}),
        ]

    assert {outcome.status for outcome in in_pool(work)} == {"rejected"}


def test_preload_is_warm_and_shared_read_only():
    code = textwrap.dedent("""
        import sys
        print("numpy" in sys.modules)
        import numpy
        print(int(numpy.arange(4).sum()))
        try: open("/jail/site/x", "w")
        except OSError as error: print(error.errno in (13, 30))
        import os
        print(all(name.startswith("numpy") for name in os.listdir("/jail/site")))
    """)

    async def work(pool):
        return await pool.run(code)

    pytest.importorskip("numpy")
    assert in_pool(work, preload=("numpy",)).stdout.split() == ["True", "6", "True", "True"]


def test_an_unknown_preload_fails_closed():
    from fastgrpo_sandbox import SandboxUnavailable

    async def work(pool):
        return None

    with pytest.raises(SandboxUnavailable, match=r"no_such_module.*leave it out of `preload`"):
        in_pool(work, preload=("no_such_module",))
