"""Soak of the jail pool: many jobs, some hostile, every outcome checked, and what is left of them afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from frame_fuzz import mutate

from fastgrpo_sandbox import AssertTests, Limits, SandboxPool
from fastgrpo_sandbox.guest.wire import result_body

FINE = "def f(x):\n    return x + 1\nassert f(NUMBER) == NUMBER + 1\nprint(NUMBER)\n"
ASSERTS = AssertTests(("assert f(1) == 2",))
IN_FLIGHT = 16
HOSTILE_SHARE = 0.05
SETTLE_S = 30.0
HOSTILE: list[tuple[str, Limits, set[str]]] = [
    ("while True: pass", Limits(cpu_s=0.2), {"timeout"}),
    ("import time; time.sleep(60)", Limits(wall_s=0.2), {"timeout"}),
    ("x = [0] * 10 ** 10", Limits(), {"memory"}),
    ("while True: print('x' * 4096)", Limits(), {"output_limit"}),
    ("import os\nwhile True: os.fork()", Limits(cpu_s=0.3, wall_s=3, processes=16), {"failed", "timeout"}),
    ("import os; os._exit(0)", Limits(), {"failed"}),
    ("import ctypes; ctypes.string_at(0)", Limits(), {"failed"}),
    ("import os, signal; os.kill(0, signal.SIGKILL); os.kill(-1, 9)", Limits(), {"failed", "ok"}),
    ("import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)", Limits(), {"ok"}),
    (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'\\xff' * 64)\n    except OSError: pass",
        Limits(),
        {"failed"},
    ),
    ("open('/tmp/x', 'wb').write(bytes(1 << 26))", Limits(), {"failed"}),
]
FRAME = "import os\nbody = {body!r}\nos.write(3, {length}.to_bytes(4, 'little') + {kind!r} + body)\nos._exit(0)"
RESULT = result_body("Traceback", "KeyError", tests=(True,))


class Soak:
    """Runs jobs and counts outcomes. With `kills_every` seconds, cells and fork servers are killed while they run: then
    a job may also end as infrastructure, and nothing else may change. `malformed` is the share of jobs, scripts and
    judged ones, that write a mutated frame, and may end in any way but as infrastructure or with a test passed."""

    def __init__(self, kills_every: float = 0.0, malformed: float = 0.0) -> None:
        self.kills_every = kills_every
        self.malformed = malformed
        self.kills = 0
        self.wrong: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.left: dict[str, int] = {}
        self.rate = 0.0
        self._random = random.Random(0)

    async def run(self, count: int) -> None:
        """`count` jobs between two counts of what is there."""
        async with SandboxPool(recycle_after=10**9) as pool:
            await self._jobs(pool, min(count, 2000))
            before = await _settled(pool)
            killer = asyncio.ensure_future(self._kill(pool)) if self.kills_every else None
            began = time.perf_counter()
            await self._jobs(pool, count)
            self.rate = count / (time.perf_counter() - began)
            if killer:
                killer.cancel()
            after = await _settled(pool)
        self.left = {name: after[name] - before[name] for name in before}

    async def _jobs(self, pool: SandboxPool, count: int) -> None:
        left = iter(range(count))

        async def caller() -> None:
            for number in left:
                await self._one(pool, number)

        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))

    async def _malformed(self, pool: SandboxPool) -> None:
        body = mutate(self._random, RESULT)
        length = self._random.choice((len(body), len(body), 0, 7, 1 << 21, (1 << 32) - 1))
        code = FRAME.format(body=body, length=length, kind=self._random.choice((b"R", b"R", b"C", b"x")))
        outcome = await pool.run(code, tests=self._random.choice((None, ASSERTS)))
        self.seen[f"malformed: {outcome.status}"] += 1
        lost = bool(self.kills_every) and outcome.status == "infrastructure"
        if not lost and (outcome.status == "infrastructure" or any(outcome.tests)):
            self.wrong[f"{outcome.status} {outcome.error[-80:]!r} for {code[:80]!r}"] += 1

    async def _one(self, pool: SandboxPool, number: int) -> None:
        if self._random.random() < self.malformed:
            return await self._malformed(pool)
        hostile = self._random.random() < HOSTILE_SHARE
        code, limits, expected = self._random.choice(HOSTILE) if hostile else (FINE, Limits(), {"ok"})
        outcome = await pool.run(code.replace("NUMBER", str(number)), limits=limits)
        self.seen[outcome.status] += 1
        lost = bool(self.kills_every) and outcome.status == "infrastructure"
        said = f"{number}\n" if outcome.status == "ok" and not hostile else outcome.stdout
        if not lost and (outcome.status not in expected or outcome.stdout != said):
            self.wrong[f"{outcome.status} {outcome.error[-80:]!r} for {code[:30]!r}"] += 1

    async def _kill(self, pool: SandboxPool) -> None:
        """The first at once, while all cells are there: a busy machine may end the jobs before a second finds any."""
        while True:
            with contextlib.suppress(OSError, IndexError, AttributeError):  # the cell is on its way in or out
                pid = self._random.choice(pool.cells.all)._process.pid
                os.kill(self._random.choice([pid, server_of(pid)]), signal.SIGKILL)
                self.kills += 1
            await asyncio.sleep(self._random.uniform(0.5, 1.5) * self.kills_every)


async def _settled(pool: SandboxPool) -> dict[str, int]:
    """What is there once lost cells are replaced, their children armed, and nothing changes any more."""
    deadline = time.monotonic() + SETTLE_S
    found, last = _count(pool), dict[str, int]()
    while (found != last or any(cell.lost for cell in pool.cells.all)) and time.monotonic() < deadline:
        await asyncio.sleep(1)
        found, last = _count(pool), found
    return found


def _count(pool: SandboxPool) -> dict[str, int]:
    """What this pool holds: processes, descriptors, namespaces, mounts, files, and memory of host and fork servers."""
    cells = [cell._process.pid for cell in pool.cells.all]
    below = descendants(os.getpid())
    servers = [server_of(pid) for pid in cells if len(descendants(pid)) > 1]
    return {
        "cells": len(cells),
        "processes": len(below),
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in [*servers, os.getpid()]),
        "namespaces": len({_namespace(pid, kind) for pid in below for kind in ("pid", "mnt", "user", "ipc", "net")}),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "files": _files_of(os.stat(f"/proc/{servers[0]}").st_uid if servers else 0),
        "MB": sum(private_kb(pid) for pid in [*servers, os.getpid()]) // 1024,
    }


def _files_of(uid: int) -> int:
    """Files of the cells' user where all may write; not told apart, so 0, where that is the user of this process."""
    if uid == os.getuid():
        return 0
    folders = [folder for folder in ("/tmp", "/var/tmp", "/dev/shm") if os.path.isdir(folder)]
    return sum(entry.stat(follow_symlinks=False).st_uid == uid for folder in folders for entry in os.scandir(folder))


def _namespace(pid: int, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


# ---- processes of a cell ----


def descendants(pid: int) -> list[int]:
    """Every process below `pid`."""
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task") if os.path.exists(f"/proc/{pid}/task") else ():
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            found += [child, *descendants(child)]
    return found


def server_of(bwrap: int) -> int:
    """bubblewrap, its pid 1, then the fork server."""
    return descendants(bwrap)[1]


def jobs_of(bwrap: int) -> list[int]:
    """Children of a cell's fork server, armed or at work."""
    return descendants(server_of(bwrap))


# Of `stat_of`: minor faults of ended children; user and system time, the process's own and its ended children's.
CHILDRENS_FAULTS, TICKS = 7, slice(10, 14)


def stat_of(pid: int) -> list[int]:
    """Numbers of /proc/PID/stat, from the parent's number on, which is the fourth there."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return [int(field) for field in fields[1:]]


def private_kb(pid: int) -> int:
    """Memory that `pid` shares with no other process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))
