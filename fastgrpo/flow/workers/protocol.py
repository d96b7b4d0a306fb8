"""Who answers the operators: anything with `ask` and `aclose`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import msgspec

from fastgrpo.flow.types import Problem

# "judge" is the host's own question, which no workflow can ask.
Operator = Literal["generate", "custom", "review", "revise", "ensemble", "test", "judge"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One question. A real worker reads `messages` (chat turns, no secret in them) and what follows `feedback` only.

    `codes` and `feedback` repeat what the messages hold, for a simulated worker. `problem` carries the host's secrets:
    no worker may send it anywhere. `worker` is one of the worker's `names`, empty the first; `temperature` None is its
    own. A worker enters `waiting()` while the request waits for its turn or for its next attempt: no deadline runs
    meanwhile, and the request's own begins anew after it.
    """

    operator: Operator
    problem: Problem
    messages: list[dict[str, str]]
    codes: tuple[str, ...] = ()
    feedback: str = ""
    worker: str = ""
    temperature: float | None = None
    seed: int = 0
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One answer and its account: tokens, US dollars, seconds from the sending of what was answered to the answer."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    seconds: float = 0.0


class WorkerError(Exception):
    """The worker failed: endpoint unreachable, deadline, retries exhausted. Infrastructure, not the policy's fault."""


class NoAnswer(WorkerError):
    """The worker answered without a word: cut off while it reasoned, filtered, refused, or a tool call instead."""


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
