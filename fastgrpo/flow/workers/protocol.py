"""Who answers the operators: anything with `ask` and `aclose`."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from fastgrpo.flow.types import Problem

Operator = Literal["generate", "custom", "review", "revise", "ensemble", "test"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One question. A real worker reads `messages` (chat turns, no secret in them) and `seed` only.

    `codes` and `feedback` repeat what the messages hold, for a simulated worker. `problem` carries the host's secrets:
    no worker may send it anywhere.
    """

    operator: Operator
    problem: Problem
    messages: list[dict[str, str]]
    codes: tuple[str, ...] = ()
    feedback: str = ""
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
    """A worker model."""

    async def ask(self, request: Request) -> Reply:
        """The answer to one request. Raises `WorkerError` or `RequestRejected`."""

    async def aclose(self) -> None:
        """Release connections."""
