"""Agents: tasks that drive a rollout themselves, through the OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol, runtime_checkable

from fastgrpo.rollouts.endpoint import Endpoint
from fastgrpo.rollouts.environment import EnvironmentFailure, ask, failed
from fastgrpo.rollouts.session import Access
from fastgrpo.types import Result, Rollout


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


async def act(agent: Agent, problem: Any, endpoint: Endpoint, seed: int, execute_s: float) -> Rollout:
    """One rollout of an agent's, with all that the policy wrote in it; raises what the engine raised."""
    reason, execution = "", None
    with endpoint.session(seed) as (session, access):
        try:
            execution = await ask(agent.act, problem, access, seed, clock=session.clock)
        except TimeoutError:
            reason = f"act took longer than grpo.execute_s = {execute_s:g} s without a request to the policy"
        except EnvironmentFailure as error:
            reason = str(error)
        if session.failure is not None:
            raise session.failure
        rollout = session.rollout()
    if not reason and not rollout.completions:
        reason = "act returned without a request to the policy"
    if reason:
        rollout.result = failed(f"{problem.id}: {reason}")
    else:
        rollout.executions.append(execution)
    return rollout
