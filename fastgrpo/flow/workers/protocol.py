"""Who answers the operators: anything with `ask` and `aclose`."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from fastgrpo.flow.types import Problem

Operator = Literal["generate", "custom", "review", "revise", "ensemble", "test"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One question. A real worker reads `messages` (chat turns, no secret in them) and the three last fields only.

    `worker` is one of the worker's `names`, `temperature` None its own one.

    `codes` and `feedback` repeat what the messages hold, for a simulated worker. `problem` carries the host's secrets:
    no worker may send it anywhere.
    """

    operator: Operator
    problem: Problem
    messages: list[dict[str, str]]
    codes: tuple[str, ...] = ()
    feedback: str = ""
    worker: str = ""
    temperature: float | None = None
    seed: int = 0


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One answer and its account: tokens, US dollars, seconds of latency."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    seconds: float = 0.0


class WorkerError(Exception):
    """The worker failed: endpoint unreachable, deadline, retries exhausted. Infrastructure, not the policy's fault."""


class RequestRejected(Exception):
    """The worker will not answer this one request, e.g. because it exceeds its context: the workflow's fault."""


class Worker(Protocol):
    """A worker model; or several, if it has `names`: what a workflow may choose from, the default first."""

    async def ask(self, request: Request) -> Reply:
        """The answer to one request. Raises `WorkerError` or `RequestRejected`."""

    async def aclose(self) -> None:
        """Release connections."""


def names_of(worker: Worker) -> tuple[str, ...]:
    """What a workflow may call the worker's models, the default first."""
    names: tuple[str, ...] = getattr(worker, "names", ("worker",))
    return names
