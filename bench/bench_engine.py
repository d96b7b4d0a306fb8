"""The colocated engine on one GPU: is the sync zero-copy and right, and what do its parts and a GRPO step cost.

    python bench/bench_engine.py [--size 1.5b] [--parts check,memory,step,workflows] [--save FILE]
    python bench/bench_engine.py --parts recompute,lean

Random weights of the shape `--size`. `check`: parity between vLLM and the trainer before and after
optimizer steps, bytes copied. `memory`: what sleep frees. `step`: whole GRPO steps of 64 prompts x 8 completions (512
and 1,024 tokens) with a trivial reward. `recompute`: the same with the optimizer's state on the host and MLPs computed
again in backward. `lean`: whole layers, by gradient checkpointing. `workflows`: what 512 real jailed workflows add to a
step. `bench_train.py` has forward and backward alone.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import torch
import uvloop
from engine_setup import Setup, Trivial, Workload, emit, release_memory, report, save, saved_model, used_gib
from loop_setup import run_steps
from model_shapes import CUDA, GIB, PEAK_FLOPS, SHAPES, chosen, named, timed

from fastgrpo.config import Config, Grpo
from fastgrpo.flow.problems.loading import load_problems
from fastgrpo.flow.task import open_environment
from fastgrpo.flow.teachers import ScriptedTeacher
from fastgrpo.flow.types import Problem
from fastgrpo.policy.fused_layers import fuse_layers
from fastgrpo.policy.model import Policy
from fastgrpo.rollouts.environment import Environment
from fastgrpo.training.advantage import to_samples
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.training.update import update
from fastgrpo.types import Rollout


def check(setup: Setup) -> None:
    """Parity before and after steps; a sync copies nothing after the first."""
    first = setup.first_sync
    report("first sync: GiB copied, s", f"{first.bytes_copied / GIB:.2f}, {first.seconds:.3f}")
    report("parity before steps, nats mean / max", f"{first.parity_mean:.4f} / {first.parity_max:.4f}")
    _against_fp32(setup)
    problems, environment = setup.work.problems(0)
    groups = setup.collect(problems[:1], environment, 0)
    samples = to_samples(groups, Grpo())
    optimizer = AdamW(setup.policy.model.parameters(), AdamWOptions(lr=1e-4))
    before = setup.engine.score([samples[0].token_ids])[0]
    reports = []
    for _ in range(3):
        update(setup.policy, optimizer, samples, Grpo(), budget=setup.work.micro_batch_tokens)
        reports.append(timed(lambda: setup.engine.sync(setup.policy))[0])
    after = setup.engine.score([samples[0].token_ids])[0]
    moved = sum(abs(a - b) for a, b in zip(before, after, strict=True)) / len(after)
    worst = max(reports, key=lambda r: r.parity_mean)
    report("parity after 3 steps, nats mean / max", f"{worst.parity_mean:.4f} / {worst.parity_max:.4f}")
    report("moved by the 3 steps, nats mean", f"{moved:.4f}")
    assert all(r.bytes_copied == 0 for r in reports)
    assert moved > 5 * worst.parity_mean or not CUDA, "the steps must be visible above the parity noise"


def _against_fp32(setup: Setup) -> None:
    """How far both are from the same weights in fp32: parity cannot be better than bf16 itself."""
    exact = Policy(copy.deepcopy(setup.policy.model).float(), setup.policy.tokenizer)
    sequences = torch.randint(2048, (4, 48), generator=torch.Generator().manual_seed(2)).tolist()
    truth = torch.cat(exact.logprobs(sequences)).cpu()
    theirs = torch.tensor([logprob for scores in setup.engine.score(sequences) for logprob in scores])
    ours = torch.cat(setup.policy.logprobs(sequences)).cpu()
    off = [float((logprobs - truth).abs().mean()) for logprobs in (theirs, ours)]
    report("distance from fp32, nats mean: vLLM, trainer", f"{off[0]:.4f}, {off[1]:.4f}")


def memory(setup: Setup) -> None:
    """What sleep frees, and that generation is right after it; the syncs of an engine that has slept."""
    if CUDA:
        torch.cuda.empty_cache()
    awake = used_gib()
    _, slept = timed(setup.engine.sleep)
    asleep = used_gib()
    _, woke = timed(setup.engine.wake)
    report("memory awake -> asleep, GiB", f"{awake:.1f} -> {asleep:.1f}")
    report("sleep, wake, s", f"{slept:.3f}, {woke:.3f}")
    report("parity after wake, nats mean", f"{setup.engine.sync(setup.policy).parity_mean:.4f}")
    _syncs(setup)


def _syncs(setup: Setup) -> None:
    """What a weight sync costs: after sleep, as in the loop, and with cached prefixes to forget."""
    prompt = [list(range(setup.work.prompt_tokens))]
    asleep, awake = [], []
    for _ in range(20):
        setup.engine.sleep()
        setup.engine.wake()
        asleep.append(setup.engine.sync(setup.policy))
        setup.engine.score(prompt)
        awake.append(setup.engine.sync(setup.policy))
    copied = sum(done.bytes_copied for done in asleep + awake)
    report("sync after sleep: bytes copied, median ms", f"{copied}, {_ms([done.seconds for done in asleep])}")
    report("  with prefixes to forget, ms", _ms([done.seconds for done in awake]))
    report("  canary, ms", _ms([done.check_seconds for done in asleep]))


def _ms(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):.3f}"


def step(setup: Setup) -> None:
    """Whole GRPO steps of the loop."""
    _steps(setup, "step")


def recompute(setup: Setup) -> None:
    """Less memory for little time: the optimizer's state in the host's memory, MLPs computed again in backward."""
    fuse_layers(setup.policy.model.base_model, recompute_mlp=True)
    try:
        _steps(setup, "recompute", "--model.offload_optimizer=true")
    finally:
        fuse_layers(setup.policy.model.base_model)


def lean(setup: Setup) -> None:
    """The least memory: the optimizer's state in the host's memory, layers computed again in backward."""
    setup.policy.gradient_checkpointing(True)
    try:
        _steps(setup, "lean", "--model.offload_optimizer=true")
    finally:
        setup.policy.gradient_checkpointing(False)


def _steps(setup: Setup, name: str, *keys: str) -> None:
    # The last part's memory would count in this one's peak.
    release_memory()
    for number, row in enumerate(run_steps(setup, keys, 3)):
        numbers = _numbers(row)
        report(
            f"GRPO {name} {number}, {setup.work.micro_batch_tokens} tokens a micro-batch, s",
            f"{numbers['total']:.1f} = generate {numbers['generate']:.1f} "
            f"({setup.work.generated / numbers['generate']:,.0f} tokens/s) + train {numbers['train']:.1f} "
            f"(MFU {row['flop'] / numbers['train'] / PEAK_FLOPS:.1%}) + rest {numbers['rest']:.2f}; "
            f"sync {1e3 * row['sync_seconds']:.2f} ms; parity {row['sampler_parity']:.4f} nats; "
            f"allocator peak {numbers['allocator']:.1f} GiB",
        )
        driver = {phase: row.get(f"peak/{phase}", 0.0) for phase in ("generate", "train", "sync")}
        emit(name, numbers | {"driver": driver})


def _numbers(row: dict[str, float]) -> dict[str, float]:
    """Seconds of a step's parts and the peak of torch's allocator, GiB."""
    total = row["seconds/step"]
    generate = row["seconds/generate"] + row["seconds/execute"]
    train = row["seconds/forward_backward"] + row["seconds/optimizer"]
    seconds = {"total": total, "generate": generate, "train": train, "rest": total - generate - train}
    return seconds | {"allocator": row.get("peak/allocator", float("nan"))}


class Scripted(Trivial):
    """The workflow task, with a scripted workflow in the place of each completion of the random policy."""

    def __init__(self, texts: dict[str, str], environment: Any) -> None:
        super().__init__(texts)
        self.environment, self.teacher = environment, ScriptedTeacher()
        self.executions: list[Any] = []

    async def execute(self, problem: Problem, completion: str, seed: int) -> Any:
        written = await self.teacher.write(problem, [], seed)
        self.executions.append(await self.environment.execute(problem, written, seed))
        return self.executions[-1]

    def results(self, problem: Any, rollouts: list[Rollout]) -> Any:
        return self.environment.results(problem, rollouts)


def workflows(setup: Setup) -> None:
    """The rollout phase with the trivial reward and with real jailed workflows, in turn."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_workflows(setup))


async def _workflows(setup: Setup) -> None:
    config, work = Config(), setup.work
    problems = load_problems(config)[0][: work.prompts]
    async with open_environment(config) as environment:
        _, trivial = work.problems(7)
        texts = dict(zip((problem.id for problem in problems), trivial.texts.values(), strict=True))
        scripted = Scripted(texts, environment)
        seconds: dict[str, list[float]] = {"trivial": [], "jailed": []}
        for number in range(2):
            for name, task in (("trivial", Trivial(texts)), ("jailed", scripted)):
                seconds[name].append(await _rollouts(setup, task, problems, number))
                setup.engine.sync(setup.policy)
    done = scripted.executions
    statuses = {status: sum(e.status == status for e in done) for status in {e.status for e in done}}
    extra = min(seconds["jailed"]) - min(seconds["trivial"])
    report(f"rollouts with the trivial reward, of {len(done) // 2} jailed workflows, s", str(_rounded(seconds)))
    report("extra seconds by the workflows (best of two)", f"{extra:.2f}; {statuses}")
    report("  pass rate, operator calls", f"{_mean(done, 'pass_rate'):.2f}, {sum(len(e.calls) for e in done) // 2}")


async def _rollouts(setup: Setup, task: Environment, problems: list[Problem], seed: int) -> float:
    start = time.perf_counter()
    await setup.rollouts(problems, task, seed)
    return time.perf_counter() - start


def _rounded(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 2) for value in values] for name, values in seconds.items()}


def _mean(executions: list[Any], name: str) -> float:
    return sum(getattr(execution, name) for execution in executions) / len(executions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--parts", default="check,memory,step,workflows")
    parser.add_argument("--kv-gib", type=float, default=16.0, help="vLLM's KV cache; all sequences of 1.5b need 15")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    parts: dict[str, Callable[[Setup], None]] = {
        "check": check,
        "memory": memory,
        "step": step,
        "recompute": recompute,
        "lean": lean,
        "workflows": workflows,
    }
    names, failed = chosen(parser, "--parts", options.parts, parts), 0
    with saved_model(options.size) as folder:
        setup = Setup(folder, Workload(options.size), kv_gib=options.kv_gib)
        report("engine start, s", f"{setup.start_seconds:.1f}")
        with closing(setup.engine):
            for name in names:
                try:
                    parts[name](setup)
                except Exception:
                    failed = 1
                    report(name, "FAILED")
                    traceback.print_exc()
    if options.save:
        save(options.save, f"The engine, {named(options.size)}, one GPU")
    return failed


if __name__ == "__main__":
    sys.exit(main())
