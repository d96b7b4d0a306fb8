"""The training loop, `fastgrpo.train.improve`, as the benchmarks run it: the workload, one run, its metrics."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from engine_setup import Endless, MemoryPeaks, Setup, Workload, start_peak
from model_shapes import CUDA, GIB

from fastgrpo.cli import parse
from fastgrpo.config import Config
from fastgrpo.engine.engine import Engine
from fastgrpo.policy.chat import Chat
from fastgrpo.program import run_async
from fastgrpo.record.json_lines import read_lines
from fastgrpo.record.log import RunLog
from fastgrpo.run_folder import open_folder
from fastgrpo.train import improve
from fastgrpo.training.learner import Learner
from fastgrpo.training.memory import Item, MemoryPlan


def settings(work: Workload, model: str, runs: str, steps: int, replicas: int = 1) -> list[str]:
    """The workload of `replicas` as a command line."""
    values = {
        "model.path": model,
        "runs": runs,
        "engine.max_model_len": work.max_model_len,
        "engine.max_num_seqs": work.sequences,
        "engine.kv_cache_gib": 0.2,
        # Random weights are further from their bf16 rounding than a model's.
        "engine.parity_threshold": 0.2,
        "grpo.steps": steps,
        "grpo.prompts_per_step": replicas * work.prompts,
        "grpo.group_size": work.group,
        "grpo.max_new_tokens": work.completion_tokens,
        "grpo.micro_batch_tokens": work.micro_batch_tokens,
        "checkpoint.every": steps + 1,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def metrics(folder: Path) -> list[dict[str, float]]:
    """The run's numbers, a row for each step."""
    rows = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in rows]


def run_steps(setup: Setup, keys: Sequence[str], steps: int) -> list[dict[str, float]]:
    """The metrics of `steps` steps of the loop on the setup's engine and policy; `keys` overrides its settings.

    `peak/<phase>` is the driver's count of memory in GiB, `peak/allocator` that of torch in training.
    """
    work, peaks = setup.work, MemoryPeaks()
    with tempfile.TemporaryDirectory() as runs:
        config = parse([*settings(work, setup.folder, runs, steps), *keys], program="the benchmark").config
        problems, trivial = work.problems(0, steps * work.prompts)
        with PeakLog(open_folder(config, resume=False), peaks) as log:
            learner = open_learner(setup, config, peaks)
            run_async(lambda: improve(learner, trivial, problems, config, log))
        return metrics(config.folder)


def open_learner(setup: Setup, config: Config, peaks: MemoryPeaks) -> Learner:
    """A learner over the setup's engine and policy, with the cache and the micro-batches that the benchmark chose."""
    cache = Item("KV cache", int(setup.kv_gib * GIB), "lower --kv-gib")
    # It sleeps even where all fits at once: `Watched` tells the phases by that.
    sleeps = not config.grpo.max_lag
    plan = MemoryPlan((cache,), cache.size, setup.kv_gib, config.grpo.micro_batch_tokens, engine_sleeps=sleeps)
    engine = cast(Engine, Watched(setup.engine, peaks, setup.kv_gib))
    return Learner(config, engine, setup.policy, Chat(setup.policy.tokenizer), None, plan)


class Watched(Endless):
    """An endless engine that tells `peaks` what goes on: the loop trains between its sleep and its wake."""

    def __init__(self, engine: Engine, peaks: MemoryPeaks, kv_gib: float) -> None:
        super().__init__(engine)
        self._peaks, self._kv_gib, self._counted = peaks, kv_gib, 0.0

    def submit(self, key: int, prompt_ids: Sequence[int], **sampling: Any) -> None:
        self._peaks.phase = "generate"
        super().submit(key, prompt_ids, **sampling)

    def sleep(self) -> None:
        self._engine.sleep()
        self._peaks.phase, self._counted = "train", start_peak(self._kv_gib)

    def wake(self) -> None:
        self._peaks.phase = "sync"
        if CUDA:
            self._peaks.peaks["allocator"] = torch.cuda.max_memory_allocated() / GIB - self._counted
        self._engine.wake()


class PeakLog(RunLog):
    """A run's log that adds the step's peaks of memory to its metrics."""

    def __init__(self, folder: Path, peaks: MemoryPeaks) -> None:
        super().__init__(folder, live=False)
        self._peaks = peaks

    def step(self, step: int, metrics: Mapping[str, float], *, waited_for: str = "") -> None:
        peaks = {f"peak/{name}": peak for name, peak in self._peaks.take().items()}
        super().step(step, {**metrics, **peaks}, waited_for=waited_for)
