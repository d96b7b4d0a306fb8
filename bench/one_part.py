"""vLLM's attention over each sequence's keys in one part where there are many; its worker imports it as `Worker`.

vLLM allows 32 parts in all its CUDA graphs and combines them, of 512 sequences too, which alone keep a GPU busy. Here a
graph is captured with the number of parts for its size, and replayed with the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

from fastgrpo.engine.guards import replaced
from fastgrpo.engine.worker import Worker

__all__ = ["Worker"]

# Sequences times heads of keys over multiprocessors, from where on none waits long for the last.
WAVES = 4
_build = FlashAttentionMetadataBuilder.build
_given = inspect.signature(_build)


def build(self: Any, *given: Any, **named: Any) -> Any:
    """The builder's own `build`, with one part where the batch is large."""
    sequences = _given.bind(self, *given, **named).arguments["common_attn_metadata"].num_reqs
    processors = torch.cuda.get_device_properties(self.device).multi_processor_count
    many = sequences * self.num_heads_kv >= WAVES * processors
    with replaced(self, "max_num_splits", 1 if many and self.max_num_splits else self.max_num_splits):
        return _build(self, *given, **named)


FlashAttentionMetadataBuilder.build = build  # type: ignore[method-assign]
