"""vLLM's metadata of attention, and for which batches of it the experiments on attention are."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from vllm.v1.attention.backends import flash_attn

vllms: Any = flash_attn
# As vLLM has it, whatever stands in its place later.
own_build = vllms.FlashAttentionMetadataBuilder.build
# Sequences times heads of keys over multiprocessors, from where on none waits long for the last.
WAVES = 4
_given = inspect.signature(own_build)


def sequences(*given: Any, **named: Any) -> int:
    """How many there are in the batch of a call of `build`."""
    count: int = _given.bind(*given, **named).arguments["common_attn_metadata"].num_reqs
    return count


def keep_busy(builder: Any, count: int) -> bool:
    """Whether so many sequences alone keep the builder's GPU busy."""
    processors = torch.cuda.get_device_properties(builder.device).multi_processor_count
    return bool(count * builder.num_heads_kv >= WAVES * processors)
