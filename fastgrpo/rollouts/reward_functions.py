"""An environment made of reward functions in TRL's form: `f(prompts, completions, completion_ids, **columns)`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Parameter, isawaitable, signature
from itertools import islice
from numbers import Real
from sys import float_info
from typing import Any

import msgspec

from fastgrpo.errors import UserError, described, shown
from fastgrpo.rollouts.asking import all_of, ask
from fastgrpo.rollouts.dataset import Example, Message
from fastgrpo.rollouts.environment import EnvironmentFailure, failed, finite_number
from fastgrpo.types import Result, Reward, Rollout

# Of its deadline: that of all together, which names none, comes after it.
SOONER = 0.95
TRLS_OWN = ("trainer_state", "log_extra", "log_metric")
# What no column of a data set can be called.
OWN = ("prompts", "completions", "completion_ids", *TRLS_OWN)
# What a function is given only where it names it or takes `**`.
WHERE_TAKEN = ("id", *TRLS_OWN)


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a reward function's `trainer_state` tells: the training step of its rollouts, from 0, and the steps in all.

    Evaluations have `global_step` = `max_steps`, so that one reward measures the policy before and after.
    """

    global_step: int = 0
    max_steps: int = 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has no {name} here, but global_step and max_steps")


@dataclass(slots=True)
class _Logged:
    """What functions log of a group of `count` rollouts."""

    count: int
    columns: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """TRL's: a value for each completion, kept in its record."""
        if len(listed := list(values)) != self.count:
            raise ValueError(f"log_extra got {len(listed)} values of {column!r} for {self.count} completions")
        self.columns[column] = listed

    def log_metric(self, name: str, value: float) -> None:
        """TRL's: a number of the group, of which the mean is logged. NaN, as the mean of nothing, does not count."""
        if value == value:
            self.metrics.setdefault(name, []).append(finite_number(f"the metric {name!r} of log_metric", value))

    def added_to(self, results: Sequence[Result]) -> list[Result]:
        """The rollouts' results, each with the metrics' means and its own values of the columns."""
        means = {name: sum(values) / len(values) for name, values in self.metrics.items()}
        return [
            msgspec.structs.replace(
                result, metrics=means, record={name: each[i] for name, each in self.columns.items()}
            )
            for i, result in enumerate(results)
        ]


class RewardFunctions:
    """The environment of `functions`, whose weighted values add up to the reward.

    Each is called with the lists `prompts`, `completions` and `completion_ids` of one group and a list of each column
    of the data set, and returns a number for each completion; None = does not apply to it. A completion to which none
    applies is left out of its group's baseline. Functions may be coroutines or plain, which run in threads; each has
    `deadline_s`. Completions are texts, or where the prompt is a conversation, lists of one assistant message.
    Those that take them get TRL's `trainer_state`, which is `state`, `log_extra` and `log_metric` too.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        weights: Sequence[float] | None = None,
        *,
        deadline_s: float,
        state: TrainerState | None = None,
    ) -> None:
        if other := [each for each in functions if not callable(each) or hasattr(each, "forward")]:
            raise UserError(
                f"reward takes functions, got {shown(other[0])}: from the shell --reward MODULE:FUNCTION, and around a "
                "reward model a function that asks it"
            )
        names = [_name(function) for function in functions]
        if double := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"reward has two functions called {double[0]}: rewards are logged by name, so set another __name__"
            )
        self._functions = dict(zip(names, functions, strict=True))
        self._weights = _weights(weights, len(functions))
        self._deadline_s = deadline_s
        self._state = state or TrainerState()

    def at_step(self, step: int) -> RewardFunctions:
        """The same for the rollouts of training step `step`."""
        changed = copy(self)
        changed._state = replace(self._state, global_step=step)
        return changed

    def refuse_misfit(self, row: Example) -> None:
        """Raise UserError naming the function that cannot be called with what it would be given for the `row`.

        And where the row has a column by the name of what functions are given besides.
        """
        if taken := [name for name in OWN if name in row.columns]:
            raise UserError(
                f"the data set has a column {taken[0]!r}, and by that name reward functions are given what is the "
                "rollouts' own: rename the column, or leave it out"
            )
        given = _arguments(row, []).keys() | set(TRLS_OWN)
        for name, function in self._functions.items():
            taken = sorted(given - _refused(function))
            try:
                signature(function).bind(**dict.fromkeys(taken))
            except ValueError:  # nobody knows what it takes
                continue
            except TypeError as error:
                fix = ": end its arguments with **_" if "unexpected" in str(error) else ""
                raise UserError(
                    f"reward {name} cannot be called: {error}; it is given {', '.join(taken)}{fix} (docs/own-task.md "
                    "has the form, and what makes it of verl's and OpenRLHF's)"
                ) from None

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
        logged = _Logged(len(rollouts))
        own = zip(TRLS_OWN, (self._state, logged.log_extra, logged.log_metric), strict=True)
        arguments = _arguments(problem, rollouts) | dict(own)
        calls = [self._values(name, function, arguments, len(rollouts)) for name, function in self._functions.items()]
        columns = await all_of(calls)
        return logged.added_to([self._result(values) for values in zip(*columns, strict=True)])

    def _result(self, values: Sequence[float | None]) -> Result:
        named = zip(self._functions, self._weights, values, strict=True)
        terms = {name: weight * value for name, weight, value in named if value is not None}
        if not terms:
            return failed("no reward function gave this completion a reward")
        weights = {name: abs(weight) for name, weight in zip(self._functions, self._weights, strict=True)}
        return Result(reward=Reward(total=sum(terms.values()), terms=terms, weights=weights))

    async def _values(
        self, name: str, function: Callable[..., Any], arguments: dict[str, Any], count: int
    ) -> list[float | None]:
        """What one function returns. Raises EnvironmentFailure naming it where that is no list of numbers."""
        refused = _refused(function)

        async def awaited(returned: Awaitable[Any]) -> list[Any]:
            return _listed(name, await returned, count)

        def called() -> Any:
            # In a thread, where the body of a generator runs too. What it changes is its own, as where a loader of rows
            # makes them anew for each step.
            returned = function(**{key: _own(value) for key, value in arguments.items() if key not in refused})
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
        what = f"what reward {name} returns, None where it does not apply,"
        return [None if value is None else finite_number(what, value) for value in values]


def _refused(function: Callable[..., Any]) -> set[str]:
    """Those of `WHERE_TAKEN` that the function does not take."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):  # of what is written in C
        return set(WHERE_TAKEN)
    if any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
        return set()
    return set(WHERE_TAKEN) - {each.name for each in parameters}


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
    while isinstance(function, partial) and not hasattr(function, "__name__"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
