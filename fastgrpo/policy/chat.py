"""Text into token ids and back: with the tokenizer's chat template where it has one, as plain text where it has none.

Turns are only ever appended to the ids that were sampled, never rendered again: templates drop earlier thoughts or
strip spaces, and the policy would then be trained on what it did not write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from fastgrpo.config import Model
from fastgrpo.errors import UserError
from fastgrpo.policy.folder import end_token_ids, load_config, load_tokenizer

_ANSWER = "(the answer)"
_THINK = "<think>"
Tools = Sequence[Mapping[str, Any]]


@dataclass
class Chat:
    """A conversation with the policy in token ids.

    `extra_stop_ids`: ends of a completion besides the tokenizer's own and the template's end of a turn.
    `system_prompt` opens every conversation where it is not empty. `template_kwargs` reach the chat template, as
    `enable_thinking` does. `vocabulary`: how many tokens the model knows, 0 = all that the tokenizer does.

    Raises UserError where one of them is given without a chat template, or where the template refuses them, or marks
    turns by tokens that the model does not know.
    """

    tokenizer: Any
    extra_stop_ids: Sequence[int] = ()
    system_prompt: str = ""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer.chat_template:
            self._ids(self._render([*self._system, _turn("user", "?")]))
        elif self.system_prompt or self.template_kwargs:
            key = "system_prompt" if self.system_prompt else "chat_template_kwargs"
            raise UserError(f"model.{key} needs a chat template, which the model's tokenizer has not: unset it")

    @cached_property
    def turn_end_id(self) -> int:
        """The token that ends the policy's turn: the one that the template writes there, else the tokenizer's."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        first = self._ids(self._after_answer([_turn("user", "?")]).lstrip())[:1] if self.tokenizer.chat_template else []
        return first[0] if first and first[0] in special else self.tokenizer.eos_token_id

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Every token that ends a completion."""
        return sorted({self.tokenizer.eos_token_id, self.turn_end_id, *self.extra_stop_ids})

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, Any]], tools: Tools = ()) -> list[int]:
        """Ids of a first user turn, or of a conversation's messages, ready for the policy to write.

        `tools`: functions that it may call, in OpenAI's form. Raises UserError where the template refuses any of it, or
        where the model does not know a token of it.
        """
        turns = [_turn("user", prompt)] if isinstance(prompt, str) else [dict(message) for message in prompt]
        if not self.tokenizer.chat_template:
            text, begin = "\n".join(turn["content"] for turn in turns), self.tokenizer.bos_token
            # A text that a template has rendered already has its beginning, and must not get a second one.
            return self._ids(text, add_special_tokens=not (begin and text.startswith(begin)))
        system = [] if turns[0]["role"] == "system" else self._system
        return self._ids(self._render([*system, *turns], tools))

    def is_rendered(self, prompt: str | Sequence[Mapping[str, Any]]) -> bool:
        """Whether the chat template has been applied to the text already: it holds the mark that ends a turn."""
        if not isinstance(prompt, str) or not self.tokenizer.chat_template:
            return False
        return self.tokenizer.decode([self.turn_end_id]) in prompt

    def feedback_ids(self, text: str, last_id: int) -> list[int]:
        """Ids that follow a completion ending in token `last_id`: its end, the user's feedback, the next opening."""
        return self.turn_ids([_turn("user", text)], last_id)

    def turn_ids(self, turns: Sequence[Mapping[str, Any]], last_id: int, tools: Tools = ()) -> list[int]:
        """Ids that follow a completion ending in token `last_id`: its end, the messages `turns`, the next opening."""
        if not self.tokenizer.chat_template:
            return self._ids("\n".join(turn["content"] for turn in turns))
        rest = self._after_answer(turns, tools)
        before, end, after = rest.partition(self.tokenizer.decode([self.turn_end_id]))
        written = last_id == self.turn_end_id and end and not before.strip()
        return self._ids(after if written else rest)

    def completion_ids(self, text: str) -> list[int]:
        """Ids of what the policy is taught to write, its end included.

        Thoughts that the template has opened already are not opened twice.
        """
        if self.tokenizer.chat_template and text.startswith(_THINK) and self._opens_thoughts:
            text = text.removeprefix(_THINK).lstrip("\n")
        return [*self._ids(text), self.turn_end_id]

    def text(self, completion_ids: Sequence[int]) -> str:
        """What the policy wrote, without the token that ended it; tags that are special tokens, as `</think>`, stay."""
        ended = len(completion_ids) > 0 and completion_ids[-1] in self.stop_token_ids
        ids = completion_ids[:-1] if ended else completion_ids
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str:
        """One token as text."""
        if token not in self._pieces:
            self._pieces[token] = self.tokenizer.decode([token])
        return self._pieces[token]

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return {}

    @cached_property
    def _opens_thoughts(self) -> bool:
        return self._render([_turn("user", "?")]).rstrip().endswith(_THINK)

    @property
    def _system(self) -> list[dict[str, str]]:
        return [_turn("system", self.system_prompt)] if self.system_prompt else []

    def _after_answer(self, turns: Sequence[Mapping[str, Any]], tools: Tools = ()) -> str:
        """What the template writes from the end of an answer to the opening of the next one, `turns` said between."""
        before = [_turn("user", "?"), _turn("assistant", _ANSWER)]
        _, answer, after = self._render([*before, *map(dict, turns)], tools).partition(_ANSWER)
        if not answer:
            raise UserError("the model's chat template leaves out the assistant's turns: give it one that shows them")
        return after

    def _render(self, turns: list[dict[str, Any]], tools: Tools = ()) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=list(tools) or None, tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"the model's chat template fails: {error}; check model.system_prompt, "
                "model.chat_template_kwargs and the prompt's messages"
            ) from error

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        # Halves of surrogate pairs, as from os.fsdecode, are no Unicode: the tokenizer knows none.
        ids = self.tokenizer.encode(text.encode(errors="replace").decode(), add_special_tokens=add_special_tokens)
        if self.vocabulary and ids and max(ids) >= self.vocabulary:
            last = max(ids)
            raise UserError(
                f"the tokenizer makes {self.tokenizer.convert_ids_to_tokens(last)!r} token {last}, and the model knows "
                f"{self.vocabulary}: give the model that row with resize_token_embeddings, or take the tokenizer that "
                "it came with"
            )
        return ids


def load_chat(path: str | os.PathLike[str], config: Model) -> Chat:
    """The conversation with the model in a Hugging Face folder. Raises UserError as what it reads and `Chat` do."""
    kwargs = json.loads(config.chat_template_kwargs or "{}")
    tokenizer, vocabulary = load_tokenizer(path), load_config(path).get_text_config().vocab_size
    if not config.chat_template:
        tokenizer.chat_template = None
    return Chat(tokenizer, end_token_ids(Path(path)), config.system_prompt, kwargs, vocabulary)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
