"""Where the time of a decoding step goes, and what it is without each of the things that the project changes in vLLM.

    python bench/bench_generation.py [--size 1.5b] [--variants worker,worker-unsteady,worker-unspared]

512 sequences of 512 + 256 tokens; `--sequences` and `--tokens` have others decoded. Each variant is an engine in a
process of its own that has the kernels launched in a further one, as `engine.process` own does on a GPU: what is timed
is what its scheduler's process does, and a last turn says what the worker's does, with its profile, and how long the
GPU has nothing to do. `worker` is as the project starts vLLM, `worker-unsteady` without `steady_decoding.py`,
`worker-unspared` without anything that is taken out of vLLM's Python. `waiting` is what the host waits for the worker:
where it is near 0, Python is the limit and not the GPU. Without a GPU all is this thread's CPU time. `worker-two` has
two steps in flight, as vLLM has, where the project has three (on a CPU there is one). `worker-attention` has vLLM's own
attention, which reads a prompt's keys for each of its completions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import fmean
from typing import Any

from engine_setup import Workload, report, saved_model
from model_shapes import CUDA, SHAPES, chosen
from transformers import AutoTokenizer
from worker_watch import begin, begin_profile, clock, end, end_profile

from fastgrpo.engine import engine, vllm_patches
from fastgrpo.engine.completion import Completion
from fastgrpo.engine.guards import replaced


def nothing(*_: Any) -> None:
    """In the place of a patch that is left out."""


def with_vllms_attention(options: dict[str, Any]) -> Any:
    return vllm_patches.start_vllm(options | {"worker_extension_cls": "vllm_attention.Worker"})


UNSTEADY = (vllm_patches, "spare_steady_steps", nothing)
# What a variant has in the place of what the project does: (module, name, value).
VARIANTS: dict[str, Sequence[tuple[Any, str, Any]]] = {
    "worker": [],
    "worker-unsteady": [UNSTEADY],
    "worker-unspared": [
        UNSTEADY,
        (vllm_patches, "idle_inside_blocks", nothing),
        (vllm_patches, "keep_own_logprobs_only", nothing),
    ],
    "worker-two": [(vllm_patches, "_one_more", lambda own, config: own(config))],
    "worker-attention": [(engine, "start_vllm", with_vllms_attention)],
}
# Steps of a worker's process at the start, and as many at the end, that are not timed.
UNTIMED = 32
# Steps whose kernels are recorded.
WATCHED = 64


class HostClock:
    """Seconds of the host in each part of vLLM's step; reaches into vLLM as far as its parts have names."""

    def __init__(self, bare_engine: Any) -> None:
        self.seconds = defaultdict[str, float](float)
        llm: Any = bare_engine._llm
        core = llm.engine_core.engine_core
        report("short loops where requests only decode", "yes" if "schedule" in vars(core.scheduler) else "no")
        self._wrap(core.scheduler, "schedule", "schedule")
        self._wrap(core.scheduler, "update_from_output", "update")
        self._wrap(core.model_executor, "execute_model", "launch")
        self._wrap(core.model_executor, "sample_tokens", "launch", waits=True)
        self._wrap(llm.output_processor, "process_outputs", "outputs")

    def _wrap(self, owner: Any, name: str, part: str, *, waits: bool = False) -> None:
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = method(*args, **kwargs)
            self.seconds[part] += clock() - start
            if waits and hasattr(result, "result"):
                self._wrap(result, "result", "waiting")
            return result

        setattr(owner, name, call)

    def line(self, total: float, steps: int) -> str:
        """Milliseconds of a step, by part, of `total` seconds."""
        parts = dict(self.seconds) | {"other": total - sum(self.seconds.values())}
        self.seconds.clear()
        return ", ".join(f"{name} {1e3 * value / steps:.1f}" for name, value in parts.items())


def steps_of(started: engine.Engine, count: int) -> float:
    """Seconds of `count` steps."""
    start = clock()
    for _ in range(count):
        started.step()
    return clock() - start


def worker(folder: str, work: Workload) -> None:
    """The bare engine's speeds where a further process has the worker, and the parts of what this one does a token."""
    options: dict[str, Any] = {"dtype": "bfloat16" if CUDA else "float32", "kv_cache_gib": 16.0 if CUDA else 0.4}
    options |= {"max_model_len": work.max_model_len, "max_num_seqs": work.sequences}
    started = engine.Engine(folder, worker_process=True, **options)
    prompts, host = work.prompt_ids(AutoTokenizer.from_pretrained(folder).encode), HostClock(started)
    # Prompts, and whatever finishes, are not timed: these steps decode a token of each sequence.
    steps = work.completion_tokens - 2 * UNTIMED
    for turn in ("warm-up", "first", "second", "watched", "profiled"):
        for key, prompt in enumerate(prompts):
            started.submit(key, prompt, max_tokens=work.completion_tokens, seed=key)
        prompts_s = steps_of(started, UNTIMED)
        host.seconds.clear()
        if turn in ("watched", "profiled"):
            in_the_worker(started, steps, profiled=turn == "profiled")
        else:
            seconds = steps_of(started, steps)
            speed = f"{work.sequences * steps / seconds:,.0f} (ms a token: {host.line(seconds, steps)})"
            report(f"bare engine with a worker's process, {turn}: tokens/s while all decode", speed)
            report(f"  its first {UNTIMED} steps, with the prompts, s", f"{prompts_s:.2f}")
        finished = []
        while started.busy:
            finished += started.step()
    against_prompts(started, prompts, finished[:: work.group])
    started.close()


def in_the_worker(started: engine.Engine, steps: int, *, profiled: bool) -> None:
    """What the worker's process does in some of the next `steps`: those in the middle stand for all, since attention
    takes longer from token to token."""
    watched, rpc = min(steps, WATCHED), started._llm.collective_rpc
    steps_of(started, (steps - watched) // 2)
    rpc(begin_profile if profiled else begin)
    steps_of(started, watched)
    if profiled:
        return print(rpc(end_profile)[0])
    runner, parts = rpc(end)[0]
    line = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    report(f"the worker's process, {runner}, ms a token", line)


def against_prompts(started: engine.Engine, prompts: Sequence[list[int]], finished: Sequence[Completion]) -> None:
    """How far the logprobs of decoded tokens are from those of the same tokens read as a prompt."""
    known = started.score([prompts[done.key] + done.token_ids for done in finished])
    errors = [
        abs(decoded - scored)
        for done, scores in zip(finished, known, strict=True)
        for decoded, scored in zip(done.logprobs, scores[-len(done.token_ids) :], strict=True)
    ]
    report("decoded logprobs against those of the same tokens as a prompt, nats", f"{fmean(errors):.4f} in the mean")


def run(size: str, variant: str, sequences: int | None, tokens: int | None) -> None:
    """One variant in this process."""
    work = Workload(size)
    work.prompts = (sequences or work.sequences) // work.group
    # A quarter of it is decoded.
    work.completion_tokens = 4 * tokens if tokens else work.completion_tokens
    work.max_model_len = work.prompt_tokens + work.completion_tokens + 32
    with saved_model(size) as folder, ExitStack() as stack:
        for change in VARIANTS[variant]:
            stack.enter_context(replaced(*change))
        worker(folder, work.shorter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--tokens", type=int, help="decoded for each")
    parser.add_argument("--only", action="store_true", help="the one variant, in this process")
    options = parser.parse_args()
    if options.tokens is not None and options.tokens <= 2 * UNTIMED:
        parser.error(f"--tokens must be above {2 * UNTIMED}: the first and last {UNTIMED} are not timed")
    variants = chosen(parser, "--variants", options.variants, VARIANTS)
    if options.only:
        return run(options.size, options.variants, options.sequences, options.tokens)
    given = [f"--{name}={value}" for name in ("size", "sequences", "tokens") if (value := getattr(options, name))]
    for variant in variants:
        report(variant, "")
        subprocess.run([sys.executable, __file__, "--variants", variant, "--only", *given], check=False)


if __name__ == "__main__":
    main()
