"""Which task a run trains: workflows, plain programs, reward functions over rows, environments of verifiers."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache, partial
from typing import Any, NamedTuple

from fastgrpo.config import Config
from fastgrpo.errors import UserError
from fastgrpo.flow import programs, task
from fastgrpo.flow.problems.loading import load_problems
from fastgrpo.functions import find_function
from fastgrpo.record.log import RunLog
from fastgrpo.rollouts.agents import Agent
from fastgrpo.rollouts.dataset import hold_out, read_examples
from fastgrpo.rollouts.environment import Environment
from fastgrpo.rollouts.reward_functions import RewardFunctions
from fastgrpo.rollouts.verifiers_environment import load_verifiers

Problems = tuple[list[Any], list[Any]]
Prompt = str | list[dict[str, str]]


class Task(NamedTuple):
    """What a run trains on: (training, held-out) problems, and the environment opened for the length of the run.

    `distilled`: stage 1 can teach it to a policy that knows nothing, so that no model need be named. What a dry run
    reads, which starts nothing: `list_problems`, where loading does more than read, and the `prompt` of one of them.
    """

    load_problems: Callable[[Config], Problems]
    open_environment: Callable[[Config, RunLog | None], AbstractAsyncContextManager[Any]]
    distilled: bool = False
    list_problems: Callable[[Config], Problems] | None = None
    prompt: Callable[[Config, Any], Prompt] | None = None


def task_of(config: Config) -> Task:
    """The task that the configuration names. Raises UserError where a reward function cannot be found."""
    if config.data.environment and config.data.reward:
        raise UserError("data.environment has rewards of its own: leave data.reward out, or data.environment")
    if config.data.environment:
        return verifiers_task(config.data.environment, config.data.environment_args)
    if config.data.reward:
        return reward_task([find_function(name, "data.reward") for name in config.data.reward.split(",")])
    untried = partial(load_problems, tried=False)
    if config.task == "code":
        return Task(
            load_problems, programs.open_environment, False, untried, lambda _, problem: programs.prompt(problem)
        )
    return Task(load_problems, task.open_environment, True, untried, task.prompt)


def require_model(config: Config, task: Task) -> None:
    """Raise UserError where a task that stage 1 cannot teach has no model to begin with."""
    if not config.model.path and not task.distilled:
        raise UserError("this task needs a model: name one with --model PATH, or model= from Python")


def reward_task(
    functions: Sequence[Callable[..., Any]],
    weights: Sequence[float] | None = None,
    dataset: Any = None,
    eval_dataset: Any = None,
) -> Task:
    """Reward functions in TRL's form over the rows of `dataset`, None = those of `data.dataset`."""

    def load(config: Config) -> Problems:
        rows = read_examples(_named(config) if dataset is None else dataset)
        if eval_dataset is not None:
            return rows, read_examples(eval_dataset, split="test")
        return hold_out(rows, _count(config), config.seed)

    @asynccontextmanager
    async def open_environment(config: Config, log: RunLog | None = None) -> AsyncIterator[Environment]:
        yield RewardFunctions(functions, weights, deadline_s=config.grpo.execute_s)

    return Task(load, open_environment, prompt=lambda _, example: example.prompt)


def verifiers_task(environment: str, arguments: str = "") -> Task:
    """The environment `verifiers:NAME` on its own data; it is held out as its author says, else as `data.held_out`.

    Raises UserError for another name; loading raises as `load_verifiers` does.
    """
    package, _, name = environment.partition(":")
    if package != "verifiers" or not name:
        raise UserError(f"data.environment must be verifiers:NAME, got {environment!r}")
    loaded = cache(lambda: load_verifiers(name, arguments))

    def load(config: Config) -> Problems:
        tasks, held_out = (loaded().tasks(held_out=each) for each in (False, True))
        if not held_out:
            return hold_out(tasks, _count(config), config.seed)
        return tasks, random.Random(f"{config.seed}/held-out").sample(held_out, min(_count(config), len(held_out)))

    @asynccontextmanager
    async def open_environment(config: Config, log: RunLog | None = None) -> AsyncIterator[Agent]:
        try:
            yield loaded()
        finally:
            await loaded().close()

    return Task(load, open_environment, prompt=lambda _, problem: loaded().prompt(problem))


def environment_task(environment: Environment | Agent, problems: Iterable[Any], held_out: Iterable[Any] = ()) -> Task:
    """An environment or an agent of the caller's own on its own problems."""

    @asynccontextmanager
    async def open_environment(config: Config, log: RunLog | None = None) -> AsyncIterator[Environment | Agent]:
        yield environment

    prompt = lambda _, problem: environment.prompt(problem)  # noqa: E731
    return Task(lambda config: (list(problems), list(held_out)), open_environment, prompt=prompt)


def _named(config: Config) -> str:
    dataset = config.data.dataset
    if not isinstance(dataset, str):
        raise UserError("data.reward goes with one data set: name one in data.dataset")
    return dataset


def _count(config: Config) -> int:
    held_out = config.data.held_out
    return held_out if isinstance(held_out, int) else sum(held_out)
