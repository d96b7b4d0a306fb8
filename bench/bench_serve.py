"""Jails over HTTP beside the same jails in process, and beside cold bubblewrap behind the same server.

`python bench/bench_serve.py` writes bench/results/serve.md. Client, server and jails share the machine's cores, the
worst case: on hosts of their own the server has them all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import aiohttp
import uvloop
from aiohttp import web
from bench_sandbox import JOB, LOAD_BEFORE, Run, Speed, cold_bwrap, jailed, speed
from machine import shared_machine
from sandbox_soak import TICKS, descendants, stat_of

from fastgrpo_sandbox import Limits, Outcome, RemotePool, SandboxPool
from fastgrpo_sandbox.serving.app import App
from fastgrpo_sandbox.serving.jails import Jails

HERE = Path(__file__).resolve().parent
IN_FLIGHT = 64
ROUNDS = 5
JOBS, COLD_JOBS = 1500, 128
BAR = 0.6


class ColdBwrap:
    """A pool's `run`, by a fresh bubblewrap and interpreter for each job."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(8 * (os.cpu_count() or 1))

    async def run(self, code: str, **_: Any) -> Outcome:
        async with self._slots:
            await cold_bwrap()
        return Outcome("ok", stdout="42\n" if code.startswith("print(6") else "ok\n")

    async def read(self, tests: Any) -> None:
        """Nothing: its jobs have none."""

    def stats(self) -> dict[str, float]:
        return {"cells": 1.0, "run_s_p50": 0.1}


async def serve_cold() -> None:
    """The server of this package over ColdBwrap, until killed."""
    runner = web.AppRunner(App(Jails(cast(Any, ColdBwrap()), 4096, 0, Limits())).application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print("serving on http://{}:{}".format(*runner.addresses[0]), flush=True)
    await asyncio.Event().wait()


@contextmanager
def server(*command: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(60)


def fused(session: aiohttp.ClientSession, url: str) -> Run:
    """SandboxFusion's form, as its clients send it."""
    body = {"code": JOB, "language": "python", "run_timeout": 10}

    async def run() -> None:
        async with session.post(f"{url}/run_code", json=body) as response:
            answer = await response.json()
            assert answer["status"] == "Success", answer

    return run


def cpu_ms() -> float:
    """CPU time so far of this process, the servers, their jails, and of all their ended children."""
    ticks = 0
    for pid in (os.getpid(), *descendants(os.getpid())):
        with contextlib.suppress(OSError):  # an armed child that has just become a job
            ticks += sum(stat_of(pid)[TICKS])
    return 1000 * ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Round:
    """Jobs/s with their latencies, and milliseconds of CPU for one job in all processes."""

    speed: Speed
    cpu_ms: float


async def measured(run: Run, jobs: int) -> Round:
    before = cpu_ms()
    found = await speed(run, jobs, IN_FLIGHT)
    return Round(found, (cpu_ms() - before) / jobs)


async def measure(url: str, cold_url: str) -> dict[str, list[Round]]:
    """ROUNDS rounds of each, taking turns."""
    found: dict[str, list[Round]] = {"in process": [], "/run": [], "/run_code": [], "cold": []}
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        SandboxPool() as pool,
        RemotePool([url]) as remote,
        RemotePool([cold_url]) as cold,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        runs = {
            "in process": jailed(pool),
            "/run": jailed(cast(Any, remote)),
            "/run_code": fused(session, url),
            "cold": jailed(cast(Any, cold)),
        }
        for name, run in runs.items():
            await speed(run, 64 if name == "cold" else 400, IN_FLIGHT)
        for _ in range(ROUNDS):
            for name, run in runs.items():
                found[name].append(await measured(run, COLD_JOBS if name == "cold" else JOBS))
    return found


def table(found: dict[str, list[Round]]) -> list[str]:
    """Medians of the rounds; ratios are medians of each round's own."""
    titles = {
        "in process": "in process",
        "/run": "over HTTP, `POST /run` by RemotePool",
        "/run_code": "over HTTP, SandboxFusion's `POST /run_code` (JSON)",
        "cold": "cold bwrap + python3 -I -S behind the same server",
    }
    lines = [
        "| 64 in flight | jobs/s | p50 / p99 | CPU of one job, all processes | jobs/s of in process, bar 60 % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, title in titles.items():
        rounds = found[name]
        beside = zip(rounds, found["in process"], strict=True)
        share = statistics.median(one.speed.rate / other.speed.rate for one, other in beside)
        rate, cpu = (
            statistics.median(values) for values in zip(*((r.speed.rate, r.cpu_ms) for r in rounds), strict=True)
        )
        p50, p99 = (statistics.median(r.speed.ms(percent) for r in rounds) for percent in (50, 99))
        missed = ", **missed**" if name.startswith("/") and share < BAR else ""
        lines.append(f"| {title} | {rate:.0f} | {p50:.1f} / {p99:.1f} ms | {cpu:.2f} ms | {share:.0%}{missed} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("served", nargs="?", choices=["cold"], help="only serve cold bubblewrap, as the benchmark does")
    if parser.parse_args().served:
        return uvloop.run(serve_cold())
    measure_and_write()


def measure_and_write() -> None:
    """The table of all systems, printed and in results/serve.md."""
    with server("-m", "fastgrpo_sandbox", "serve", "--port", "0") as url, server(__file__, "cold") as cold_url:
        found = uvloop.run(measure(url, cold_url))
    lines = [
        "# Jails over HTTP",
        "",
        f"`python bench/bench_serve.py`, {datetime.now(UTC):%Y-%m-%d}; {shared_machine(LOAD_BEFORE)} Client, server "
        f"and jails share these cores. Medians of {ROUNDS} rounds of a trivial job, the systems taking turns.",
        "",
        *table(found),
        "",
    ]
    (HERE / "results" / "serve.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
