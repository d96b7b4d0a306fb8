"""An environment made of reward functions in TRL's form: `f(prompts, completions, completion_ids, **columns)`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from numbers import Real
from typing import Any

from fastgrpo.errors import UserError
from fastgrpo.rollouts.environment import EnvironmentFailure, all_of, ask, failed, finite_number
from fastgrpo.types import Result, Reward, Rollout

Message = dict[str, str]
# Of its deadline: that of all together, which names none, comes after it.
SOONER = 0.95


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set. `prompt`: text, or chat messages; `columns`: all that the row has besides."""

    id: str
    prompt: str | list[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)


class RewardFunctions:
    """The environment of `functions`, whose weighted values add up to the reward.

    Each is called with the lists `prompts`, `completions` and `completion_ids` of one group and a list of each column
    of the data set, and returns a number for each completion; None = does not apply to it. A completion to which none
    applies is left out of its group's baseline. Functions may be coroutines or plain, which run in threads; each has
    `deadline_s`. Completions are texts, or where the prompt is a conversation, lists of one assistant message.
    """

    def __init__(
        self, functions: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None, *, deadline_s: float
    ) -> None:
        if other := [function for function in functions if not callable(function)]:
            raise UserError(f"reward takes functions, got {other[0]!r:.60}: from the shell --reward MODULE:FUNCTION")
        self._functions = {_name(function): function for function in functions}
        self._weights = list(weights or [1.0] * len(functions))
        if odd := [weight for weight in self._weights if not isinstance(weight, Real) or not isfinite(weight)]:
            raise UserError(f"weights of reward functions are finite numbers, got {odd[0]!r:.60}")
        if len(self._functions) != len(functions) or len(self._weights) != len(functions):
            raise UserError("reward functions need different names, and one weight each where weights are given")
        self._deadline_s = deadline_s

    def prompt(self, problem: Example) -> str | list[Message]:
        """The row's own prompt."""
        return problem.prompt

    async def execute(self, problem: Example, completion: str, seed: int) -> str:
        """The completion as it is: a group is rewarded at once."""
        return completion

    def feedback_text(self, execution: str) -> None:
        """None: a rollout is one completion."""

    async def results(self, problem: Example, rollouts: list[Rollout]) -> list[Result]:
        """Each rollout's weighted sum, its terms by the functions' names."""
        arguments = _arguments(problem, rollouts)
        calls = [self._values(name, function, arguments, len(rollouts)) for name, function in self._functions.items()]
        columns = await all_of(calls)
        return [self._result(values) for values in zip(*columns, strict=True)]

    def _result(self, values: Sequence[float | None]) -> Result:
        named = zip(self._functions, self._weights, values, strict=True)
        terms = {name: weight * value for name, weight, value in named if value is not None}
        if not terms:
            return failed("no reward function gave this completion a reward")
        return Result(reward=Reward(total=sum(terms.values()), terms=terms))

    async def _values(
        self, name: str, function: Callable[..., Any], arguments: dict[str, list[Any]], count: int
    ) -> list[float | None]:
        """What one function returns. Raises EnvironmentFailure naming it where that is no list of numbers."""
        try:
            clock = asyncio.timeout(SOONER * self._deadline_s)
            returned = await ask(partial(function, **arguments), clock=clock)
        except TimeoutError:
            late = f"took nearly all of grpo.execute_s = {self._deadline_s:g} s, or hangs"
            raise EnvironmentFailure(f"reward {name} {late}") from None
        except EnvironmentFailure as error:
            raise EnvironmentFailure(f"reward {name}: {error.__cause__!r}") from error
        values = list(returned) if hasattr(returned, "__iter__") else []
        if len(values) != count:
            raise EnvironmentFailure(f"reward {name} returned {len(values)} values for {count} completions")
        return [None if value is None else finite_number(f"what reward {name} returns", value) for value in values]


def _arguments(problem: Example, rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    size, texts = len(rollouts), [rollout.completions[-1] for rollout in rollouts]
    chat = not isinstance(problem.prompt, str)
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    ids = [[t for t, m in zip(r.token_ids, r.loss_mask, strict=True) if m] for r in rollouts]
    own: dict[str, list[Any]] = {"prompts": [problem.prompt] * size, "completions": completions, "completion_ids": ids}
    return {name: [value] * size for name, value in problem.columns.items()} | own


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
