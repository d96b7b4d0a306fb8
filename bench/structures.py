"""What each structure of workflow earns with the simulated worker, for each third of difficulty.

    python bench/structures.py [--samples 8] [--dataset humaneval]

Prints complexity, pass rate (share of hidden tests), reward, worker calls, what was spent in units of one call, and
simulated latency: the table by which the reward's weights and `Skill` were chosen. Structure must pay where problems
are hard and cost where they are easy. A group is one problem's samples, all of one structure: no diversity is earned.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from statistics import mean
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from fastgrpo.config import RewardWeights
from fastgrpo.flow.baselines import WORKFLOWS, completion
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.problems.files import load
from fastgrpo.flow.reward import group_rewards, spent_calls
from fastgrpo.flow.types import Execution, Problem
from fastgrpo.flow.workers.simulated import SimulatedWorker
from fastgrpo_sandbox import SandboxPool


class Row(NamedTuple):
    """Means of one structure over one third of the problems."""

    complexity: float
    pass_rate: float
    reward: float
    calls: float
    spent: float
    latency_s: float


def thirds(problems: list[Problem]) -> list[list[Problem]]:
    """Easiest, middle and hardest third."""
    order = sorted(problems, key=lambda problem: problem.difficulty)
    cut = len(order) // 3
    return [order[:cut], order[cut:-cut], order[-cut:]]


async def measure(
    environment: WorkflowEnvironment, problems: list[Problem], code: str, samples: int, weights: RewardWeights
) -> Row:
    """Means over `samples` runs of each problem. Raises RuntimeError where the jails fail."""

    async def group(problem: Problem) -> list[Execution]:
        runs = [environment.execute(problem, completion(code), seed) for seed in range(samples)]
        return list(await asyncio.gather(*runs))

    groups = await asyncio.gather(*map(group, problems))
    executions = [execution for group in groups for execution in group]
    if failed := [execution.error for execution in executions if execution.status != "ok"]:
        raise RuntimeError(f"{len(failed)} executions failed, the first with: {failed[0]}")
    return Row(
        mean(execution.complexity for execution in executions),
        mean(execution.pass_rate for execution in executions),
        mean(reward.total for group in groups for reward in group_rewards(group, weights) if reward),
        mean(execution.requests for execution in executions),
        mean(spent for group in groups for spent in spent_calls(group, weights.efficiency_by)),
        mean(sum(call.seconds for call in execution.calls) for execution in executions),
    )


async def main(dataset: str, samples: int) -> None:
    """Measure and print the table."""
    problems, weights, console = load(dataset), RewardWeights(), Console(width=150)
    async with SandboxPool() as pool:
        worker = SimulatedWorker(pool)
        environment = WorkflowEnvironment(pool, worker)
        start = time.perf_counter()
        await worker.prepare(problems)
        console.print(f"{len(problems)} problems, mutants ready after {time.perf_counter() - start:.1f} s")
        table = Table(title=f"simulated worker, {samples} samples a problem; easiest / middle / hardest third")
        for column in ("structure", "complexity", "pass rate", "reward", "calls", "spent", "latency s"):
            table.add_column(column, justify="left" if column == "structure" else "right")
        start = time.perf_counter()
        for name, code in WORKFLOWS.items():
            rows = [await measure(environment, third, code, samples, weights) for third in thirds(problems)]
            cells = [" / ".join(f"{value:.2f}" for value in column) for column in zip(*rows, strict=True)]
            table.add_row(name, *cells)
        console.print(table)
        count = len(problems) * samples * len(WORKFLOWS)
        console.print(f"{count / (time.perf_counter() - start):.0f} workflows/s, tests included; weights: {weights}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--dataset", default="humaneval")
    options = parser.parse_args()
    asyncio.run(main(options.dataset, options.samples))
