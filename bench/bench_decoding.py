"""Tokens/s decoded: the engine in this process, in its own, with a further one for the worker, and vLLM's AsyncLLM.

    python bench/bench_decoding.py [--size 1.5b] [--variants worker,vllm,own,shared] [--seconds 150] [--save FILE]

512 sequences of 512 + 256 tokens, 64 prompts, a logprob with each token; the same prompts and the same random weights
for all, one after another on one GPU. Each variant is a program of its own, ended after `--seconds`; one that fails
prints the end of its error and the others go on. `worker` is `engine.process` own on a GPU, `own` the same with one
process for scheduler and kernels, `shared` the engine inside the trainer's process, `vllm` its server's engine with
asynchronous scheduling. `held` has a thread of the calling process keep Python's lock, as rewards do.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine_setup import Setup, Workload, report, rows, save, saved_model, used_gib
from model_shapes import CUDA, SHAPES, timed

from fastgrpo.engine.engine import Engine
from fastgrpo.engine.engine_process import EngineProcess

VARIANTS: dict[str, Callable[..., Any]] = {
    "worker": partial(EngineProcess, worker_process=True),
    "vllm": lambda *_: None,
    "own": partial(EngineProcess, worker_process=False),
    "shared": Engine,
}
LINE = "ROW "


def workload(size: str) -> Workload:
    """What is decoded: on a CPU 32 sequences of 64 + 128 tokens."""
    work = Workload(size)
    work.completion_tokens = 256 if CUDA else 128
    work.max_model_len = work.prompt_tokens + work.completion_tokens + 32
    return work


def prompts_of(work: Workload, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The token ids of each sequence's prompt."""
    problems, environment = work.problems(1)
    encoded = [encode(environment.prompt(problem)) for problem in problems]
    return [prompt for prompt in encoded for _ in range(work.group)]


def generate(engine: Any, prompts: Sequence[list[int]], tokens: int) -> None:
    """Submit all and take what finishes until nothing is open."""
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt, max_tokens=tokens)
    finished = []
    while engine.busy:
        finished += engine.step()
    assert sum(len(completion.logprobs) for completion in finished) == len(prompts) * tokens


@contextmanager
def lock_held() -> Iterator[None]:
    """A thread that never waits: a half of this process's Python is gone."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def ours(folder: str, size: str, variant: str) -> None:
    """Speeds of the engine started as `variant`, and whether its weights are the policy's."""
    work = workload(size)
    setup = Setup(folder, work, engine=VARIANTS[variant])
    told(f"{variant}: engine start, s", f"{setup.start_seconds:.1f}")
    told(f"{variant}: parity, nats mean", f"{setup.first_sync.parity_mean:.4f}")
    prompts = prompts_of(work, setup.policy.tokenizer.encode)
    run = partial(generate, setup.engine, prompts, work.completion_tokens)
    speeds = []
    for _ in range(3):
        setup.engine.sync(setup.policy)
        speeds.append(work.generated / timed(run)[1])
    told(f"{variant}: tokens/s, the first one warms up", speed(speeds))
    setup.engine.sync(setup.policy)
    with lock_held():
        told(f"{variant}, held: tokens/s", speed([work.generated / timed(run)[1]]))
    shared_weights(setup, variant)
    setup.engine.close()


def shared_weights(setup: Setup, variant: str) -> None:
    """Change the weights in place, sleep and wake: what a sync copies and costs, and that vLLM has seen the change."""
    reports = [setup.engine.sync(setup.policy) for _ in range(5)]
    with torch.no_grad():
        for parameter in setup.policy.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.9)
    awake = used_gib()
    setup.engine.sleep()
    asleep = used_gib()
    setup.engine.wake()
    reports.append(setup.engine.sync(setup.policy))
    milliseconds = ", ".join(f"{1e3 * one.seconds:.2f}" for one in reports)
    told(f"{variant}: bytes copied by six syncs; ms", f"{sum(one.bytes_copied for one in reports)}; {milliseconds}")
    told(f"{variant}: parity after weights changed in place, nats mean", f"{reports[-1].parity_mean:.4f}")
    told(f"{variant}: memory awake -> asleep, GiB", f"{awake:.1f} -> {asleep:.1f}")


async def vllm_itself(folder: str, size: str) -> None:
    """Speeds of vLLM's AsyncLLM, its engine in a process of its own, as its server has it."""
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    work = workload(size)
    options: dict[str, Any] = {"kv_cache_memory_bytes": int((16 if CUDA else 0.2) * 2**30), "enforce_eager": not CUDA}
    options |= {"max_model_len": work.max_model_len, "max_num_seqs": work.sequences, "skip_tokenizer_init": True}
    options |= {"dtype": "bfloat16" if CUDA else "float32", "disable_log_stats": True, "async_scheduling": True}
    llm, seconds = timed(lambda: AsyncLLM.from_engine_args(AsyncEngineArgs(model=folder, **options)))
    told("vllm: engine start, s", f"{seconds:.1f}")
    params = SamplingParams(
        max_tokens=work.completion_tokens,
        temperature=1.0,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def complete(name: str, prompt: list[int]) -> int:
        async for output in llm.generate({"prompt_token_ids": prompt}, params, request_id=name):
            ids: int = len(output.outputs[0].token_ids)
        return ids

    prompts = prompts_of(work, AutoTokenizer.from_pretrained(folder).encode)
    speeds = []
    for turn in range(3):
        await llm.reset_prefix_cache()
        start = asyncio.get_running_loop().time()
        counts = await asyncio.gather(*(complete(f"{turn}-{i}", prompt) for i, prompt in enumerate(prompts)))
        speeds.append(sum(counts) / (asyncio.get_running_loop().time() - start))
        assert sum(counts) == work.generated
    told("vllm: tokens/s, the first one warms up", speed(speeds))
    llm.shutdown()


def speed(found: Sequence[float]) -> str:
    return ", ".join(f"{one:,.0f}" for one in found)


def told(what: str, value: str) -> None:
    """One line of the table, to the program that started this one."""
    print(f"{LINE}{what}|{value}", flush=True)


def one_variant(folder: str, size: str, variant: str, seconds: float) -> None:
    """Run it, and report its lines or the end of its error."""
    command = [sys.executable, __file__, "--only", folder, "--size", size, "--variants", variant]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        out, error, status = done.stdout, done.stderr, str(done.returncode)
    except subprocess.TimeoutExpired as late:
        out, error = (bytes(part or b"").decode(errors="replace") for part in (late.stdout, late.stderr))
        status = f"none after {seconds:g} s"
    for line in out.splitlines():
        if line.startswith(LINE):
            report(*line.removeprefix(LINE).split("|", 1))
    if status != "0":
        report(f"{variant}: FAILED, status", status)
        print("\n".join((out + error).splitlines()[-30:]), flush=True)


def ratio(variant: str) -> None:
    """The best timed run over vLLM's best."""
    name = "tokens/s, the first one warms up"
    found = {what: value for what, value in rows if name in what}
    mine, theirs = found.get(f"{variant}: {name}"), found.get(f"vllm: {name}")
    if mine and theirs:
        best = [max(float(one.replace(",", "")) for one in text.split(", ")[1:]) for text in (mine, theirs)]
        report(f"{variant} / vllm", f"{best[0] / best[1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--only", metavar="FOLDER", help="the one variant, in this process, of the model in FOLDER")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    if options.only and options.variants == "vllm":
        return asyncio.run(vllm_itself(options.only, options.size))
    if options.only:
        return ours(options.only, options.size, options.variants)
    with saved_model(options.size) as folder:
        for variant in options.variants.split(","):
            one_variant(folder, options.size, variant, options.seconds)
    for variant in ("worker", "own", "shared"):
        ratio(variant)
    if options.save:
        save(options.save, f"Decoding, Qwen2.5 {options.size} shape")


if __name__ == "__main__":
    main()
