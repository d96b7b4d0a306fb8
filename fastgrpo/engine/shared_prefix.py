"""vLLM's attention on a GPU with a prompt's keys read once for all of its completions, where a large batch decodes.

vLLM reads them for each completion, and cuts each sequence into parts that are combined, also where the sequences alone
keep the GPU busy. Batches with prompts to read, small ones and all that the kernels do not know are vLLM's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from fastgrpo.engine.guards import source_digest
from fastgrpo.kernels.tuning import multiprocessors

# Of vLLM's attention that `forward` stands for (`attention_shape`): 0.25.1.
KNOWN_ATTENTION = "31f2ccfca6e9dd1b"
# Sequences times heads of keys over multiprocessors, from where on none waits long for the last.
WAVES = 4
# Tokens of a sequence at most: its keys are one program's, whom the others would wait for.
LONGEST = 8192


@source_digest
def attention_shape() -> list[Any]:
    """vLLM's attention."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

    return [FlashAttentionMetadata, FlashAttentionImpl]


@cache
def share_prefixes() -> None:
    """For the attention of this process; nothing is done where vLLM's is not the known one."""
    if attention_shape() != KNOWN_ATTENTION:
        return
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    own_forward = FlashAttentionImpl.forward

    def forward(
        self: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, metadata: Any,
        output: Tensor, output_scale: Any = None, output_block_scale: Any = None,
    ) -> Tensor:  # fmt: skip
        if metadata is not None and output_scale is None and is_large_decode(self, query, kv_cache, metadata):
            decode(self, query, kv_cache, metadata, output)
            return output
        return own_forward(self, layer, query, key, value, kv_cache, metadata, output, output_scale, output_block_scale)

    FlashAttentionImpl.forward = forward  # type: ignore[assignment, method-assign]


def decode(attention: Any, query: Tensor, kv_cache: Tensor, metadata: Any, output: Tensor) -> None:
    """One layer's attention of a batch that `is_large_decode`, into `output`."""
    from fastgrpo.kernels.decoding_triton import attend, grouped

    keys, values = kv_cache.unbind(1)
    table, lengths, count = metadata.block_table, metadata.seq_lens, metadata.num_actual_tokens
    # The layers of a step have one metadata: the first finds the groups, in its CUDA graph too.
    if "groups" not in vars(metadata):
        metadata.groups = grouped(table, lengths, keys.shape[1], attention.num_queries_per_kv)
    attend(query[:count], keys, values, table, lengths, metadata.groups, attention.scale, output[:count])


def is_large_decode(attention: Any, query: Tensor, kv_cache: Tensor, metadata: Any) -> bool:
    """Whether each sequence has one query, they keep the GPU busy, and plain causal attention is all that is asked."""
    sequences = len(metadata.seq_lens)
    if metadata.max_query_len != 1 or sequences * attention.num_kv_heads < WAVES * multiprocessors(query.device):
        return False
    block, width = kv_cache.shape[2], kv_cache.shape[-1]
    return bool(
        metadata.num_actual_tokens == sequences == len(metadata.block_table)
        and metadata.max_seq_len <= LONGEST
        and metadata.causal is True
        and not metadata.use_cascade
        and metadata.sliding_window in (None, (-1, -1))
        and metadata.mm_prefix_range_tensor is None
        and metadata.rswa_prefix_lens is None
        and attention.sliding_window == (-1, -1)
        and attention.attn_type == "decoder"
        and attention.alibi_slopes is None
        and attention.sinks is None
        and attention.logits_soft_cap == 0
        and attention.dcp_world_size == 1
        and not attention.batch_invariant_enabled
        and attention.num_queries_per_kv <= 16
        and kv_cache.dtype == query.dtype
        and kv_cache.stride(-1) == query.stride(-1) == 1
        and query.stride(-2) == query.shape[-1] == width
        and (block, width) in ((16, 64), (16, 128), (32, 64), (32, 128), (64, 64), (64, 128))
    )
