"""The contract between the engine and a task, in two forms, and the border where what a task returns is checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

from fastgrpo.errors import UserError, place_of, said_by, shown
from fastgrpo.ranks.deadlines import within
from fastgrpo.types import INFRASTRUCTURE, Result, Reward, Rollout

if TYPE_CHECKING:
    from fastgrpo.rollouts.session import Access

# How long a task's code may hold the event loop beyond the deadline it has, if any: nothing else can end it there.
BLOCKED_S = 60.0
# Squares of a group's rewards are summed in single precision.
LARGEST_REWARD = 1e15


class Environment(Protocol):
    """What the loop needs from a task: any object with these four methods trains with the same engine.

    Problems are objects of the task's own with a unique `id`; so is what `execute` returns. `execute` and `results` may
    be coroutines or plain functions; a plain one runs in a thread, so that decoding goes on meanwhile. `prompt`, and
    `feedback_text` where it is plain, run in the loop's own thread: they must not wait. A reward that changes while the
    policy learns has a method more, `at_step(step)` (see the function of that name).
    """

    def prompt(self, problem: Any) -> str | list[dict[str, str]]:
        """The text that the policy reads first, or the messages of a conversation."""

    def execute(self, problem: Any, completion: str, seed: int) -> Any:
        """Run one completion. One that raises or outlasts `grpo.execute_s` leaves its rollout without a reward.

        `seed` is for all that the task draws. In training it is the same for the whole group: rewards then compare what
        the policy wrote and not luck.
        """

    def feedback_text(self, execution: Any) -> str | Awaitable[str | None] | None:
        """What the policy reads between two rounds; None ends the rollout."""

    def results(self, problem: Any, rollouts: list[Rollout]) -> list[Result] | Awaitable[list[Result]]:
        """One result for each rollout of a group, from its `executions`, one a round."""


@runtime_checkable
class Agent(Protocol):
    """What takes the place of an `Environment` where the task calls the policy, and not the policy the task.

    Any object with these three methods. `act` and `results` may be coroutines or plain functions, which run in threads.
    """

    def prompt(self, problem: Any) -> str | list[dict[str, str]]:
        """What the first request will show the policy: its length is checked, and it is kept in the records."""

    def act(self, problem: Any, access: Access, seed: int) -> Any:
        """One rollout, with the policy behind `access`; what it returns is the rollout's only execution.

        One that raises, asks the policy for nothing, or lets `grpo.execute_s` pass without a request under way leaves
        its rollout without a reward.
        """

    def results(self, problem: Any, rollouts: list[Rollout]) -> list[Result] | Awaitable[list[Result]]:
        """One result for each rollout of a group, from its `executions`."""


def _methods(environment: Any) -> dict[str, int]:
    """Those of an `Agent` where it has `act`, else of an `Environment`, each with how many values it is called with."""
    own = {"act": 3} if hasattr(environment, "act") else {"execute": 3, "feedback_text": 1}
    return {"prompt": 1, "results": 2, **own}


def lacking(environment: Any) -> list[str]:
    """The methods that it lacks to be an `Environment` or an `Agent`."""
    return [name for name in _methods(environment) if not callable(getattr(environment, name, None))]


def misfit(environment: Any) -> str:
    """Why a method of one that lacks none cannot be called as the loop calls it; empty where all can."""
    if inspect.iscoroutinefunction(environment.prompt):
        return "prompt is a coroutine, and must be plain: have what it waits for ready before"
    for name, count in _methods(environment).items():
        try:
            inspect.signature(getattr(environment, name)).bind(*range(count))
        except ValueError:  # nobody knows what it takes
            continue
        except TypeError as error:
            return f"{name} is called with {count} values: {error}"
    return ""


def at_step(environment: Environment | Agent, step: int) -> Environment | Agent:
    """The environment of the rollouts of training step `step`, from 0: what its method `at_step` gives, else itself.

    Asked for each batch of rollouts, those of `grpo.refill` too; evaluations have the plain one. Raises UserError where
    that method raises or gives no environment.
    """
    change = getattr(environment, "at_step", None)
    if not callable(change):
        return environment
    found = _asked("at_step", change, step, f"the training step {step}")
    if lacking(found):
        kind, given = type(environment).__name__, type(found).__name__
        raise UserError(
            f"at_step of {kind} must return an environment, as docs/own-task.md has it, and gave {given}: mend it, or "
            "call it otherwise where it is something else"
        )
    return found


def _asked(name: str, method: Callable[[Any], Any], argument: Any, what: str) -> Any:
    """The value of a task's `method`, called `name`, for `what`. Raises UserError naming both where it raises.

    The process ends where it blocks: it runs in the loop's own thread.
    """
    blocked = f"{name} has held the event loop for {BLOCKED_S:g} s for {what}, in which nothing else goes on"
    try:
        with within(BLOCKED_S, f"{blocked}: have what it waits for ready before, then continue with --resume"):
            return method(argument)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{name} raised {type(error).__name__} for {what}: {said_by(error)}{place_of(error)}"
        ) from error


class EnvironmentFailure(Exception):
    """The environment raised, hung or returned what is no result; the message is one sentence."""


def prompt_of(prompt: Callable[[Any], Any], problem: Any) -> str | list[dict[str, str]]:
    """What a task's `prompt` gives for the problem.

    Raises UserError, with the problem's id, where it raises or gives neither text nor messages.
    """
    given = _asked("prompt", prompt, problem, f"the problem {name_of(problem)}")
    said = given if isinstance(given, list) else [{"role": "user", "content": given}]
    if not said or not all(is_message(message) for message in said):
        raise UserError(
            f"prompt must give a text, or messages with role and content, and gave {shown(given)} for the problem "
            f"{name_of(problem)}"
        )
    return given


def is_message(message: Any) -> bool:
    """Whether it is a message of a conversation in plain text."""
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def checked_results(results: Any, count: int) -> list[Result]:
    """`results` as `count` sound results: numbers are finite floats, and a reward is there unless the task failed.

    Raises EnvironmentFailure naming what is wrong.
    """
    if not isinstance(results, list | tuple) or len(results) != count:
        found = f"{len(results)} values" if isinstance(results, list | tuple) else type(results).__name__
        raise EnvironmentFailure(
            f"results must return a list with one Result for each of {count} rollouts, got {found}"
        )
    try:
        return [_checked(result) for result in results]
    except EnvironmentFailure:
        raise
    except Exception as error:
        # In a record text that is no Unicode or a number too large.
        raise EnvironmentFailure(f"a Result has a field that cannot be read: {said_by(error)}") from None


def _checked(result: Any) -> Result:
    if not isinstance(result, Result):
        raise EnvironmentFailure(f"results must return fastgrpo.types.Result objects, got {type(result).__name__}")
    at = None if result.answered_at is None else finite_number("answered_at", result.answered_at)
    plain = Result(
        status=as_text(result.status), error=as_text(result.error), record=_plain_record(result.record), answered_at=at
    )
    if result.status == INFRASTRUCTURE:
        return plain
    if result.reward is not None and not isinstance(result.reward, Reward):
        raise EnvironmentFailure(
            f"a Result's reward is a fastgrpo.types.Reward, as Reward(total=1.0), got {shown(result.reward)}"
        )
    if result.reward is None:
        raise EnvironmentFailure(f"a result of status {result.status!r} has no reward")
    total = finite_number("the reward", result.reward.total)
    if abs(total) > LARGEST_REWARD:
        raise EnvironmentFailure(f"the reward must be at most {LARGEST_REWARD:g}, either way, got {total:g}")
    weights = _numbers("the reward's weight", result.reward.weights)
    if below := [name for name, weight in weights.items() if weight < 0]:
        raise EnvironmentFailure(f"the reward's weight {below[0]!r} must be 0 or more, as its term has the sign")
    reward = Reward(total=total, terms=_numbers("the reward's term", result.reward.terms), weights=weights)
    return msgspec.structs.replace(plain, reward=reward, metrics=_numbers("the metric", result.metrics))


def _numbers(what: str, values: Mapping[str, Any]) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise EnvironmentFailure(f"{what}s must be a dict, got {type(values).__name__}")
    if odd := [name for name in values if not isinstance(name, str)]:
        raise EnvironmentFailure(f"{what} {shown(odd[0])} needs a text as its name")
    return {as_text(name): finite_number(f"{what} {name!r}", value) for name, value in values.items()}


def _plain_record(record: Any) -> dict[str, Any]:
    """A copy as samples.jsonl shows it, which checkpoints and other ranks can hold; objects as Python shows them."""
    if not isinstance(record, Mapping):
        raise EnvironmentFailure(f"a Result's record must be a dict, got {type(record).__name__}")
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(dict(record), enc_hook=repr))
    msgspec.msgpack.encode(plain)  # as a checkpoint does, which holds no number of more than 64 bits
    return plain


def name_of(problem: Any) -> str:
    """The problem's `id` as text, as it is logged and kept: ids may be numbers, too."""
    return as_text(problem.id)


def as_text(value: Any) -> str:
    """`value` as text that files can hold."""
    return str(value).encode(errors="replace").decode()


def finite_number(what: str, value: Any) -> float:
    """`value` as a float; raises EnvironmentFailure naming `what` where it is none, or not finite.

    A text is none, though `float` would read the number in it.
    """
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError
        number = float(value)
    except Exception:  # an OverflowError of 10**400, whatever a type's own __float__ raises
        raise EnvironmentFailure(f"{what} must be a number, got {shown(value)}") from None
    if not math.isfinite(number):
        raise EnvironmentFailure(f"{what} must be finite, got {number}")
    return number


def failed(reason: str) -> Result:
    """The result of a rollout that a failure of the environment ended."""
    return Result(status=INFRASTRUCTURE, error=as_text(reason))
