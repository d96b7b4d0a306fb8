"""vLLM 0.25.1's decoding with a prompt's keys read once for all of its completions; its worker imports it as `Worker`.

Completions of one prompt share its blocks and stand side by side in a batch. Attention goes over the shared blocks with
a group's queries at once, over the rest with each sequence's own, and merges both by their sums (Hydragen, arXiv
2402.05099). Where the sequences alone keep the GPU busy no sequence is cut into parts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from large_batches import keep_busy, own_build, sequences, vllms
from prefix_groups import MOST, Groups, grouped

from fastgrpo.engine.worker import Worker

__all__ = ["Worker"]

_cascade = vllms.cascade_attention


def build(self: Any, *given: Any, **named: Any) -> Any:
    """The builder's metadata; of a large batch that decodes, as vLLM has it for one prefix of a whole batch.

    A CUDA graph is captured and replayed with buffers that stay where they are.
    """
    metadata, count = own_build(self, *given, **named), sequences(self, *given, **named)
    if metadata.max_query_len != 1 or not keep_busy(self, count):
        return metadata
    groups = _kept(self, grouped(metadata.block_table, metadata.seq_lens[:count], self.block_size))
    queries = {"batch_size": count, "max_seqlen_k": metadata.max_seq_len, "causal": False}
    prefix = _schedule(self, "prefix", groups.prefix_lens, groups.bounds, max_seqlen_q=MOST, **queries)
    suffix = _schedule(self, "suffix", groups.suffix_lens, metadata.query_start_loc, max_seqlen_q=1, **queries)
    return replace(
        metadata,
        use_cascade=True,
        cu_prefix_query_lens=groups.bounds,
        prefix_kv_lens=groups.prefix_lens,
        suffix_kv_lens=groups.suffix_lens,
        block_table=(groups.prefix_tables, groups.suffix_tables),
        prefix_scheduler_metadata=prefix,
        scheduler_metadata=suffix,
    )


def _kept(builder: Any, found: Groups) -> Groups:
    """`found` in buffers of the builder's, made for its largest batch."""
    if "groups" not in vars(builder):
        most = len(builder.scheduler_metadata) // 4
        builder.groups = [each.new_zeros(most + 1, *each.shape[1:]) for each in found]
    places = [buffer[: len(each)] for buffer, each in zip(builder.groups, found, strict=True)]
    for place, each in zip(places, found, strict=True):
        place.copy_(each)
    return Groups(*places)


def _schedule(builder: Any, name: str, lens: Any, bounds: Any, **options: Any) -> Any:
    """FlashAttention's plan for one of both passes, in a buffer of its own."""
    plan = vllms.get_scheduler_metadata(
        num_heads_q=builder.num_heads_q,
        num_heads_kv=builder.num_heads_kv,
        headdim=builder.headdim,
        cache_seqlens=lens,
        qkv_dtype=builder.kv_cache_dtype,
        cu_seqlens_q=bounds,
        page_size=builder.block_size,
        window_size=(-1, -1),
        num_splits=1,
        **options,
    )
    kept = vars(builder).setdefault(f"{name}_plan", torch.zeros_like(builder.scheduler_metadata))
    kept[: len(plan)] = plan
    kept[len(plan) :] = 0
    return kept[: len(plan)]


def attend(output: Any, query: Any, key_cache: Any, value_cache: Any, **named: Any) -> Any:
    """vLLM's `cascade_attention`, for groups where the tables are those of `build`."""
    if torch.is_tensor(named["block_table"]):
        return _cascade(output, query, key_cache, value_cache, **named)
    prefix_tables, suffix_tables = named["block_table"]
    same = {"q": query, "k": key_cache, "v": value_cache, "causal": False, "return_softmax_lse": True, "num_splits": 1}
    same |= {"softmax_scale": named["softmax_scale"], "softcap": named["logits_soft_cap"]}
    same |= {"max_seqlen_k": named["max_kv_len"], "fa_version": named["fa_version"], "window_size": [-1, -1]}
    shared, shared_sums = vllms.flash_attn_varlen_func(
        cu_seqlens_q=named["cu_prefix_query_lens"],
        max_seqlen_q=MOST,
        seqused_k=named["prefix_kv_lens"],
        block_table=prefix_tables,
        scheduler_metadata=named["prefix_scheduler_metadata"],
        **same,
    )
    own, own_sums = vllms.flash_attn_varlen_func(
        cu_seqlens_q=named["cu_query_lens"],
        max_seqlen_q=1,
        seqused_k=named["suffix_kv_lens"],
        block_table=suffix_tables,
        scheduler_metadata=named["suffix_scheduler_metadata"],
        **same,
    )
    vllms.merge_attn_states(output, shared, shared_sums, own, own_sums)


vllms.FlashAttentionMetadataBuilder.build, vllms.cascade_attention = build, attend
