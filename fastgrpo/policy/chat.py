"""Text into token ids, once: with the tokenizer's chat template where it has one, as plain text where it has none."""

from __future__ import annotations

from typing import Any

_ANSWER = "\x00answer\x00"


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a first user turn, ready for the policy to write."""
    if not tokenizer.chat_template:
        return tokenizer.encode(text)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(rendered, add_special_tokens=False)


def feedback_ids(tokenizer: Any, text: str, last_id: int) -> list[int]:
    """Ids that follow a completion ending in token `last_id`: its end, the user's feedback, the next turn's opening."""
    if tokenizer.chat_template:
        turns = [("user", "?"), ("assistant", _ANSWER), ("user", text)]
        rendered = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
        )
        text = rendered.split(_ANSWER, 1)[1]
        if last_id == tokenizer.eos_token_id:
            text = text.removeprefix(tokenizer.eos_token)
    return tokenizer.encode(text, add_special_tokens=False)


def completion_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of what the policy is taught to write, its end-of-sequence token included."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
