"""Environments of the package `verifiers` as agents: its rollouts run as they are, with our engine behind its client.

Used of it are `load_environment`, `Environment.rollout` and the rubric's `score_group`, of versions 0.1.14 to 0.2.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, isawaitable, signature
from typing import Any

from fastgrpo.errors import UserError, described, said_by
from fastgrpo.ranks.collectives import STAGE_WAIT_S
from fastgrpo.ranks.deadlines import within
from fastgrpo.rollouts.environment import EnvironmentFailure, failed, finite_number
from fastgrpo.rollouts.session import Access
from fastgrpo.types import Result, Reward, Rollout

NEEDS = "pip install 'fastgrpo[verifiers]', and the environment's own package beside it"
# Its errors that the policy brought about: an empty answer, or a conversation that outgrew the model.
OWN_ERRORS = ("EmptyModelResponseError", "OverlongPromptError", "ToolParseError", "ToolCallError")
# Where a rollout's state has what a function of the rubric raised.
RAISED = "fastgrpo.raised"


@dataclass(frozen=True, slots=True)
class VerifiersProblem:
    """One row of an environment's data set. `row`: as the environment reads it."""

    id: str
    prompt: Any
    row: dict[str, Any]


class VerifiersEnvironment:
    """An `Agent` of the `environment` of verifiers: what its rubric gives is the reward, its metrics are logged."""

    def __init__(self, environment: Any) -> None:
        clients = importlib.import_module("verifiers.clients")
        self._environment, self._wrapped = environment, clients.OpenAIChatCompletionsClient
        _keep_errors(environment.rubric)

    def problems(self, *, held_out: bool) -> list[VerifiersProblem]:
        """The rows of the data set for training, or with `held_out` for evaluation; none where there is no such set."""
        if held_out and getattr(self._environment, "eval_dataset", None) is None:
            build = getattr(self._environment, "build_eval_dataset", None)
            if build is None or build() is None:
                return []
        rows = self._environment.get_eval_dataset() if held_out else self._environment.get_dataset()
        part = "eval" if held_out else "train"
        return [
            VerifiersProblem(f"{part}/{row.get('example_id', number)}", row["prompt"], row)
            for number, row in enumerate(rows)
        ]

    def prompt(self, problem: VerifiersProblem) -> str | list[dict[str, str]]:
        """The row's messages."""
        if isinstance(problem.prompt, str):
            return problem.prompt
        return [{"role": message["role"], "content": _text(message["content"])} for message in problem.prompt]

    async def act(self, problem: VerifiersProblem, access: Access, seed: int) -> Any:
        """The environment's own rollout; returns its state, which the rubric has not scored yet.

        Raises EnvironmentFailure for an error that the policy did not bring about.
        """
        client = self._wrapped(access.client())
        state = await self._environment.rollout(dict(problem.row), client, access.model, {})
        error = state.get("error")
        if error is not None and not _is_own(error):
            await self._environment.rubric.cleanup(state)
            raise EnvironmentFailure(f"the environment of verifiers failed: {_reason(error)}")
        return state

    async def results(self, problem: VerifiersProblem, rollouts: list[Rollout]) -> list[Result]:
        """The rubric's scores of the group; none for a rollout at which one of its functions raised."""
        states = [rollout.executions[-1] for rollout in rollouts]
        rubric = self._environment.rubric
        try:
            await rubric.score_group(states)
        finally:
            for state in states:
                await rubric.cleanup(state)
        return [_result(state) for state in states]


def is_verifiers(environment: Any) -> bool:
    """Whether it is an environment of verifiers."""
    return all(hasattr(environment, name) for name in ("rubric", "rollout", "get_dataset"))


def load_verifiers(name: str, arguments: str = "") -> VerifiersEnvironment:
    """The environment `name` with `arguments`, a JSON object. Raises UserError where it cannot be loaded.

    The process ends where its code hangs.
    """
    try:
        values = json.loads(arguments or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"data.environment_args is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"data.environment_args must be a JSON object, got {arguments!r}")
    late = f"the environment verifiers:{name} has not loaded in {STAGE_WAIT_S:g} s: its own code hangs"
    with within(STAGE_WAIT_S, late):
        return _loaded(name, values)


def _loaded(name: str, arguments: dict[str, Any]) -> VerifiersEnvironment:
    try:
        package = importlib.import_module("verifiers")
    except ImportError as error:
        raise UserError(f"verifiers:{name} needs the package verifiers ({error}): {NEEDS}") from error
    try:
        load = package.load_environment
    except AttributeError as error:
        version = getattr(package, "__version__", "of another version")
        raise UserError(f"verifiers {version} has no load_environment ({error}): {NEEDS}") from error
    try:
        return VerifiersEnvironment(load(name, **arguments))
    except (Exception, SystemExit) as error:
        # Loading runs the environment's own code. Of a package that lacks, verifiers tells another one's name.
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        why = said_by(error) if first is error else f"{said_by(error)}, from {described(first)}"
        raise UserError(f"the environment verifiers:{name} does not load: {why}") from error


def _keep_errors(rubric: Any) -> None:
    """Have the functions of a rubric, and of those that it is a group of, leave what they raise in the states.

    verifiers makes 0 of it, as of a wrong answer: where a judge cannot be reached, all would be wrong.
    """
    for part in getattr(rubric, "rubrics", ()):
        _keep_errors(part)
    functions = getattr(rubric, "funcs", [])
    functions[:] = [_telling(each, rubric._is_group_func(each)) for each in functions]


def _telling(function: Callable[..., Any], of_group: bool) -> Callable[..., Any]:
    """`function`, which is given the state besides, or a group's states, and leaves there what it raises.

    One that gives no number for a state has failed too.
    """
    taken, name = signature(function), "states" if of_group else "state"
    own_name = f"the rubric's {function.__name__}"
    parameters = list(taken.parameters.values())
    takes = name in taken.parameters or any(each.kind is Parameter.VAR_KEYWORD for each in parameters)

    @wraps(function)
    async def call(**given: Any) -> Any:
        states = given[name] if takes else given.pop(name)
        try:
            value = function(**given)
            value = await value if isawaitable(value) else value
            return value if of_group else finite_number(f"what {own_name} returns", value)
        except Exception as error:
            said = str(error) if isinstance(error, EnvironmentFailure) else f"{own_name} raised {described(error)}"
            for state in states if of_group else [states]:
                state.setdefault(RAISED, said)
            raise

    own = [] if takes else [Parameter(name, Parameter.KEYWORD_ONLY)]
    vars(call)["__signature__"] = taken.replace(parameters=[*parameters, *own])
    return call


def _result(state: Any) -> Result:
    if state.get(RAISED):
        return failed(state[RAISED])
    metrics = {name: value for name, value in (state.get("metrics") or {}).items() if value is not None}
    if state.get("reward") is None:
        return failed("the rubric gave no reward")
    record = {"stop_condition": str(state.get("stop_condition")), "turns": len(state.get("trajectory") or ())}
    status = "truncated" if state.get("is_truncated") else "ok"
    return Result(status=status, reward=Reward(total=state["reward"]), metrics=metrics, record=record)


def _is_own(error: Any) -> bool:
    return any(kind.__name__ in OWN_ERRORS for kind in type(error).__mro__)


def _reason(error: Any) -> str:
    cause = getattr(error, "__cause__", None)
    return f"{type(error).__name__}: {error or cause or 'no reason given'}"


def _text(content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "".join(part.get("text", "") for part in content)
    return content or ""
