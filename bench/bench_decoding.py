"""Tokens/s decoded: the engine in this process, in its own, with a further one for the worker, and vLLM's own server.

    python bench/bench_decoding.py [--size 1.5b] [--variants worker,fp8,server,vllm,own,shared] [--seconds 150]

512 sequences of 512 + 256 tokens, 64 prompts, a logprob with each token; the same prompts and the same random weights
for all, one after another on one GPU. Each variant is a program of its own, ended after `--seconds`; one that fails
prints the end of its error and the others go on. `worker` is `engine.process` own on a GPU, `own` the same with one
process for scheduler and kernels, `shared` the engine inside the trainer's process, `fp8` is `worker` with an FP8 KV
cache. `server` is vLLM's OpenAI server with asynchronous scheduling and no tokenizer, asked for all completions at once
over HTTP, prompts and answers as token ids; `vllm` is its engine alone, AsyncLLM. `held` has a thread of the calling
process keep Python's lock, as rewards do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import torch
import uvloop
from engine_setup import Setup, Workload, report, rows, save, saved_model, used_gib
from model_shapes import CUDA, SHAPES, chosen, named, timed

from fastgrpo.engine.completion import Completion
from fastgrpo.engine.engine import Engine
from fastgrpo.engine.engine_process import EngineProcess
from fastgrpo.record.gpu import GpuMonitor

OURS: dict[str, Callable[..., Any]] = {
    "worker": partial(EngineProcess, worker_process=True),
    "fp8": partial(EngineProcess, worker_process=True, kv_cache_dtype="fp8"),
    "own": partial(EngineProcess, worker_process=False),
    "shared": Engine,
}
PEERS = ("server", "vllm")
LINE = "ROW "
SERVER = "vllm.entrypoints.openai.api_server"


def workload(size: str) -> Workload:
    """What is decoded: on a CPU 32 sequences of 64 + 128 tokens."""
    work = Workload(size)
    work.completion_tokens = 256 if CUDA else 128
    work.max_model_len = work.prompt_tokens + work.completion_tokens + 32
    return work


def generate(engine: Any, prompts: Sequence[list[int]], tokens: int) -> list[Completion]:
    """Submit all and take what finishes until nothing is open."""
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt, max_tokens=tokens)
    finished: list[Completion] = []
    while engine.busy:
        finished += engine.step()
    assert sum(len(completion.logprobs) for completion in finished) == len(prompts) * tokens
    return finished


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
    # How far an FP8 cache leaves random weights is measured here, not bounded.
    setup = Setup(folder, work, engine=OURS[variant], parity_threshold=2.0 if variant == "fp8" else 0.2)
    told(f"{variant}: engine start, s", f"{setup.start_seconds:.1f}")
    told(f"{variant}: parity, nats mean", f"{setup.first_sync.parity_mean:.4f}")
    prompts = work.prompt_ids(setup.policy.tokenizer.encode)
    run = partial(generate, setup.engine, prompts, work.completion_tokens)
    speeds = []
    with GpuMonitor() as monitor:
        for _ in range(3):
            setup.engine.sync(setup.policy)
            monitor.take()
            completions, seconds = timed(run)
            speeds.append(work.generated / seconds)
        gpu = monitor.take()
    told(f"{variant}: tokens/s, the first one warms up", speed(speeds))
    if gpu:
        # Where the GPU waits decoding is bound by Python, so by the host's cores.
        told(f"{variant}: GPU busy in the last; W", f"{gpu['gpu/utilisation']:.0%}; {gpu['gpu/power_w']:.0f}")
    told(f"{variant}: parity of sampled tokens, nats mean", sampled_parity(setup, prompts, completions))
    setup.engine.sync(setup.policy)
    with lock_held():
        told(f"{variant}, held: tokens/s", speed([work.generated / timed(run)[1]]))
    shared_weights(setup, variant)
    setup.engine.close()


def sampled_parity(setup: Setup, prompts: Sequence[list[int]], completions: Sequence[Completion]) -> str:
    """Mean and largest difference over a completion of each prompt, and the share of importance weights above 2."""
    gaps = []
    for one in completions:
        if one.key % setup.work.group == 0:
            (ours,) = setup.policy.logprobs([prompts[one.key] + one.token_ids])
            gaps.append(ours[-len(one.token_ids) :].cpu() - torch.tensor(one.logprobs))
    gap = torch.cat(gaps)
    above = float((gap.exp() > 2).float().mean())
    return f"{float(gap.abs().mean()):.4f}, {float(gap.abs().max()):.3f} at most; weights above 2: {above:.2%}"


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


def vllm_options(work: Workload) -> dict[str, Any]:
    """What vLLM's own engine and server are started with: the settings that ours has."""
    options: dict[str, Any] = {"kv_cache_memory_bytes": int((16 if CUDA else 0.2) * 2**30), "enforce_eager": not CUDA}
    options |= {"max_model_len": work.max_model_len, "max_num_seqs": work.sequences, "skip_tokenizer_init": True}
    options |= {"dtype": "bfloat16" if CUDA else "float32", "disable_log_stats": True, "async_scheduling": True}
    return options


async def turns(
    variant: str,
    work: Workload,
    prompts: Sequence[list[int]],
    complete: Callable[[str, list[int]], Awaitable[int]],
    forget: Callable[[], Awaitable[Any]],
) -> None:
    """Speeds of three turns, in which `complete` gives the tokens of one request; cached prefixes are forgotten."""
    speeds = []
    for turn in range(3):
        await forget()
        start = time.perf_counter()
        counts = await asyncio.gather(*(complete(f"{turn}-{i}", prompt) for i, prompt in enumerate(prompts)))
        speeds.append(work.generated / (time.perf_counter() - start))
        assert sum(counts) == work.generated
    told(f"{variant}: tokens/s, the first one warms up", speed(speeds))


async def vllm_itself(folder: str, size: str) -> None:
    """Speeds of vLLM's AsyncLLM, its engine in a process of its own, as its server has it."""
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    work = workload(size)
    arguments = AsyncEngineArgs(model=folder, **vllm_options(work))
    llm, seconds = timed(lambda: AsyncLLM.from_engine_args(arguments))
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

    prompts = work.prompt_ids(AutoTokenizer.from_pretrained(folder).encode)
    await turns("vllm", work, prompts, complete, llm.reset_prefix_cache)
    llm.shutdown()


@contextmanager
def serving(folder: str, work: Workload) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of vLLM's server, which has begun to start, and its process; what it prints is shown on failure."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--model", folder, "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port)]
    for name, value in vllm_options(work).items():
        flags += [f"--{name.replace('_', '-')}"] * (value is not False) + [str(value)] * (not isinstance(value, bool))
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", SERVER, *flags, "--disable-uvicorn-access-log"],
            stdout=printed,
            stderr=printed,
            # The route that forgets cached prefixes.
            env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
        )
        try:
            yield f"http://127.0.0.1:{port}", process
        except BaseException:
            printed.seek(0)
            print(printed.read().decode(errors="replace")[-6000:], flush=True)
            raise
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


async def vllm_server(folder: str, size: str) -> None:
    """Speeds of vLLM's server; the client is this process, and reads each answer's tokens and logprobs."""
    from transformers import AutoTokenizer

    work, start = workload(size), time.perf_counter()
    body = {"model": "policy", "max_tokens": work.completion_tokens, "temperature": 1.0, "ignore_eos": True}
    body |= {"logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
    prompts = work.prompt_ids(AutoTokenizer.from_pretrained(folder).encode)
    limits: dict[str, Any] = {"timeout": aiohttp.ClientTimeout(total=None)}
    limits["connector"] = aiohttp.TCPConnector(limit=0, force_close=True)
    with serving(folder, work) as (address, process):
        async with aiohttp.ClientSession(address, **limits) as session:

            async def complete(name: str, prompt: list[int]) -> int:
                async with session.post("/v1/completions", json=body | {"prompt": prompt}) as answer:
                    found = await answer.json()
                    assert answer.status == 200, found
                (choice,) = found["choices"]
                assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"])
                return len(choice["token_ids"])

            async def forget() -> None:
                async with session.post("/reset_prefix_cache") as answer:
                    answer.raise_for_status()

            while not await healthy(session):
                assert process.poll() is None, "vLLM's server has ended"
                await asyncio.sleep(0.5)
            told("server: start, s", f"{time.perf_counter() - start:.1f}")
            await turns("server", work, prompts, complete, forget)


async def healthy(session: aiohttp.ClientSession) -> bool:
    """Whether the server answers."""
    with suppress(aiohttp.ClientError):
        async with session.get("/health") as answer:
            return answer.status == 200
    return False


def speed(found: Sequence[float]) -> str:
    return ", ".join(f"{one:,.0f}" for one in found)


def told(what: str, value: str) -> None:
    """One line of the table, to the program that started this one."""
    print(f"{LINE}{what}|{value}", flush=True)


def one_variant(folder: str, size: str, variant: str, seconds: float) -> None:
    """Run it, and report its lines or the end of its error."""
    command = [sys.executable, __file__, "--only", folder, "--size", size, "--variants", variant]
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        program = subprocess.Popen(command, stdout=printed, stderr=printed, start_new_session=True)
        try:
            status = str(program.wait(seconds))
        except subprocess.TimeoutExpired:
            status = f"none after {seconds:g} s"
            program.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                program.wait(10)
        finally:
            # vLLM's processes are of its group; our engine's has its own, and ends with its connection.
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        printed.seek(0)
        lines = printed.read().splitlines()
    for line in lines:
        if line.startswith(LINE):
            report(*line.removeprefix(LINE).split("|", 1))
    if status != "0":
        report(f"{variant}: FAILED, status", status)
        print("\n".join(lines[-60:]), flush=True)


def ratio(variant: str, peer: str) -> None:
    """The best timed run over the peer's best."""
    name = "tokens/s, the first one warms up"
    found = {what: value for what, value in rows if name in what}
    mine, theirs = found.get(f"{variant}: {name}"), found.get(f"{peer}: {name}")
    if mine and theirs:
        best = [max(float(one.replace(",", "")) for one in text.split(", ")[1:]) for text in (mine, theirs)]
        report(f"{variant} / {peer}", f"{best[0] / best[1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--variants", default="worker,fp8,server,vllm,own,shared")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--only", metavar="FOLDER", help="the one variant, in this process, of the model in FOLDER")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    variants = chosen(parser, "--variants", options.variants, (*OURS, *PEERS))
    if options.only and options.variants in PEERS:
        peer = vllm_server if options.variants == "server" else vllm_itself
        return uvloop.run(peer(options.only, options.size))
    if options.only:
        return ours(options.only, options.size, options.variants)
    with saved_model(options.size) as folder:
        for variant in variants:
            one_variant(folder, options.size, variant, options.seconds)
    for other in (*PEERS, "worker"):
        for variant in OURS:
            if variant != other:
                ratio(variant, other)
    if options.save:
        save(options.save, f"Decoding, {named(options.size)}")


if __name__ == "__main__":
    main()
