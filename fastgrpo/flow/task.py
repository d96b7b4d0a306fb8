"""The tasks of this folder, workflows and plain programs, as a run opens them: jails, workers, environment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from fastgrpo.config import Config, Workers
from fastgrpo.errors import UserError
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.jails import open_pool
from fastgrpo.flow.programs import ProgramEnvironment
from fastgrpo.flow.prompt import query_prompt
from fastgrpo.flow.types import Problem, Worker, WorkflowLimits
from fastgrpo.flow.workers.openai import OpenAIWorker
from fastgrpo.flow.workers.simulated import SKILLS, SimulatedWorker
from fastgrpo.record.log import RunLog
from fastgrpo_sandbox import SandboxPool


@asynccontextmanager
async def open_environment(config: Config, log: RunLog | None = None) -> AsyncIterator[WorkflowEnvironment]:
    """The workflow task: a jail pool and the workers that answer its operators; `log` shows the jails in flight.

    Raises UserError where jails or workers cannot be had, or no worker is called `reward.judge`.
    """
    require_judge(config)
    sandbox = config.sandbox
    async with open_pool(sandbox, log) as pool:
        worker = open_worker(config.workers, pool, seed=config.seed)
        try:
            yield WorkflowEnvironment(
                pool,
                worker,
                weights=config.reward,
                limits=WorkflowLimits(
                    at_once=sandbox.workflows,
                    # Above the endpoint's own deadline, after which it is tried again.
                    call_s=1.5 * config.workers.timeout_s,
                    session=msgspec.structs.replace(WorkflowLimits().session, wall_s=sandbox.workflow_s),
                ),
                instruction=config.data.instruction,
            )
        finally:
            await worker.aclose()


@asynccontextmanager
async def open_programs(config: Config, log: RunLog | None = None) -> AsyncIterator[ProgramEnvironment]:
    """The plain code task with a jail pool of its own; `log` shows the jails in flight."""
    async with open_pool(config.sandbox, log) as pool:
        yield ProgramEnvironment(pool)


def prompt(config: Config, problem: Problem) -> str:
    """What the policy reads of `problem`, by the configuration alone."""
    return query_prompt(problem, config.data.instruction, worker_names(config.workers))


def require_judge(config: Config) -> None:
    """Raise UserError where no worker is called `reward.judge`."""
    names = worker_names(config.workers)
    if config.reward.judge and config.reward.judge not in names:
        raise UserError(f"reward.judge = {config.reward.judge!r} is no worker: choose one of {', '.join(names)}")


def worker_names(config: Workers) -> tuple[str, ...]:
    """What workflows call the workers, as configured."""
    return tuple(SKILLS if config.kind == "simulated" else config.by_name())


def open_worker(config: Workers, pool: SandboxPool, *, seed: int) -> Worker:
    """Who answers the operators, as configured."""
    if config.kind == "simulated":
        return SimulatedWorker(pool, seed=seed, latency_scale=config.latency_scale)
    return OpenAIWorker(config)
