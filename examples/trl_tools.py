"""TRL's `tools` and `environment_factory` as an agent: `python examples/trl_tools.py --model PATH`.

`Tools` takes what TRL's GRPOTrainer does: functions with types and docstrings, a class whose methods are tools, with
`reset(**row)` and, where it has one, `get_reward()`, and reward functions in TRL's form. Needs a model whose chat
template knows tools.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    async def act(self, problem: Any, access: Any, seed: int) -> tuple[list[Any], Any]:
        """(all messages after the prompt, the rollout's environment)."""
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
                content = await called(tools[call.function.name], call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": str(content)})
        return messages[asked:], environment

    async def results(self, problem: Any, rollouts: list[Rollout]) -> list[Result]:
        """Each function's values, weighted, and what environments say themselves; None does not apply."""
        completions, environments = zip(*(rollout.executions[0] for rollout in rollouts), strict=True)
        columns = {name: [value] * len(rollouts) for name, value in problem.row.items() if name != "prompt"}
        given = columns | {"prompts": [problem.row["prompt"]] * len(rollouts), "completions": list(completions)}
        terms: list[dict[str, float]] = [{} for _ in rollouts]
        for function, weight in self.rewards.items():
            values = await ended(function(**given, environments=list(environments)))
            for term, value in zip(terms, values, strict=True):
                if value is not None:
                    term[function.__name__] = weight * float(value)
        for term, environment in zip(terms, environments, strict=True):
            if hasattr(environment, "get_reward"):
                term[type(environment).__name__] = float(await ended(environment.get_reward()))
        return [
            Result(reward=Reward(total=sum(term.values()), terms=term)) if term else failed("no reward applies")
            for term in terms
        ]


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


async def called(tool: Callable[..., Any], arguments: str) -> Any:
    """What the tool answers, or what it raised: a wrong call is the policy's."""
    try:
        return await ended(tool(**json.loads(arguments)))
    except Exception as error:
        return {"error": str(error)}


async def ended(returned: Any) -> Any:
    """What was returned, by a coroutine too."""
    return await returned if inspect.isawaitable(returned) else returned


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
