"""vLLM's attention over each sequence's keys in one part where there are many; its worker imports it as `Worker`.

vLLM allows 32 parts in all its CUDA graphs and combines them, of 512 sequences too, which alone keep a GPU busy. Here a
graph is captured with the number of parts for its size, and replayed with the same.
"""

from __future__ import annotations

from typing import Any

from large_batches import keep_busy, own_build, sequences, vllms

from fastgrpo.engine.guards import replaced
from fastgrpo.engine.worker import Worker

__all__ = ["Worker"]


def build(self: Any, *given: Any, **named: Any) -> Any:
    """The builder's own `build`, with one part where the batch is large."""
    one = self.max_num_splits and keep_busy(self, sequences(self, *given, **named))
    with replaced(self, "max_num_splits", 1 if one else self.max_num_splits):
        return own_build(self, *given, **named)


vllms.FlashAttentionMetadataBuilder.build = build
