"""How long a step's verdicts take after the last answer of a worker, with the rollouts of several steps under way.

    python bench/bench_tails.py [--steps 25] [--prompts 12] [--latency 3] [--test-s 0] [--train 2]
        [--requests 8 64 512] [--state-gib 1] [--grpo.max_lag 4] [--grpo.in_flight true] [--section.key VALUE ...]

What is real: the schedule, the workflow task, the jails, HumanEval, and HTTP to a worker of another process.
Completions are fixed workflows that take up to two seconds to decode; the worker answers after `--latency` seconds on
average, with a right solution in 55 % and `return None` else; the update launches small operations of torch from a
thread for `--train` seconds, and a checkpoint is of `--state-gib` of an optimizer's state, in the folder for temporary
files. `--test-s` has each run of tests sleep first, so that jails are few. The first steps, as many as `max_lag` and
one, draw several steps' rollouts at once and are left out.
`--requests` N compares what a request costs the event loop's thread with N at once: by the workers' endpoint, by
OpenAI's client, and by bare aiohttp, the floor.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import msgspec
import torch
from aiohttp import web
from openai import AsyncOpenAI

from fastgrpo.cli import parse
from fastgrpo.config import Config
from fastgrpo.engine.completion import Completion
from fastgrpo.flow import solutions
from fastgrpo.flow.baselines import WORKFLOWS, completion
from fastgrpo.flow.task import open_environment
from fastgrpo.flow.types import Problem
from fastgrpo.flow.workers.endpoint import Endpoint
from fastgrpo.policy.chat import Chat
from fastgrpo.policy.demo_policy import train_tokenizer
from fastgrpo.program import run_async, run_program
from fastgrpo.record.log import RunLog
from fastgrpo.tasks import problems_of, task_of
from fastgrpo.training.checkpoint import Checkpoints
from fastgrpo.training.curriculum import Curriculum, draw_problems
from fastgrpo.training.learner import Learner
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.training.schedule import open_schedule

WRITTEN = [completion(WORKFLOWS[name]) for name in ("generate", "until passed", "until passed", "generate, test")]
TOKENIZER = train_tokenizer([*WRITTEN, "a prompt"], 400)
IDS = [[*TOKENIZER.encode(text), TOKENIZER.eos_token_id] for text in WRITTEN]
DECODE_S, RIGHT, BEAT_S = 2.0, 0.55, 0.005


class Policy:
    """Decodes without work: each completion is there after a time of its own, a step waits as one of a process does."""

    def __init__(self) -> None:
        self._due: dict[int, tuple[float, int]] = {}
        self.version = 0

    @property
    def busy(self) -> bool:
        return bool(self._due)

    def submit(self, key: int, prompt_ids: Sequence[int], *, seed: int, **_: Any) -> None:
        self._due[key] = time.perf_counter() + DECODE_S * random.Random(seed).uniform(0.2, 1), seed

    def step(self) -> list[Completion]:
        time.sleep(0.005)
        ended = [key for key, (when, _) in self._due.items() if when < time.perf_counter()]
        return [self._written(key, IDS[self._due.pop(key)[1] % len(IDS)]) for key in ended]

    def _written(self, key: int, ids: list[int]) -> Completion:
        return Completion(key, list(ids), [-0.5] * len(ids), "stop", [self.version] * len(ids))

    def settle(self) -> list[Completion]:
        return []

    def abort(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._due.pop(key, None)

    def abort_all(self) -> None:
        self._due.clear()


class Trainer(SimpleNamespace):
    """A learner whose update is `seconds` of launches, and which has nothing to save but its optimizer's state."""

    policy = SimpleNamespace(copied=lambda: lambda folder: None, copied_bytes=0, adapted=False)
    save, join, _taken = Learner.save, Learner.join, Learner._taken

    def update(self, timer: object, before_step: Callable[[], object] = lambda: None) -> dict[str, float]:
        x, ends = torch.randn(4, 8), time.perf_counter() + self.seconds
        while time.perf_counter() < ends:
            self.model(x).sum().backward()
        before_step()
        self.step += 1
        self.experiences.pop(0)
        return {}

    def sync(self) -> dict[str, float]:
        self.engine.version = self.step
        return {}


def answer(problems: Sequence[tuple[str, str, str]], latency: float, port: Any) -> None:
    """The worker's process: says its port, then answers for ever."""

    async def chat(request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        drawn, asked = random.Random(body["seed"]), body["messages"][-1]["content"]
        await asyncio.sleep(latency * drawn.uniform(0.3, 1.7))
        known = next(((text, name) for prompt, text, name in problems if prompt.strip() in asked), ("", "f"))
        code = known[0] if drawn.random() < RIGHT else f"def {known[1]}(*_):\n    return None\n"
        message = {"role": "assistant", "content": f"```python\n{code}\n```\n{'word ' * 100}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 200, "completion_tokens": 200, "total_tokens": 400}
        kind = {"id": "x", "object": "chat.completion", "created": 0, "model": "worker"}
        return web.json_response(kind | {"choices": [choice], "usage": usage})

    async def main() -> None:
        served = web.Application()
        served.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(served, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(main())


@contextmanager
def worker(problems: Sequence[Problem], latency: float) -> Iterator[str]:
    """The address of a worker in a process of its own."""
    ours, theirs = get_context("spawn").Pipe()
    known = [(problem.prompt, problem.solution, problem.entry_point) for problem in problems]
    process = get_context("spawn").Process(target=answer, args=(known, latency, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        process.kill()
        process.join()


def settings(options: argparse.Namespace, keys: Sequence[str], url: str) -> Config:
    """The run's configuration, with the worker at `url`."""
    values = {
        "data.dataset": "humaneval",
        "data.held_out": 0,
        "workers.kind": "openai",
        "workers.base_url": url,
        "workers.model": "worker",
        "workers.concurrency": 512,
        "sandbox.workflow_s": 120,
        "engine.max_model_len": 4096,
        "grpo.prompts_per_step": options.prompts,
        "grpo.max_lag": 4,
        "grpo.steps": options.steps,
        "model.path": "none",
    }
    given = [f"--{name}={value}" for name, value in values.items()]
    return parse([*given, *keys], program="bench_tails").config


async def steps(config: Config, problems: Sequence[Problem], train_s: float, gib: float) -> list[dict[str, float]]:
    """The measurements of each step; the trainer's state has `gib` GiB."""
    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)) for _ in range(24)]
    trainer = Trainer(seconds=train_s, model=torch.nn.Sequential(*layers), step=0, experiences=[])
    trainer.chat, trainer.engine, trainer.curriculum, trainer.config = Chat(TOKENIZER), Policy(), Curriculum(), config
    # Of a bf16 parameter AdamW has 12 bytes.
    state = [
        torch.nn.Parameter(torch.zeros(2**22, dtype=torch.bfloat16)) for _ in range(max(1, round(gib * 2**8 / 12)))
    ]
    trainer.optimizer = AdamW(state, AdamWOptions(lr=1.0))
    learner, log, late, rows = cast(Any, trainer), RunLog(None), list[float](), list[dict[str, float]]()
    draw = partial(draw_problems, problems, config, curriculum=trainer.curriculum)
    async with AsyncExitStack() as stack:
        trainer.checkpoints = Checkpoints(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(trainer.checkpoints.written())
        environment = await stack.enter_async_context(open_environment(config))
        schedule = await stack.enter_async_context(open_schedule(learner, environment, draw, config))
        beating = asyncio.create_task(beat(late))
        while trainer.step < config.grpo.steps:
            late.clear()
            begun, cpu = time.perf_counter(), time.thread_time()
            await schedule.generated()
            experience = await schedule.experience()
            waited = time.perf_counter() - begun
            await schedule.update(log)
            schedule.sync()
            saved = time.perf_counter()
            if trainer.step % config.checkpoint.every == 0:
                await schedule.save()
            saved = time.perf_counter() - saved
            row = {"tail": experience.tally.peaks["tail_after_answers_s"], "waited": waited}
            row |= {"loop": sorted(late)[len(late) * 99 // 100], "cpu": time.thread_time() - cpu}
            rows.append(row | {"seconds": time.perf_counter() - begun, "saved": saved})
        beating.cancel()
    return rows


async def beat(late: list[float]) -> None:
    """Note again and again how late the event loop is."""
    while True:
        due = time.perf_counter() + BEAT_S
        await asyncio.sleep(BEAT_S)
        late.append(time.perf_counter() - due)


async def requests(config: Config, count: int) -> dict[str, float]:
    """CPU milliseconds of this thread for a request, `count` at once, by each client."""
    url, mean = config.workers.base_url, {}
    own = Endpoint(msgspec.structs.replace(config.workers, concurrency=count))
    theirs = AsyncOpenAI(base_url=url, api_key="-", timeout=60.0, max_retries=0)
    body: dict[str, Any] = {"model": "worker", "messages": [{"role": "user", "content": "def f(x): " * 80}]}
    body |= {"max_tokens": 512, "temperature": 0.7}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def bare(seed: int) -> None:
            async with session.post(
                f"{url}/chat/completions", data=msgspec.json.encode(body | {"seed": seed})
            ) as reply:
                await reply.read()

        async def by_openai(seed: int) -> None:
            await theirs.chat.completions.with_raw_response.create(**body, seed=seed)

        async def by_endpoint(seed: int) -> None:
            await own.answer(body | {"seed": seed}, nullcontext)

        ways = {"endpoint": by_endpoint, "OpenAI's client": by_openai, "aiohttp, bare": bare}
        for name, way in ways.items():
            await at_once(way, count, count)
            cpu = time.thread_time()
            await at_once(way, count, 3 * count)
            mean[name] = 1e3 * (time.thread_time() - cpu) / (3 * count)
    await own.aclose()
    await theirs.close()
    return mean


async def at_once(way: Callable[[int], Awaitable[None]], most: int, count: int) -> None:
    """`count` requests, `most` of them at once."""
    slots = asyncio.Semaphore(most)

    async def one(seed: int) -> None:
        async with slots:
            await way(seed)

    await asyncio.gather(*map(one, range(count)))


def slower(seconds: float) -> Callable[[str, str], str]:
    """`program_after`, which sleeps first."""
    after = solutions.program_after
    return lambda given, code: f"import time\ntime.sleep({seconds})\n{after(given, code)}"


def shown(rows: Sequence[dict[str, float]], rollouts: int) -> None:
    """Print a line of the figures of these steps."""
    column = {name: [row[name] for row in rows] for name in rows[0]}
    tails = column["tail"]
    print(
        f"tail after the last answer, s: median {median(tails):.3f}, worst {max(tails):.3f}, above 2 s in "
        f"{sum(tail > 2 for tail in tails)} of {len(rows)} steps; {fmean(column['seconds']):.2f} s a step, of which "
        f"{fmean(column['waited']):.2f} for rollouts; event loop late by (p99 of a step, median) "
        f"{1e3 * median(column['loop']):.0f} ms; its CPU for a rollout {1e3 * median(column['cpu']) / rollouts:.1f} ms"
        f"; seconds waited for each checkpoint {[round(seconds, 2) for seconds in column['saved'] if seconds > 1e-3]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--latency", type=float, default=3.0)
    parser.add_argument("--test-s", type=float, default=0.0)
    parser.add_argument("--train", type=float, default=2.0)
    parser.add_argument("--state-gib", type=float, default=0.0)
    parser.add_argument("--requests", type=int, nargs="*", default=[])
    options, keys = parser.parse_known_args()
    if options.test_s:
        vars(solutions)["program_after"] = slower(options.test_s)
    plain = settings(options, keys, "http://127.0.0.1:1/v1")
    problems, _ = problems_of(task_of(plain), plain)
    with worker(problems, options.latency) as url:
        config = settings(options, keys, url)
        for count in options.requests:
            found = run_async(partial(requests, config, count))
            print(f"{count} at once, CPU of a request, ms: {', '.join(f'{k} {v:.2f}' for k, v in found.items())}")
        rows = run_async(partial(steps, config, problems, options.train, options.state_gib)) if options.steps else []
    if counted := rows[config.grpo.max_lag + 1 :]:
        shown(counted, config.grpo.prompts_per_step * config.grpo.group_size)


if __name__ == "__main__":
    run_program(main)
