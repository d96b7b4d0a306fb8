"""Every wait of the pool ends, also when its other side has stopped: a fork server, a cell, the machine, the loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from fastgrpo_sandbox import BlockingSandboxPool, Limits, SandboxPool, SandboxUnavailable, blocking, cell, cells
from tests.sandbox.test_life import SLEEP, in_pool, server_of_cell

pytestmark = pytest.mark.jail


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of a second in place of a minute."""
    monkeypatch.setattr(cells, "PAUSE_S", 0.01)
    monkeypatch.setattr(cells, "MOST_PAUSE_S", 0.2)
    monkeypatch.setattr(cells, "PATIENCE_S", 0.5)
    monkeypatch.setattr(cells, "WATCH_S", 0.2)
    monkeypatch.setattr(cell, "ANSWER_GRACE_S", 1.0)


@pytest.fixture
def no_restart(monkeypatch: pytest.MonkeyPatch):
    """Makes every later start of a cell fail, in the way named, or none any more."""
    whole, deadline = cell.bwrap_spec, cell.START_DEADLINE_S

    def refuse(*_):
        raise SandboxUnavailable("no more jails")

    def silent(*arguments):
        python = [sys.executable, "-c", "import time; time.sleep(60)"]
        return whole(*arguments) | {"bwrap": python[0], "binds": {}, "libraries": [], "arguments": python[1:]}

    def broken(*_):
        raise RuntimeError("a fault of ours")

    def start(how: str) -> None:
        monkeypatch.setattr(cell, "START_DEADLINE_S", deadline if how == "none" else 0.5)
        ways = {"refused": refuse, "silent": silent, "broken": broken, "none": whole}
        monkeypatch.setattr(cell, "bwrap_spec", ways[how])

    return start


async def _said(work) -> str:
    """Why `work` says that there are no jails."""
    try:
        return f"no error: {await work}"
    except SandboxUnavailable as error:
        return str(error)


async def _session(pool: SandboxPool):
    async with pool.session("async def main(call): return 1", None) as opened:
        return await opened.outcome()


async def _lose_all(pool: SandboxPool, kind: str) -> None:
    lost, victims = pool.stats()["cells_lost"], [one for one in pool.cells.all if one.kind == kind]
    for victim in victims:
        os.kill(victim._process.pid, signal.SIGKILL)
    while pool.stats()["cells_lost"] < lost + len(victims):
        await asyncio.sleep(0.01)


def _job(pool: SandboxPool, kind: str):
    return pool.run("print(1)") if kind == "run" else _session(pool)


@pytest.mark.parametrize("how", ["refused", "silent", "broken"])
@pytest.mark.parametrize("kind", ["run", "session"])
def test_jobs_hear_why_no_cell_starts_and_run_again_once_the_reason_has_passed(no_restart, how, kind):
    async def work(pool):
        assert (await _job(pool, kind)).status == "ok"
        no_restart(how)
        await _lose_all(pool, kind)
        waiting = await asyncio.gather(*(_said(_job(pool, kind)) for _ in range(20)))
        waiting.append(await asyncio.wait_for(_said(_job(pool, kind)), 0.1))  # at once
        cells_left = pool.stats()["cells"]
        no_restart("none")
        while "could not be restarted" in (said := await _said(_job(pool, kind))):
            await asyncio.sleep(0.01)
        while sum(one.kind == kind for one in pool.cells.all if not one.lost) < 2:  # whole again
            await asyncio.sleep(0.01)
        return waiting, cells_left, said

    said, cells_left, after = in_pool(work, cells=2)
    assert len(said) == 21
    assert all("could not be restarted" in text for text in said), said
    assert cells_left == (0 if kind == "run" else 2)
    assert "status='ok'" in after


@pytest.mark.parametrize("kind", ["run", "session"])
def test_jobs_wait_for_a_cell_that_starts_again_soon(no_restart, monkeypatch, kind):
    monkeypatch.setattr(cells, "PATIENCE_S", 60)

    async def work(pool):
        assert (await _job(pool, kind)).status == "ok"
        no_restart("refused")
        await _lose_all(pool, kind)
        waiting = [asyncio.ensure_future(_said(_job(pool, kind))) for _ in range(20)]
        await asyncio.sleep(0.5)  # more tries than a cell that is recycled has
        assert not any(job.done() for job in waiting)
        no_restart("none")
        return await asyncio.gather(*waiting)

    assert all("status='ok'" in text for text in in_pool(work))


@pytest.fixture
def first_dies(monkeypatch: pytest.MonkeyPatch):
    """From its call on the next cell is lost in the very turn of the loop in which it says that it is ready."""
    frame = cell.Cell._frame

    def ready_and_lost(self, job, kind, body):
        frame(self, job, kind, body)
        if kind == cell.READY:
            monkeypatch.setattr(cell.Cell, "_frame", frame)
            frame(self, 0, cell.GONE, b"no more processes")

    return lambda: monkeypatch.setattr(cell.Cell, "_frame", ready_and_lost)


def test_a_cell_that_is_lost_as_it_is_ready_opens_no_pool(first_dies):
    first_dies()
    with pytest.raises(SandboxUnavailable, match="the cell cannot fork: no more processes"):
        in_pool(lambda pool: pool.run("print(1)"))


@pytest.mark.parametrize("kind", ["run", "session"])
def test_a_cell_that_is_lost_as_it_is_ready_is_started_again(first_dies, monkeypatch, kind):
    monkeypatch.setattr(cells, "PATIENCE_S", 60)

    async def work(pool):
        assert (await _job(pool, kind)).status == "ok"
        first_dies()
        await _lose_all(pool, kind)
        return await asyncio.wait_for(_job(pool, kind), 30)

    assert in_pool(work).status == "ok"


def test_closing_waits_for_a_cell_that_is_being_stopped(monkeypatch):
    stop, stopping = cell.Cell.stop, []

    async def work(pool):
        entered = asyncio.Event()

        def noted(self):
            stopping.append(self)
            entered.set()
            return stop(self)

        monkeypatch.setattr(cell.Cell, "stop", noted)
        pool.cells.all[0].give_up("it is to be replaced")
        await entered.wait()
        await pool.aclose()
        return [one._process.returncode for one in stopping]

    assert None not in in_pool(work)


def test_a_pool_whose_opening_is_interrupted_leaves_nothing(monkeypatch):
    pool = BlockingSandboxPool(cells=2)
    begun, wait = threading.Event(), pool.wait
    launch, made = cell.Cell._launch, []

    def launched(self):
        made.append(self)
        begun.set()
        return launch(self)

    def interrupted(work):
        if not begun.is_set():
            future = asyncio.run_coroutine_threadsafe(work, pool._loop)
            begun.wait(10)
            future.cancel()
            raise KeyboardInterrupt
        return wait(work)

    monkeypatch.setattr(cell.Cell, "_launch", launched)
    monkeypatch.setattr(pool, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), pool:
        pass
    assert made
    assert None not in [one._process.poll() for one in made]
    assert [one._process.returncode for one in made] == [-signal.SIGKILL] * len(made)
    assert pool._loop.is_closed()


# As bubblewrap begins: its child waits for its parent's word, and the kernel does not yet end it with its parent.
WAITS = """
import os, signal
if (child := os.fork()) == 0:
    signal.pause()
with open("{said}.new", "w") as file:
    file.write(str(child))
os.rename("{said}.new", "{said}")
signal.pause()
"""


@pytest.mark.parametrize("by_another", [False, True])
def test_a_jail_that_is_ended_as_it_starts_leaves_no_process(by_another, monkeypatch, tmp_path):
    said = tmp_path / "child"
    (tmp_path / "launch.py").write_text(WAITS.format(said=said))
    monkeypatch.setattr(cell, "HERE", tmp_path)

    async def work():
        one = cell.Cell(1, "run", (), 0, None, lambda cell: None)
        starting = asyncio.ensure_future(one.start())
        while not said.exists():
            await asyncio.sleep(0.01)
        if by_another:
            os.kill(one._process.pid, signal.SIGKILL)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        while not _has_ended(int(said.read_text())):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), 60))


def _has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_cells_that_start_and_end_no_job_are_not_started_without_pause(monkeypatch):
    monkeypatch.setattr(cells, "PAUSE_S", 0.1)
    monkeypatch.setattr(cells, "MOST_PAUSE_S", 0.8)
    start, fall = cell.Cell.start, [False]

    async def start_and_fall(self):
        await start(self)
        if fall[0]:
            asyncio.get_running_loop().call_soon(self.give_up, "it cannot fork")

    monkeypatch.setattr(cell.Cell, "start", start_and_fall)

    async def work(pool):
        fall[0] = True
        await _lose_all(pool, "run")
        await asyncio.sleep(1.5)
        tried, fall[0] = pool.cells.started, False
        while not (pool.stats()["cells"]):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        return tried, await _said(pool.run("print(1)"))

    tried, said = in_pool(work)
    assert 3 <= tried <= 6  # the pauses are 0.1, 0.2, 0.4 and 0.8 s
    assert "status='ok'" in said


def test_cells_for_sessions_start_all_or_none(no_restart, monkeypatch):
    """A pool of which one had not started had fewer for ever."""
    add = cells.Cells._add
    failures = [SandboxUnavailable("no memory")]

    async def add_some(self, kind):
        if kind == "session" and failures:
            raise failures.pop()
        await add(self, kind)

    monkeypatch.setattr(cells.Cells, "_add", add_some)

    async def work(pool):
        first = await _said(_session(pool))
        return first, pool.stats()["cells"], await _said(_session(pool)), pool.stats()["cells"]

    first, few, second, all_of_them = in_pool(work, cells=2)
    assert (first, few, all_of_them) == ("no memory", 2, 4)
    assert "status='ok'" in second


def test_a_cell_that_could_be_recycled_but_not_replaced_serves_on(no_restart):
    async def work(pool):
        no_restart("refused")
        return [(await pool.run("print(1)")).status for _ in range(12)]

    assert in_pool(work, recycle_after=5) == ["ok"] * 12


def test_one_cell_of_two_that_cannot_be_restarted_leaves_the_other_until_it_can(no_restart):
    async def work(pool):
        no_restart("refused")
        os.kill(pool.cells.all[0]._process.pid, signal.SIGKILL)
        while pool.stats()["cells"] > 1:
            await asyncio.sleep(0.01)
        statuses = [(await pool.run("print(1)")).status for _ in range(3)]
        await asyncio.sleep(1)  # longer than jobs would wait
        statuses.append((await pool.run("print(1)")).status)
        no_restart("none")
        while pool.stats()["cells"] < 2:
            await asyncio.sleep(0.01)
        return statuses

    assert in_pool(work, cells=2) == ["ok"] * 4


def test_closing_the_pool_ends_those_who_wait_for_a_cell(no_restart, monkeypatch):
    async def main():
        async with SandboxPool(cells=1) as pool:
            monkeypatch.setattr(cells, "PATIENCE_S", 60)
            no_restart("refused")
            os.kill(pool.cells.all[0]._process.pid, signal.SIGKILL)
            while not pool.stats()["cells_lost"]:
                await asyncio.sleep(0.01)
            waiting = [asyncio.ensure_future(_said(pool.run("print(1)"))) for _ in range(20)]
            await asyncio.sleep(0)
        return await asyncio.wait_for(asyncio.gather(*waiting), 30)

    assert set(asyncio.run(main())) == {"the pool is closed: use it inside its `async with`"}


def test_a_fork_server_that_stops_before_its_first_job_is_no_pool(monkeypatch):
    start = cell.Cell.start

    async def stopped(self):
        await start(self)
        with contextlib.suppress(ProcessLookupError):
            os.kill(server_of_cell(self), signal.SIGSTOP)

    monkeypatch.setattr(cell.Cell, "start", stopped)
    with pytest.raises(SandboxUnavailable, match="does not answer"):
        in_pool(lambda pool: pool.run("print(1)"), limits=Limits(wall_s=0.5))


def test_leaving_a_session_whose_fork_server_stopped_takes_no_longer_than_its_deadline():
    async def work(pool):
        async with pool.session(f"async def main(call): {SLEEP}", None, limits=Limits(wall_s=3600)) as opened:
            (sessions,) = [one for one in pool.cells.all if one.kind == "session"]
            os.kill(server_of_cell(sessions), signal.SIGSTOP)
        return await opened.outcome()

    outcome = in_pool(work)
    assert (outcome.status, outcome.error) == ("infrastructure", "the fork server does not answer")


def test_a_cell_that_does_not_die_holds_nobody_up(monkeypatch, caplog):
    monkeypatch.setattr(cell, "STOP_DEADLINE_S", 0.2)

    async def work(pool):
        process = pool.cells.all[0]._process
        monkeypatch.setattr(process, "poll", lambda: None)
        return process

    with caplog.at_level(logging.WARNING, "fastgrpo_sandbox"):
        process = in_pool(work)
    assert "cell did not end: cell=1" in caplog.text
    process.wait(10)


def test_upkeep_that_fails_is_heard(caplog):
    async def work(pool):
        async def fails():
            raise RuntimeError("upkeep is broken")

        pool.cells._keep(fails())
        await asyncio.sleep(0)

    in_pool(work)
    assert "upkeep of the pool failed" in caplog.text


def test_a_blocking_pool_outside_its_block_says_so(monkeypatch):
    monkeypatch.setattr(blocking, "LOOK_S", 0.05)
    pool = BlockingSandboxPool(cells=1)
    with pytest.raises(SandboxUnavailable, match="`with` block"):
        pool.run("print(1)")
    with pool:
        if (child := os.fork()) == 0:
            with contextlib.suppress(SandboxUnavailable):
                pool.run("print(1)")
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pool.run("print(1)").status == "ok"
    with pytest.raises(SandboxUnavailable, match="`with` block"):
        pool.run("print(1)")


def test_a_pool_in_another_loop_than_its_own_is_told_at_once():
    async def main():
        with pytest.raises(SandboxUnavailable, match="the pool is not open"):
            await SandboxPool(cells=1).run("print(1)")
        async with SandboxPool(cells=1) as pool:
            with pytest.raises(SandboxUnavailable, match=r"opened in another event loop.*BlockingSandboxPool"):
                await asyncio.to_thread(asyncio.run, pool.run("print(1)"))
            assert (await pool.run("print(1)")).status == "ok"
        with pytest.raises(ValueError, match="opened once"):
            await pool.__aenter__()

    asyncio.run(asyncio.wait_for(main(), 30))
    with BlockingSandboxPool(cells=1) as pool:
        pass
    with pytest.raises(ValueError, match="opened once"):
        pool.__enter__()


def test_a_blocking_call_ends_when_the_loops_thread_does(monkeypatch):
    monkeypatch.setattr(blocking, "LOOK_S", 0.05)
    pool = BlockingSandboxPool(cells=1)

    def run():
        with pool:
            pool._loop.call_soon_threadsafe(pool._loop.stop)
            pool.run(SLEEP)

    with pytest.raises(SandboxUnavailable, match="`with` block"):
        run()
    for one in pool.pool.cells.all:
        one._process.kill()
        one._process.wait(10)
