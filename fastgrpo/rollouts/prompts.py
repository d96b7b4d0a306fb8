"""Which prompts leave room for a completion, told before anything is generated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from fastgrpo.errors import UserError
from fastgrpo.policy.chat import Chat
from fastgrpo.rollouts.environment import name_of, prompt_of
from fastgrpo.types import Sampling

log = logging.getLogger(__name__)


def prompts_fit(problems: Sequence[Any], prompt: Callable[[Any], Any], chat: Chat, sampling: Sampling) -> list[bool]:
    """For each problem, whether its `prompt` leaves room for a completion.

    Raises UserError where none does, and naming the problem whose prompt is none, empty or refused by the `chat`.

    A warning tells of texts to which the chat template has been applied already.
    """
    prompts = [prompt_of(prompt, problem) for problem in problems]
    if rendered := sum(map(chat.is_rendered, prompts)):
        log.warning(
            "%d of %d prompts are texts with the chat template's marks in them, and become the user's turn of another "
            "conversation: give them as messages, or set model.chat_template to false",
            rendered,
            len(prompts),
        )
    lengths = [_length(chat, problem, prompt) for problem, prompt in zip(problems, prompts, strict=True)]
    if 0 in lengths:
        empty = name_of(problems[lengths.index(0)])
        raise UserError(
            f"the prompt of the problem {empty} is empty, and the model's tokenizer begins no text with a token: give "
            "it some text, or leave the problem out"
        )
    fits = [length <= sampling.prompt_tokens for length in lengths]
    if lengths and not any(fits):
        raise UserError(
            f"no prompt fits: the shortest has {min(lengths)} tokens, and {room_for_prompts(sampling)}; raise "
            "engine.max_model_len"
        )
    return fits


def _length(chat: Chat, problem: Any, prompt: Any) -> int:
    try:
        return len(chat.prompt_ids(prompt))
    except UserError as error:
        raise UserError(f"problem {name_of(problem)}: {error}") from error


def room_for_prompts(sampling: Sampling) -> str:
    """How long a prompt may be, in words."""
    total, written = sampling.max_model_len, sampling.max_new_tokens
    return f"engine.max_model_len = {total} less grpo.max_new_tokens = {written} leaves {sampling.prompt_tokens}"
