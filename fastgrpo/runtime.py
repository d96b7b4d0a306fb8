"""What the programs stand on: problems, the jail pool with its workers, the engine; opened once, closed in order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from pathlib import Path
from typing import Any

import msgspec
import torch

from fastgrpo.config import Config, Workers, open_folder
from fastgrpo.engine.engine import Engine
from fastgrpo.errors import UserError
from fastgrpo.flow import problems as data
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.limits import WorkflowLimits
from fastgrpo.flow.workers.openai import OpenAIWorker
from fastgrpo.flow.workers.protocol import Worker
from fastgrpo.flow.workers.simulated import SimulatedWorker
from fastgrpo.ranks.collectives import gather_all, leads_replica, rank_and_world
from fastgrpo.record.log import RunLog
from fastgrpo.rollouts.rollouts import Sampling
from fastgrpo.types import Problem
from fastgrpo_sandbox import Limits, SandboxPool, SandboxUnavailable


def run_async(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a program's coroutine under uvloop where it is installed."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = None  # type: ignore[assignment]
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


def load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems; the split follows `config.seed`."""
    return data.split(data.load(config.data.dataset), held_out=config.data.held_out, seed=config.seed)


def open_log(config: Config, *, resume: bool) -> RunLog:
    """The run's folder and its log; the ranks after the first write nothing."""
    first = rank_and_world()[0] == 0
    folder = open_folder(config, resume=resume) if first else None
    gather_all(None, "the run's folder")
    return RunLog(folder)


def of_replica(opened: AbstractAsyncContextManager[Any], config: Config) -> AbstractAsyncContextManager[Any]:
    """`opened` on the rank that runs its replica's rollouts; None on the others, which need no environment."""
    return opened if leads_replica(config.engine.tensor_parallel) else nullcontext()


@asynccontextmanager
async def open_environment(config: Config, log: RunLog | None = None) -> AsyncIterator[WorkflowEnvironment]:
    """The workflow task: a jail pool and the workers that answer its operators; `log` shows the jails in flight."""
    sandbox = config.sandbox
    limits = Limits(
        wall_s=sandbox.wall_s,
        cpu_s=sandbox.cpu_s,
        memory_mb=sandbox.memory_mb,
        processes=sandbox.processes,
        output_bytes=sandbox.output_bytes,
    )
    async with _pool(sandbox.cells, limits) as pool:
        worker = open_worker(config.workers, pool, seed=config.seed)
        watcher = asyncio.create_task(_watch(pool, log)) if log else None
        try:
            yield WorkflowEnvironment(
                pool,
                worker,
                weights=config.reward,
                limits=WorkflowLimits(
                    at_once=sandbox.workflows,
                    # Above the endpoint's own deadline, which is tried again.
                    call_s=1.5 * config.workers.timeout_s,
                    session=msgspec.structs.replace(WorkflowLimits().session, wall_s=sandbox.workflow_s),
                ),
                instruction=config.data.instruction,
            )
        finally:
            if watcher:
                watcher.cancel()
            await worker.aclose()


@asynccontextmanager
async def _pool(cells: int, limits: Limits) -> AsyncIterator[SandboxPool]:
    async with AsyncExitStack() as stack:
        try:
            pool = await stack.enter_async_context(SandboxPool(cells=cells or None, limits=limits))
        except SandboxUnavailable as error:
            raise UserError(str(error)) from error
        yield pool


async def _watch(pool: SandboxPool, log: RunLog) -> None:
    while True:
        log.status(jails=pool.stats().running)
        await asyncio.sleep(0.25)


def open_worker(config: Workers, pool: SandboxPool, *, seed: int) -> Worker:
    """Who answers the operators, as configured."""
    if config.kind == "simulated":
        return SimulatedWorker(pool, seed=seed, latency_scale=config.latency_scale)
    return OpenAIWorker(config)


def sampling_of(config: Config) -> Sampling:
    """How the policy's completions are drawn in training."""
    return Sampling(
        max_new_tokens=config.grpo.max_new_tokens,
        max_model_len=config.engine.max_model_len,
        temperature=config.grpo.temperature,
        rounds=config.grpo.rounds,
    )


def share_cores() -> None:
    """Without a GPU: half the cores for training, as many as the engine takes (`Engine`), since both work at once."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))


def policy_device() -> torch.device:
    """This process's GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def policy_dtype(config: Config) -> torch.dtype:
    """The type of the weights, in vLLM and in the trainer alike."""
    if config.engine.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.engine.dtype)


@contextmanager
def open_engine(config: Config, model: Path, *, kv_cache_gb: float | None = None) -> Iterator[Engine]:
    """vLLM in this process, with `model`'s weights; `kv_cache_gb` as planned, None = what the configuration says.

    Raises UserError with vLLM's reason where it refuses model or settings, as a length that the model does not have.
    """
    try:
        engine = Engine(
            model,
            dtype=str(policy_dtype(config)).removeprefix("torch."),
            max_model_len=config.engine.max_model_len,
            max_num_seqs=config.engine.max_num_seqs,
            kv_cache_gb=kv_cache_gb or (None if torch.cuda.is_available() else config.engine.kv_cache_gb),
            enforce_eager=config.engine.enforce_eager,
            seed=config.seed,
            parity_limit=config.engine.parity_threshold,
            step_timeout_s=config.engine.step_timeout_s,
            tensor_parallel=config.engine.tensor_parallel,
        )
    except ValueError as error:
        # pydantic's errors begin with a line of their own.
        reason = str(error).rpartition("Value error, ")[2].strip().splitlines()[0]
        raise UserError(f"vLLM does not start with {model} and the [engine] settings: {reason}") from error
    try:
        yield engine
    finally:
        engine.close()
