"""A whole GRPO step beside TRL 1.16's GRPOTrainer, one after the other on one GPU, or together on two.

    python bench/bench_trl.py [--size 1.5b] [--parts step,lean] [--together] [--save FILE]

Both: random bf16 weights of the shape `--size`, 64 prompts x 8 completions, 512 and 1,024 tokens, a reward that costs
nothing, loss dapo, no KL, vLLM colocated with a KV cache that holds all sequences of 1.5 B on an H100 (`--kv-gib`,
`--kv-share`). Ours (`bench_engine.py --parts`) keeps fp32 master weights and moments. TRL trains pure bf16 weights,
batch 8, sdpa, with vLLM's sleep mode: three steps with gradient checkpointing (its default), then one without. The
first step of each is left out.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from engine_setup import MemoryPeaks, Workload, emit, report, run_child, save, saved_model
from model_shapes import CUDA, GIB, SHAPES, named, synchronize

STEPS = 3
BATCH = 8


class Phases:
    """Seconds and peaks of TRL's step: its weight sync and generation are timed by wrapping the two methods."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.memory, self.seconds = trainer, MemoryPeaks(), defaultdict[str, float](float)
        for name in ("sync_weights", "generate"):
            setattr(trainer.vllm_generation, name, self._timed(name, getattr(trainer.vllm_generation, name)))

    def _timed(self, name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start, self.memory.phase = time.perf_counter(), "generate"
            result = method(*args, **kwargs)
            synchronize()
            self.seconds[name] += time.perf_counter() - start
            self.memory.phase = "train"
            return result

        return call

    def begin(self) -> None:
        """A step begins."""
        synchronize()
        self.seconds.clear()
        self.memory.take()
        self.start = time.perf_counter()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

    def end(self, number: int, setting: str) -> None:
        """A step ended: its numbers as a line of JSON."""
        synchronize()
        total = time.perf_counter() - self.start
        allocator = torch.cuda.max_memory_allocated() / GIB if CUDA else float("nan")
        numbers = dict(self.seconds) | {"driver": dict(self.memory.peaks), "allocator": allocator}
        emit("trl", numbers | {"number": number, "setting": setting, "total": total})


def run_trl(size: str, kv_share: float) -> None:
    """Train with TRL and print one line of JSON for each step after the first."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    work, draw = Workload(size), random.Random(0)
    per_step = work.sequences // BATCH

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS:
                trainer.model.gradient_checkpointing_disable()
                trainer.args.gradient_checkpointing = False
            phases.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            on = trainer.args.gradient_checkpointing
            phases.end(state.global_step, "checkpointing" if on else "no checkpointing")

    with saved_model(size) as folder, tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=per_step,
            num_generations=work.group,
            max_completion_length=work.completion_tokens,
            generation_kwargs={"ignore_eos": True},
            use_vllm=True,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=kv_share,
            vllm_max_model_length=work.max_model_len,
            vllm_enable_sleep_mode=CUDA,
            model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "sdpa"},
            beta=0.0,
            loss_type="dapo",
            max_steps=STEPS + 1,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            bf16=CUDA,
            use_cpu=not CUDA,
        )
        table = InMemoryTable.from_pydict({"prompt": [work.text(draw) for _ in range(work.prompts * (STEPS + 1))]})
        trainer = GRPOTrainer(
            model=folder,
            reward_funcs=lambda completions, **_: [float(number % 2) for number in range(len(completions))],
            args=config,
            # A fingerprint of its own: computing one fails with some versions of pyarrow.
            train_dataset=Dataset(table, fingerprint="prompts"),
            callbacks=[Clock()],
        )
        phases = Phases(trainer)
        trainer.train()


def run_children(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both libraries, one after the other on the first GPU, or together on the first two."""
    here = Path(__file__).parent
    ours = [str(here / "bench_engine.py"), "--size", options.size, "--parts", options.parts]
    ours += ["--kv-gib", str(options.kv_gib)]
    theirs = [__file__, "--size", options.size, "--only-trl", "--kv-share", str(options.kv_share)]
    with ThreadPoolExecutor(2 if options.together else 1) as threads:
        runs = [
            threads.submit(run_child, [sys.executable, *command], os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)})
            for command, gpu in ((ours, 0), (theirs, int(options.together)))
        ]
        return [values for run in runs for values in run.result()]


def compare(found: list[dict[str, Any]]) -> None:
    """Ours over TRL's, in time and memory; the mean of the steps after the first."""
    timed = {part: [line for line in found if line["name"] == part] for part in ("step", "recompute", "lean")}
    ours = {part: _ours(steps, part) for part, steps in timed.items() if len(steps) > 1}
    for setting in ("checkpointing", "no checkpointing"):
        steps = [s for s in found if s["name"] == "trl" and s["setting"] == setting and s["number"] > 1]
        if not steps:
            report(f"TRL, {setting}", "no step timed")
            continue
        trl, peak = _mean(steps), max(steps[-1]["driver"].values())
        rest = trl["total"] - trl["generate"] - trl["sync_weights"]
        phases = f"generate {trl['generate']:.1f} + sync {trl['sync_weights']:.2f} + rest {rest:.1f}"
        report(f"TRL, {setting}, s a step ({len(steps)} timed)", f"{trl['total']:.1f} = {phases}")
        report("  peak memory, GiB: generating, training (driver)", _peaks(steps[-1]))
        report("  peak of torch's allocator, GiB", f"{steps[-1]['allocator']:.1f}")
        for part, mean in ours.items():
            ratio = f"{mean['peak'] / peak:.2f}" if peak else "-"
            report(f"  ours ({part}) / TRL: time, peak memory", f"{mean['total'] / trl['total']:.3f}, {ratio}")


def _ours(steps: list[dict[str, Any]], part: str) -> dict[str, float]:
    ours = _mean(steps[1:]) | {"peak": max(steps[-1]["driver"].values())}
    phases = f"generate {ours['generate']:.1f} + train {ours['train']:.1f} + rest {ours['rest']:.2f}"
    report(f"ours ({part}), s a step", f"{ours['total']:.1f} = {phases}")
    report("  peak memory, GiB: generating, training (driver)", _peaks(steps[-1]))
    return ours


def _mean(steps: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name, value in steps[0].items() if isinstance(value, float)]
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}


def _peaks(step: dict[str, Any]) -> str:
    return f"{step['driver'].get('generate', 0):.1f}, {step['driver'].get('train', 0):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--parts", default="step,lean", help="parts of bench_engine.py that the other process runs")
    parser.add_argument("--kv-gib", type=float, default=16.0, help="our vLLM's KV cache")
    parser.add_argument("--kv-share", type=float, default=0.3, help="TRL's vllm_gpu_memory_utilization")
    parser.add_argument("--together", action="store_true", help="at the same time, on two GPUs of one host")
    parser.add_argument("--only-trl", action="store_true")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    if options.only_trl:
        return run_trl(options.size, options.kv_share)
    compare(run_children(options))
    if options.save:
        save(options.save, f"A GRPO step beside TRL, {named(options.size)}, one GPU")


if __name__ == "__main__":
    main()
