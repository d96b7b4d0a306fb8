"""What an agent writes with the policy in one rollout: its conversations, in the token ids that were sampled.

A request that repeats a conversation and adds to it is appended to that conversation's ids; nothing is tokenised twice.
One that changed what was said, as where thoughts are dropped or the history is summed up, begins a trace of its own.
Either way each trained token was sampled after exactly the ids that stand before it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fastgrpo.errors import UserError
from fastgrpo.rollouts.openai_form import MODEL, Answer, Message, Refused, Request, answer_of
from fastgrpo.rollouts.tool_calls import split_calls
from fastgrpo.types import Rollout, Sampling, Trace

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from fastgrpo.engine.completion import Completion
    from fastgrpo.policy.chat import Chat

# Requests of one rollout that may be under way at once.
AT_ONCE = 16
# Beginnings of conversations that are kept, in a batch of rollouts.
KNOWN = 1024
# (prompt ids, most new tokens, seed, texts that end it) -> completion.
Complete = Callable[[list[int], int, int, tuple[str, ...]], Awaitable["Completion"]]


class Access(NamedTuple):
    """What an OpenAI client needs to reach the policy on behalf of one rollout.

    `client()` is one that is made for it, in the rollout's own loop cheaper than any over HTTP, elsewhere over HTTP.
    """

    base_url: str
    api_key: str
    client: Callable[[], AsyncOpenAI]
    model: str = MODEL


class FirstPrompts:
    """Ids of how conversations begin, made once for all that begin alike: a group's rollouts do."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._known: dict[str, list[int]] = {}

    def ids(self, messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
        """`Chat.prompt_ids` of the messages."""
        turns = [message.turn() for message in messages]
        said = repr((turns, tools))
        if said not in self._known:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[said] = self._chat.prompt_ids(turns, tools)
        return self._known[said]


@dataclass(slots=True, eq=False)
class _Conversation:
    messages: list[Message]
    tools: list[dict[str, Any]]
    trace: Trace


class Session:
    """One rollout's part of the endpoint: `key` opens it, `clock` runs while its agent has no request under way.

    `failure` is what the engine raised, of which the agent is told no more than that it failed.
    """

    def __init__(
        self, complete: Complete, chat: Chat, sampling: Sampling, seed: int, first_prompts: FirstPrompts
    ) -> None:
        self._complete, self._chat, self._sampling, self._seed = complete, chat, sampling, seed
        self._first_prompts = first_prompts
        self.key = secrets.token_hex(16)  # as verifiers' own ids of rollouts are, of which it becomes one
        self.clock = asyncio.timeout(sampling.execute_s)
        self.failure: Exception | None = None
        self._conversations: list[_Conversation] = []
        self._texts: list[str] = []
        self._writing_s, self._truncated, self._turns, self._closed = 0.0, False, 0, False
        self._under_way: set[asyncio.Task[Any]] = set()

    async def answer(self, request: Request) -> Answer:
        """The policy's next message. Raises Refused."""
        request.refuse_impossible()
        before, ids = self._prompt(request)
        most = request.limit or self._sampling.max_new_tokens
        room = min(most, self._sampling.max_new_tokens, self._sampling.max_model_len - len(ids))
        self._refuse_excess(len(ids))
        turn, self._turns = self._turns, self._turns + 1
        completion = await self._completion(ids, room, self._seed + turn, request.stops)
        # It may have ended just as this was there.
        self._refuse_ended()
        text = self._chat.text(completion.token_ids)
        told = request.before_stop(text)
        said, calls = split_calls(told, request.callable_tools) if request.callable_tools else (told, [])
        message = answer_of(said, calls, turn)
        self._record(before, ids, request, message, completion)
        self._texts.append(text)
        self._truncated = completion.finish_reason == "length"
        ended = "length" if self._truncated else "tool_calls" if calls else "stop"
        pieces = [self._chat.piece(token) for token in completion.token_ids] if request.logprobs else ()
        return Answer(ids, completion.token_ids, completion.logprobs, pieces, message, ended)

    def rollout(self) -> Rollout:
        """All that was written so far: the first conversation, the others as its branches."""
        traces = [conversation.trace for conversation in self._conversations] or [Trace([], [], [])]
        first = traces[0]
        return Rollout(
            first.token_ids,
            first.loss_mask,
            first.logprobs,
            self._texts,
            versions=first.versions,
            routes=first.routes,
            truncated=self._truncated,
            writing_s=self._writing_s,
            branches=traces[1:],
        )

    async def close(self) -> None:
        """Cancel what is under way and wait for its end; nothing is recorded from now on."""
        self._closed = True
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _prompt(self, request: Request) -> tuple[_Conversation | None, list[int]]:
        """The conversation that the request goes on with, None for a new one, and the ids to write after."""
        tools, chat = request.tools or [], self._chat
        if tools and not chat.tokenizer.chat_template:
            raise Refused("the policy has no chat template, so that tools cannot be shown", "no_template")
        try:
            if (before := self._continued(request)) is not None:
                new = [message.turn() for message in request.messages[len(before.messages) :]]
                ids = before.trace.token_ids
                return before, [*ids, *chat.turn_ids(new, ids[-1], tools)]
            return None, self._first_prompts.ids(request.messages, tools)
        except UserError as error:
            raise Refused(str(error), "chat_template") from error

    def _continued(self, request: Request) -> _Conversation | None:
        """The longest conversation that the request repeats and adds to, without words put into the policy's mouth."""
        fitting = [each for each in self._conversations if _adds_to(each, request)]
        return max(fitting, key=lambda each: len(each.messages), default=None)

    def _refuse_excess(self, prompt_tokens: int) -> None:
        sampling = self._sampling
        if prompt_tokens >= sampling.max_model_len:
            raise Refused(
                f"this model's maximum context length is {sampling.max_model_len} tokens (engine.max_model_len), and "
                f"the messages have {prompt_tokens}: send fewer",
                "context_length_exceeded",
            )
        if self._turns >= sampling.max_turns:
            raise Refused(f"a rollout has at most grpo.max_turns = {sampling.max_turns} completions", "max_turns")
        if len(self._under_way) >= AT_ONCE:
            raise Refused(f"{AT_ONCE} requests of this rollout are under way: wait", "busy", status=429)

    def _refuse_ended(self) -> None:
        if self._closed or self.clock.expired():
            raise Refused("this rollout has ended", "ended", status=401)

    async def _completion(self, ids: list[int], room: int, seed: int, stop: tuple[str, ...]) -> Completion:
        self._refuse_ended()
        task, begun = asyncio.current_task(), time.perf_counter()
        assert task is not None, "requests are answered in tasks"
        self._under_way.add(task)
        self._set_clock(None)
        try:
            return await self._complete(ids, room, seed, stop)
        except Exception as error:
            self.failure = self.failure or error
            raise Refused("the engine failed", "engine", status=500) from error
        finally:
            self._under_way.discard(task)
            self._writing_s += time.perf_counter() - begun
            if not self._under_way:
                self._set_clock(0.0 if self.failure else self._sampling.execute_s)

    def _set_clock(self, seconds: float | None) -> None:
        if not self._closed and not self.clock.expired():
            self.clock.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    def _record(
        self, before: _Conversation | None, ids: list[int], request: Request, message: Message, completion: Completion
    ) -> None:
        """Append what was written to the conversation it belongs to.

        Where that conversation has grown meanwhile, as by two requests after the same messages, a new one begins.
        """
        if before is None or ids[: len(before.trace.token_ids)] != before.trace.token_ids:
            before = _Conversation([], request.tools or [], Trace([], [], []))
            self._conversations.append(before)
        trace = before.trace
        trace.extend(ids[len(trace.token_ids) :], 0)
        trace.extend(completion.token_ids, 1, completion.logprobs, completion.versions)
        trace.add_routes(completion.routes)
        before.messages = [*request.messages, message]


def _adds_to(conversation: _Conversation, request: Request) -> bool:
    said, asked = conversation.messages, request.messages
    return (
        len(asked) > len(said)
        and conversation.tools == (request.tools or [])
        and all(message.role != "assistant" for message in asked[len(said) :])
        and all(ours.same_as(theirs) for ours, theirs in zip(said, asked, strict=False))
    )
