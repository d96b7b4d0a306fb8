"""TRL's `tools` and `environment_factory` as an agent: `python examples/trl_tools.py --model PATH`.

`Tools` takes what TRL's GRPOTrainer does: functions with types and docstrings, a class whose methods are tools, with
`reset(**row)` and, where it has one, `get_reward()`, and reward functions in TRL's form, of prompts, completions,
environments and the row's columns. Needs a model whose chat template knows tools.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import openai
from transformers.utils import get_json_schema

import fastgrpo
from fastgrpo.cli import parse
from fastgrpo.program import run_program
from fastgrpo.rollouts.environment import failed
from fastgrpo.types import Result, Reward, Rollout

OF_ENVIRONMENT = ("reset", "get_reward")  # what is no tool of it


class Tools:
    """An agent that asks, calls what tools are named, and asks again until none is."""

    def __init__(
        self,
        reward_funcs: Sequence[Callable[..., Any]] = (),
        *,
        tools: Sequence[Callable[..., Any]] = (),
        environment_factory: Callable[[], Any] | None = None,
        reward_weights: Sequence[float] | None = None,
    ) -> None:
        self.rewards = dict(zip(reward_funcs, reward_weights or [1.0] * len(reward_funcs), strict=True))
        self.tools, self.factory = tools, environment_factory

    def prompt(self, problem: Any) -> Any:
        """The row's, before what `reset` adds."""
        return problem.row["prompt"]

    async def act(self, problem: Any, access: Any, seed: int) -> tuple[list[Any], list[Any], Any]:
        """(the prompt's messages, all after them, the rollout's environment)."""
        environment = self.factory and self.factory()
        messages = begun(problem.row, environment)
        tools = {tool.__name__: tool for tool in (*self.tools, *methods(environment))}
        schemas, client, asked = [get_json_schema(tool) for tool in tools.values()], access.client(), len(messages)
        calls: Any = True
        while calls:
            try:
                answer = await client.chat.completions.create(model=access.model, messages=messages, tools=schemas)
            except openai.BadRequestError as error:
                if len(messages) == asked or error.code not in ("context_length_exceeded", "max_turns"):
                    raise
                break
            message = answer.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            calls = message.tool_calls or ()
            for call in calls:
                content = str(await called(tools, call.function))
                named = {"tool_call_id": call.id, "name": call.function.name}
                messages.append({"role": "tool", **named, "content": content})
        return messages[:asked], [as_trl_has_it(message) for message in messages[asked:]], environment

    async def results(self, problem: Any, rollouts: list[Rollout]) -> list[Result]:
        """Each function's values, weighted, and what environments say themselves; None does not apply."""
        prompts, completions, environments = zip(*(rollout.executions[0] for rollout in rollouts), strict=True)
        given = {name: [value] * len(rollouts) for name, value in problem.row.items() if name != "prompt"}
        given |= {"prompts": list(prompts), "completions": list(completions)}
        given |= {"environments": list(environments)} if self.factory else {}
        weights = {function.__name__: abs(weight) for function, weight in self.rewards.items()}
        terms: list[dict[str, float]] = [{} for _ in rollouts]
        for function, weight in self.rewards.items():
            values = await ended(function, **given)
            for term, value in zip(terms, values, strict=True):
                if value is not None:
                    term[function.__name__] = weight * float(value)
        for term, environment in zip(terms, environments, strict=True):
            if hasattr(environment, "get_reward"):
                weights[name := type(environment).__name__] = 1.0
                term[name] = float(await ended(environment.get_reward))
        rewards = [Reward(total=sum(term.values()), terms=term, weights=weights) for term in terms]
        return [Result(reward=reward) if reward.terms else failed("no reward applies") for reward in rewards]


def begun(row: Mapping[str, Any], environment: Any) -> list[Any]:
    """The row's messages, the last one with what the environment's `reset` shows."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    shown = environment.reset(**row) if environment is not None else None
    return [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + (shown or "")}]


def methods(environment: Any) -> list[Callable[..., Any]]:
    """The tools that an environment is."""
    found = inspect.getmembers(environment, inspect.ismethod)
    return [method for name, method in found if not name.startswith("_") and name not in OF_ENVIRONMENT]


async def called(tools: Mapping[str, Callable[..., Any]], call: Any) -> Any:
    """What the called tool answers, or what it raised: a wrong call is the policy's."""
    if call.name not in tools:
        return {"error": f"Tool {call.name} not found."}
    try:
        return await ended(tools[call.name], **json.loads(call.arguments))
    except Exception as error:
        return {"error": str(error)}


async def ended(function: Callable[..., Any], **given: Any) -> Any:
    """What a coroutine returns, or a function, which other rollouts need not wait for."""
    if inspect.iscoroutinefunction(function):
        return await function(**given)
    return await asyncio.to_thread(function, **given)


def as_trl_has_it(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as dicts, where they are JSON, for rewards that read them."""
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        with suppress(ValueError):
            arguments = json.loads(arguments)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | ({"tool_calls": calls} if calls else {})


def problems(rows: Iterable[Mapping[str, Any]]) -> list[SimpleNamespace]:
    """The rows of a data set, as an agent gets them."""
    return [SimpleNamespace(id=number, row=row) for number, row in enumerate(rows)]


class Counter:
    """A number to bring to the wanted one."""

    def reset(self, wanted: int, **_: Any) -> str:
        """Begin at 0; what is returned is added to the prompt."""
        self.wanted, self.value = wanted, 0
        return " It is 0 now."

    def increase(self, by: int) -> int:
        """
        Increase the counter.

        Args:
            by: How much to add.

        Returns:
            The counter's new value.
        """
        self.value += by
        return self.value

    def get_reward(self) -> float:
        """1 at the wanted value, less beside it."""
        return 1 / (1 + abs(self.wanted - self.value))


def brevity(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
    """Less for each character that was written."""
    return [1 / (1 + sum(len(turn.get("content") or "") for turn in turns)) for turns in completions]


def main() -> None:
    """Train `--model` on it."""
    command = parse(sys.argv[1:], program="examples.trl_tools")
    rows = [{"prompt": [{"role": "user", "content": f"Bring the counter to {n}."}], "wanted": n} for n in range(1, 41)]
    agent = Tools([brevity], environment_factory=Counter, reward_weights=[0.1])
    sets = {"dataset": problems(rows[8:]), "eval_dataset": problems(rows[:8])}
    fastgrpo.train(command.config, environment=agent, resume=command.resume, dry_run=command.dry_run, **sets)


if __name__ == "__main__":
    run_program(main)
