"""Environments of the package `verifiers` as agents: its episodes run as they are, with our engine behind its client.

Used of it is `verifiers.v1` as of 0.4: `resolve_env_config`, `load_environment`, `Env.serving` and `Env.run_episode`.
"""

from __future__ import annotations

import importlib
import json
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from fastgrpo.errors import UserError, described, said_by
from fastgrpo.ranks.collectives import STAGE_WAIT_S
from fastgrpo.ranks.deadlines import within
from fastgrpo.rollouts.environment import EnvironmentFailure, checked_results, failed
from fastgrpo.rollouts.session import Access
from fastgrpo.types import Result, Reward, Rollout

NEEDS = "pip install 'fastgrpo[verifiers]', and the environment's own package beside it"
TWO = (
    "more than one run of an agent asks the policy, as players, best-of-n and retries do, and each has a reward of its "
    "own: give the other agents a client and a model of theirs"
)
# A variable that nobody sets: the client's key is in each rollout's id, and no key of the user's goes to the endpoint.
NO_KEY = "FASTGRPO_SETS_NO_KEY"
# Deadlines of stages whose end leaves nothing to score. That of the agent's own time is scored, as a limit of turns is.
UNSCORED = ("setup_timeout", "finalize_timeout", "scoring_timeout")


@dataclass(frozen=True, slots=True)
class VerifiersProblem:
    """One task of an environment. `prompt`: the messages that it begins with; `task`: as the environment reads it."""

    id: str
    prompt: list[dict[str, str]]
    task: Any


class VerifiersEnvironment:
    """An `Agent` of the `environment` of verifiers: what its task gives is the reward, its metrics are logged.

    Raises UserError where the policy's code would run on this host.
    """

    def __init__(self, environment: Any) -> None:
        self._environment, self._package = environment, importlib.import_module("verifiers.v1")
        config = environment.config
        for name, harness in config.agent_harnesses().items():
            on_host = isinstance(getattr(config, name).runtime, self._package.SubprocessConfig)
            if on_host and self._package.load_harness(harness).EXECUTES_CODE:
                raise UserError(
                    f"the harness {harness.id} of {name} would run what the policy writes on this machine itself: give "
                    f"{name}.runtime another type than subprocess, as docker, or {name}.harness the id null, which "
                    "runs nothing"
                )

    def serving(self) -> AbstractAsyncContextManager[Any]:
        """What its rollouts share, tools' servers say, in the length of the block."""
        return self._environment.serving()

    def problems(self, count: int) -> list[VerifiersProblem]:
        """Its tasks; the first `count` of a set without end. Raises UserError where that has no count."""
        tasks = self._environment.taskset
        if not tasks.bounded:
            if not count:
                raise UserError("the environment makes tasks without end: say by data.problems how many are drawn")
            tasks = tasks.take(count)
        return [VerifiersProblem(str(task.data.idx), _prompt(task.data), task) for task in tasks]

    def prompt(self, problem: VerifiersProblem) -> list[dict[str, str]]:
        """The task's messages; a harness may put its own before them."""
        return problem.prompt

    async def act(self, problem: VerifiersProblem, access: Access, seed: int) -> Any:
        """The environment's own episode; returns the trace of the agent that is the policy, scored.

        Raises EnvironmentFailure for what the environment does not take for a valid result.
        """
        client = self._package.EvalClientConfig(base_url=access.base_url, api_key_var=NO_KEY)
        traces: list[Any] = []

        def mint(trace: Any) -> None:
            if trace.agent.config.client != client:
                return
            traces.append(trace)
            if len(traces) > 1:
                raise EnvironmentFailure(TWO)
            # Its client sends this with each request, so that a router knows whose it is, as our endpoint does.
            trace.id = access.api_key

        context = self._package.ModelContext(model=access.model, client=client)
        episode = await self._environment.run_episode(problem.task, context, on_trace=mint)
        if len(traces) > 1:
            raise EnvironmentFailure(TWO)
        if not self._environment.complete(episode):
            raise EnvironmentFailure(f"the environment of verifiers failed: {_reason(episode)}")
        if not traces:
            raise EnvironmentFailure("none of the environment's agents asks the policy: leave a client and model out")
        return traces[0]

    async def results(self, problem: VerifiersProblem, rollouts: list[Rollout]) -> list[Result]:
        """The scores that the traces have."""
        return [_result(rollout.executions[-1]) for rollout in rollouts]


def is_verifiers(environment: Any) -> bool:
    """Whether it is an environment of verifiers."""
    return all(hasattr(environment, name) for name in ("taskset", "serving", "run_episode"))


def load_verifiers(name: str, arguments: str = "") -> VerifiersEnvironment:
    """The environment of the taskset `name` with `arguments`, the table `[env]` of verifiers as a JSON object.

    Raises UserError where it cannot be loaded. The process ends where its code hangs.
    """
    try:
        values = json.loads(arguments or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"data.environment_args is no JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("taskset", {}), dict):
        raise UserError(f"data.environment_args must be a JSON object, its taskset too, got {arguments!r}")
    late = f"the environment verifiers:{name} has not loaded in {STAGE_WAIT_S:g} s: its own code hangs"
    with within(STAGE_WAIT_S, late):
        return _loaded(name, values)


def _loaded(name: str, arguments: dict[str, Any]) -> VerifiersEnvironment:
    try:
        package = importlib.import_module("verifiers.v1")
    except ImportError as error:
        raise UserError(f"verifiers:{name} needs the package verifiers ({error}): {NEEDS}") from error
    try:
        resolve, load = package.resolve_env_config, package.load_environment
    except AttributeError as error:
        raise UserError(f"verifiers {_version()} is too old ({error}): {NEEDS}") from error
    try:
        config = resolve(arguments | {"taskset": arguments.get("taskset", {}) | {"id": name}})
        return VerifiersEnvironment(load(config))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        # Loading runs the environment's own code.
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        why = said_by(error) if first is error else f"{said_by(error)}, from {described(first)}"
        old = "; one of verifiers' v0, with load_environment, needs verifiers 0.2.0 and an agent (docs/own-task.md)"
        was = old if isinstance(error, AttributeError) else ""
        raise UserError(f"the environment verifiers:{name} does not load: {why}{was}") from error


def _version() -> str:
    return str(getattr(importlib.import_module("verifiers"), "__version__", "of another version"))


def _prompt(data: Any) -> list[dict[str, str]]:
    said = [] if data.system_prompt is None else [("system", data.system_prompt)]
    given = data.prompt
    said += [(each.role, each.content) for each in given] if isinstance(given, list) else [("user", given)]
    return [{"role": role, "content": _text(content)} for role, content in said]


def _text(content: Any) -> str:
    return "".join(getattr(part, "text", "") for part in content) if isinstance(content, list) else content or ""


def _reason(episode: Any) -> str:
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    return f"{errors[0].type}: {errors[0].message}" if errors else "no reason given"


def _result(trace: Any) -> Result:
    if trace.stop_condition in UNSCORED:
        return failed(f"the environment of verifiers failed: {trace.stop_condition}")
    if not trace.rewards or None in trace.rewards.values():
        unscored = [name for name, reward in trace.rewards.items() if reward is None]
        return failed(f"the task gave no reward {', '.join(unscored)}".rstrip())
    result = Result(
        status="truncated" if trace.is_truncated or trace.is_timeout else "ok",
        reward=Reward(total=trace.reward, terms={name: reward.value for name, reward in trace.rewards.items()}),
        metrics={name: value for name, value in trace.metrics.items() if value is not None},
        record={"stop_condition": str(trace.stop_condition), "turns": trace.num_turns},
    )
    try:
        return checked_results([result], 1)[0]
    except EnvironmentFailure as error:  # not its whole group's, where a score is no finite number
        return failed(str(error))
