"""A tokenizer that knows chats with tools, in Qwen's form, and a tiny policy that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from fastgrpo.policy.demo_policy import create_policy, train_tokenizer

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].strip() }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
CORPUS = [
    "What is the sum of the numbers? It is the tool that adds.",
    "tool_call arguments name add user assistant",
] * 4


def chat_tokenizer(vocab_size: int = 400) -> Any:
    """A byte-level tokenizer with the template and its special tokens."""
    made = train_tokenizer(CORPUS, vocab_size)
    made.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    made.chat_template = TEMPLATE
    return made


def save_chat_model(folder: Path) -> Path:
    """A random policy of 1.1 M parameters whose tokenizer has the template."""
    create_policy(CORPUS, folder, seed=0, vocab_size=400)
    chat_tokenizer().save_pretrained(folder)
    return folder
