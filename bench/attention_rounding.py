"""How far logprobs move where attention or the products round otherwise: python bench/attention_rounding.py MODEL

On a CPU; a Hugging Face folder in bf16 and texts that it samples. Attention is computed in fp32 with its weights
rounded to bf16 before they meet the values, as kernels do: from the last tile of 128 keys to the first as
FlashAttention 3 does, and in tiles of 64 from the first on as `decoding_triton` does. `products` is the former, and
adds up each linear layer in another order.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch
from engine_setup import report
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastgrpo.engine.guards import replaced

TASKS = (
    "Write a Python function that merges two sorted lists into one, with a docstring and tests.",
    "Write a Python class for a bounded queue that several threads use, and explain it.",
    "Parse a CSV file with quotes by hand in Python, without the csv module; then test it.",
)
MASKED = -1e30
PAIRS = [("FlashAttention", "ours"), ("FlashAttention", "products"), ("ours", "products"), ("FlashAttention", "exact")]


def tiles(way: str, length: int) -> list[tuple[int, int]]:
    """The bounds of the keys' tiles, in the order in which they are met."""
    if way == "exact":
        return [(0, length)]
    size = 64 if way == "ours" else 128
    found = list(pairwise([*range(0, length, size), length]))
    return found if way == "ours" else found[::-1]


def attention(way: str) -> Any:
    """Causal attention for transformers, which rounds as `way` does."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **options: Any
    ) -> Any:
        share, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = (each.repeat_interleave(share, 1).float() for each in (key, value))
        score = query.float() @ key.transpose(-1, -2) * scaling
        score = score.masked_fill(torch.ones(length, length).triu(1).bool(), MASKED)
        largest, total, out = score.new_full((*score.shape[:-1], 1), MASKED), torch.zeros(()), torch.zeros(())
        for begin, end in tiles(way, length):
            part = score[..., begin:end]
            new = torch.maximum(largest, part.amax(-1, keepdim=True))
            weight, decay = torch.where(part == MASKED, 0.0, (part - new).exp()), (largest - new).exp()
            total = total * decay + weight.sum(-1, keepdim=True)
            weight = weight if way == "exact" else weight.bfloat16().float()
            out, largest = out * decay + weight @ value[..., begin:end, :], new
        return (out / total).bfloat16().transpose(1, 2).contiguous(), None

    return attend


def in_another_order(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in fp32, the second half of its sums after the first."""
    half = x.shape[-1] // 2
    y = x[..., :half].float() @ weight[:, :half].float().T
    y = y + x[..., half:].float() @ weight[:, half:].float().T
    return (y if bias is None else y + bias.float()).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    folder = parser.parse_args().model
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    errors: dict[tuple[str, str], list[Tensor]] = {pair: [] for pair in PAIRS}
    for task in TASKS:
        chat = [{"role": "user", "content": task}]
        ids: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt = ids["input_ids"].shape[1]
        model.set_attn_implementation("sdpa")
        text = model.generate(**ids, max_new_tokens=160, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        logprobs = {}
        for way in ("FlashAttention", "ours", "exact", "products"):
            ALL_ATTENTION_FUNCTIONS["rounding"] = attention(way)
            model.set_attn_implementation("rounding")
            linear = in_another_order if way == "products" else nn.functional.linear
            with torch.no_grad(), replaced(nn.functional, "linear", linear):
                logits = model(text).logits[0, prompt - 1 : -1]
            logprobs[way] = logits.float().log_softmax(-1).gather(1, text[0, prompt:, None])
        for first, second in PAIRS:
            errors[first, second].append((logprobs[first] - logprobs[second]).abs())
    for (first, second), found in errors.items():
        error = torch.cat(found)
        report(
            f"{first} and {second}: nats of {len(error)} tokens, mean; at most",
            f"{error.mean():.4f}; {error.max():.2f}",
        )


if __name__ == "__main__":
    main()
