"""Tokens/s of rollouts through the OpenAI-compatible endpoint, over those of `rollouts.collect`, on the same engine.

    python bench/bench_endpoint.py [--size tiny|0.5b|1.5b|7b] [--rounds 3] [--save FILE]

On a GPU 512 rollouts of 512 + 256 tokens at once, on a CPU 32 short ones. Both ways draw completions of one length for
the same prompts; they take turns, and the ratio is that of their medians. An agent here is one request by a raw HTTP
client, by OpenAI's own over HTTP, or by OpenAI's own as the rollout gives it; their Python runs in the same process.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import uvloop
from engine_setup import Setup, Trivial, Workload, report, save, saved_model
from model_shapes import CUDA, SHAPES, timed
from openai import AsyncOpenAI

from fastgrpo.rollouts.session import Access
from fastgrpo.types import Group


class Raw:
    """An agent that asks once, over connections that its rollouts share."""

    def __init__(self, texts: Trivial) -> None:
        self._texts = texts
        self._session: aiohttp.ClientSession | None = None
        self.prompt, self.results = texts.prompt, texts.results

    async def act(self, problem: Any, access: Access, seed: int) -> None:
        self._session = self._session or aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        body = {"messages": self._messages(problem)}
        headers = {"Authorization": f"Bearer {access.api_key}"}
        async with self._session.post(f"{access.base_url}/chat/completions", json=body, headers=headers) as answer:
            answer.raise_for_status()
            await answer.read()

    def _messages(self, problem: Any) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._texts.prompt(problem)}]

    async def close(self) -> None:
        """Close what the rollouts shared."""
        if self._session is not None:
            await self._session.close()
        self._session = None


class ByOpenAI(Raw):
    """The same with OpenAI's client, whose connections the rollouts share."""

    def __init__(self, texts: Trivial) -> None:
        super().__init__(texts)
        self._client = AsyncOpenAI(base_url="http://localhost", api_key="-", timeout=3600)

    async def act(self, problem: Any, access: Access, seed: int) -> None:
        client = self._client.with_options(base_url=access.base_url, api_key=access.api_key)
        messages: Any = self._messages(problem)
        await client.chat.completions.create(model=access.model, messages=messages)

    async def close(self) -> None:
        await self._client.close()


class Direct(Raw):
    """The same with the client that the rollout gives."""

    async def act(self, problem: Any, access: Access, seed: int) -> None:
        messages: Any = self._messages(problem)
        await access.client().chat.completions.create(model=access.model, messages=messages)


def measure(setup: Setup, name: str, seed: int) -> float:
    """Tokens/s of one way, on problems of its own."""
    problems, trivial = setup.work.problems(seed)
    ways = {"endpoint": Raw, "openai": ByOpenAI, "client()": Direct}
    agent = ways[name](trivial) if name in ways else trivial
    setup.engine.sync(setup.policy)
    groups, seconds = timed(lambda: _collected(setup, problems, agent, seed))
    written = sum(rollout.written for group in groups for rollout in group.rollouts)
    assert written == setup.work.generated, f"{written} tokens were written, not {setup.work.generated}"
    return written / seconds


def _collected(setup: Setup, problems: list[Any], environment: Any, seed: int) -> list[Group]:
    async def main() -> list[Group]:
        try:
            return await setup.rollouts(problems, environment, seed)
        finally:
            if isinstance(environment, Raw):
                await environment.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    work = Workload(options.size).shorter() if CUDA else Workload(options.size)
    with saved_model(options.size) as folder:
        setup = Setup(folder, work)
        found: dict[str, list[float]] = {"collect": [], "endpoint": [], "openai": [], "client()": []}
        for name in found:
            measure(setup, name, 0)
        for number in range(options.rounds):
            for name, speeds in found.items():
                speeds.append(measure(setup, name, 1 + number))
        setup.engine.close()
    report(
        "rollouts at once, prompt + completion tokens",
        f"{work.sequences}, {work.prompt_tokens} + {work.completion_tokens}",
    )
    base = median(found["collect"])
    for name, speeds in found.items():
        every = ", ".join(f"{speed:,.0f}" for speed in speeds)
        report(
            f"{name}: tokens/s, median (all), over collect",
            f"{median(speeds):,.0f} ({every}), {median(speeds) / base:.2f}",
        )
    if options.save:
        save(options.save, "The capturing endpoint")


if __name__ == "__main__":
    main()
