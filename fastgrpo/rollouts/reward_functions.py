"""An environment made of reward functions in TRL's form: `f(prompts, completions, completion_ids, **columns)`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from inspect import isawaitable
from itertools import islice
from numbers import Real
from sys import float_info
from typing import Any

from fastgrpo.errors import UserError, described, shown
from fastgrpo.rollouts.asking import all_of, ask
from fastgrpo.rollouts.dataset import Example, Message
from fastgrpo.rollouts.environment import EnvironmentFailure, failed, finite_number
from fastgrpo.types import Result, Reward, Rollout

# Of its deadline: that of all together, which names none, comes after it.
SOONER = 0.95


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
            raise UserError(f"reward takes functions, got {shown(other[0])}: from the shell --reward MODULE:FUNCTION")
        names = [_name(function) for function in functions]
        if double := [name for name in names if names.count(name) > 1]:
            raise UserError(f"reward has two functions called {double[0]}: rewards are logged by name, so rename one")
        self._functions = dict(zip(names, functions, strict=True))
        self._weights = _weights(weights, len(functions))
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

        async def awaited(returned: Awaitable[Any]) -> list[Any]:
            return _listed(name, await returned, count)

        def called() -> Any:
            # In a thread, where the body of a generator runs too. What it changes is its own, as where a loader of rows
            # makes them anew for each step.
            returned = function(**{column: [_own(value) for value in values] for column, values in arguments.items()})
            return awaited(returned) if isawaitable(returned) else _listed(name, returned, count)

        called.__name__ = f"reward {name}"
        try:
            values = await ask(called, clock=asyncio.timeout(SOONER * self._deadline_s))
        except TimeoutError:
            late = f"took nearly all of grpo.execute_s = {self._deadline_s:g} s, or hangs"
            raise EnvironmentFailure(f"reward {name} {late}") from None
        except EnvironmentFailure as error:
            if error.__cause__ is None:
                raise
            raise EnvironmentFailure(f"reward {name}: {described(error.__cause__)}") from error
        return [None if value is None else finite_number(f"what reward {name} returns", value) for value in values]


def _own(value: Any) -> Any:
    """A copy of lists and dicts, with all that they hold of such."""
    if isinstance(value, list):
        return [_own(item) for item in value]
    return {key: _own(item) for key, item in value.items()} if type(value) is dict else value


def _listed(name: str, returned: Any, count: int) -> list[Any]:
    """What the reward `name` returned, as `count` values. Raises EnvironmentFailure where it is nothing of the kind."""
    unordered = isinstance(returned, Mapping | Set | str | bytes)
    if unordered or not hasattr(returned, "__iter__") or getattr(returned, "ndim", 1) == 0:
        raise EnvironmentFailure(
            f"reward {name} must return a list with a number for each of {count} completions, got "
            f"{type(returned).__name__}"
        )
    values = list(islice(returned, count + 1))
    if len(values) != count:
        found = f"more than {count}" if len(values) > count else str(len(values))
        raise EnvironmentFailure(f"reward {name} returned {found} values for {count} completions")
    return values


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """A weight for each of `count` functions. Raises UserError where they are none."""
    if weights is None:
        return [1.0] * count
    if isinstance(weights, Mapping | Set | str) or not hasattr(weights, "__len__"):
        raise UserError(f"reward_weights must be a list of numbers, one for each function, got {shown(weights)}")
    if odd := [weight for weight in weights if not isinstance(weight, Real) or not abs(weight) <= float_info.max]:
        raise UserError(f"weights of reward functions are finite numbers, got {shown(odd[0])}")
    if len(weights) != count:
        raise UserError(f"reward_weights has {len(weights)} values for {count} reward functions: give one for each")
    return [float(weight) for weight in weights]


def _arguments(problem: Example, rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    size, texts = len(rollouts), [rollout.completions[-1] for rollout in rollouts]
    chat = not isinstance(problem.prompt, str)
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    ids = [[t for t, m in zip(r.token_ids, r.loss_mask, strict=True) if m] for r in rollouts]
    own: dict[str, list[Any]] = {"prompts": [problem.prompt] * size, "completions": completions, "completion_ids": ids}
    return {name: [value] * size for name, value in problem.columns.items()} | own


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
