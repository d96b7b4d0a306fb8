"""Attention of a decoding step that reads a prompt's keys once for its completions, beside what vLLM 0.25.1 does.

    python bench/bench_decoding_attention.py [--sizes 1.5b,7b]

On a Hopper GPU. Heads of Qwen2.5 in bf16, blocks of 64 tokens. vLLM's is FlashAttention 3 with its 32 parts of each
sequence, and with one. Each is a CUDA graph of several layers' caches, so that none finds its keys in the L2; the mean
of a layer. The floor is the time in which the GPU's memory gives each key and value once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from random import Random
from typing import Any

import torch
from engine_setup import report
from model_shapes import SHAPES, chosen, device_name, shape

from fastgrpo.kernels.decoding_triton import attend, grouped

BLOCK = 64
# Caches of so many layers, each gone through so often in a graph.
LAYERS, TURNS = 8, 4
# Bytes a second of an H200's memory.
BANDWIDTH = 4.8e12
# Groups, members of each, tokens of a prompt and at most of a completion, of at least.
BATCHES = [
    (64, 8, 512, 1, 256),
    (64, 8, 512, 128, 128),
    (32, 16, 512, 128, 128),
    (40, 8, 512, 128, 128),
    (16, 32, 2048, 128, 128),
    (64, 8, 512, 1, 2048),
    (512, 1, 512, 128, 128),
]


class Step:
    """A step of a batch, and its attention by us and by vLLM."""

    def __init__(self, size: str, groups: int, members: int, prompt: int, least: int, most: int) -> None:
        config: Any = shape(size)
        draw, self.heads, heads = Random(0), config.num_attention_heads, config.num_key_value_heads
        self.dim, free, tables, lengths = config.hidden_size // self.heads, 1, [], []
        for _ in range(groups):
            shared, free = range(free, free + prompt // BLOCK), free + prompt // BLOCK
            for _ in range(members):
                own = draw.randint(least, most)
                tables.append([*shared, *range(free, free + -(-own // BLOCK))])
                lengths.append(prompt + own)
                free += -(-own // BLOCK)
        count, width, self.longest = len(tables), max(map(len, tables)), max(lengths)
        rows = [row + [0] * (width - len(row)) for row in tables]
        self.table, self.lengths, self.begins = (
            torch.tensor(numbers, dtype=torch.int32, device="cuda") for numbers in (rows, lengths, range(count + 1))
        )
        numbers: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.caches = [torch.randn(free, 2, BLOCK, heads, self.dim, **numbers) for _ in range(LAYERS)]
        self.query = torch.randn(count, self.heads + 2 * heads, self.dim, **numbers)[:, : self.heads]
        self.out = torch.empty(count, self.heads, self.dim, **numbers)
        self.share, own = self.heads // heads, sum(lengths) - count * prompt
        self.bytes = (own + groups * prompt) * 2 * heads * self.dim * 2
        self.flash = import_module("vllm.v1.attention.backends.flash_attn")
        plan = partial(
            self.flash.get_scheduler_metadata,
            batch_size=count,
            max_seqlen_q=1,
            max_seqlen_k=self.longest,
            num_heads_q=self.heads,
            num_heads_kv=heads,
            headdim=self.dim,
            cache_seqlens=self.lengths,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=self.begins,
            page_size=BLOCK,
            causal=True,
        )
        self.plans = {parts: plan(num_splits=parts) for parts in (1, 32)}
        self.groups = self.grouped()

    def grouped(self, layer: int = 0) -> Any:
        return grouped(self.table, self.lengths, BLOCK, self.share)

    def ours(self, layer: int) -> None:
        keys, values = self.caches[layer].unbind(1)
        attend(self.query, keys, values, self.table, self.lengths, self.groups, self.dim**-0.5, self.out)

    def vllms(self, parts: int, layer: int) -> None:
        keys, values = self.caches[layer].unbind(1)
        self.flash.flash_attn_varlen_func(
            q=self.query,
            k=keys,
            v=values,
            out=self.out,
            cu_seqlens_q=self.begins,
            max_seqlen_q=1,
            seqused_k=self.lengths,
            max_seqlen_k=self.longest,
            softmax_scale=self.dim**-0.5,
            causal=True,
            block_table=self.table,
            scheduler_metadata=self.plans[parts],
            fa_version=3,
            num_splits=parts,
        )


def microseconds(calls: Iterable[Callable[[int], Any]]) -> list[float]:
    """Of one layer, for each call."""
    found = []
    for call in calls:
        call(0)
        torch.cuda.synchronize()
        graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.graph(graph):
            for turn in range(TURNS * LAYERS):
                call(turn % LAYERS)
        graph.replay()
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end) / 10 / TURNS / LAYERS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1.5b,7b")
    sizes = chosen(parser, "--sizes", parser.parse_args().sizes, SHAPES)
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
        parser.error("this needs a Hopper GPU: elsewhere vLLM has no FlashAttention 3")
    torch.manual_seed(0)
    report("device", device_name())
    for size in sizes:
        for batch in BATCHES:
            step = Step(size, *batch)
            step.vllms(32, 0)
            theirs = step.out.float()
            step.ours(0)
            error = (step.out.float() - theirs).abs().max().item()
            ours, parts, one, groups = microseconds(
                [step.ours, partial(step.vllms, 32), partial(step.vllms, 1), step.grouped]
            )
            groups_of, members, prompt, least, most = batch
            name = f"{size}, {groups_of} x {members}, {prompt} + {least}..{most}: ours; 32 parts; one; floor, us"
            report(name, f"{ours:.1f}; {parts:.1f}; {one:.1f}; {1e6 * step.bytes / BANDWIDTH:.1f}")
            report("  finding the groups, us a step; largest difference", f"{groups:.1f}; {error:.4f}")
            del step


if __name__ == "__main__":
    main()
