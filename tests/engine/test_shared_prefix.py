"""Which batches' attention reads a prompt's keys once; what it computes is in `tests/kernels/test_decoding.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.engine import shared_prefix
from fastgrpo.engine.shared_prefix import LONGEST, is_large_decode

PLAIN = {"sliding_window": (-1, -1), "attn_type": "decoder", "alibi_slopes": None, "sinks": None, "logits_soft_cap": 0}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "multiprocessors", lambda device: 4)


def large(sequences: int = 8, block: int = 64, width: int = 128, **changed: Any) -> bool:
    """Of a batch of 12 heads for 2 of keys, on a GPU of 4 multiprocessors, but for what is `changed`."""
    query = changed.pop("query", torch.zeros(sequences, 16, width, dtype=torch.bfloat16)[:, :12])
    cache = torch.zeros(3, 2, block, 2, width, dtype=changed.pop("cache_dtype", torch.bfloat16))
    metadata = {"sliding_window": None, "mm_prefix_range_tensor": None, "rswa_prefix_lens": None, "causal": True}
    metadata |= {"max_query_len": 1, "max_seq_len": LONGEST, "use_cascade": False, "num_actual_tokens": sequences}
    metadata |= {"seq_lens": torch.ones(sequences), "block_table": torch.ones(sequences, 3)}
    metadata |= {name: changed.pop(f"its_{name}") for name in tuple(metadata) if f"its_{name}" in changed}
    attention = PLAIN | {"num_kv_heads": 2, "num_queries_per_kv": 6, "dcp_world_size": 1}
    attention |= {"batch_invariant_enabled": False} | changed
    return is_large_decode(SimpleNamespace(**attention), query, cache, SimpleNamespace(**metadata))


@pytest.mark.parametrize("sizes", [{}, {"block": 16, "width": 64}, {"its_sliding_window": (-1, -1)}], ids=str)
def test_sequences_that_decode_and_keep_the_gpu_busy_are_ours(sizes: dict[str, Any]) -> None:
    assert large(**sizes)


@pytest.mark.parametrize(
    "asked",
    [
        {"sequences": 7},
        {"block": 128},
        {"width": 96},
        {"cache_dtype": torch.uint8},
        {"query": torch.zeros(8, 12, 256, dtype=torch.bfloat16)[..., ::2]},
        {"num_queries_per_kv": 32},
        {"sliding_window": (1023, 0)},
        {"attn_type": "encoder"},
        {"alibi_slopes": torch.ones(12)},
        {"sinks": torch.ones(12)},
        {"logits_soft_cap": 30.0},
        {"dcp_world_size": 2},
        {"batch_invariant_enabled": True},
        {"its_max_query_len": 2},
        {"its_max_seq_len": LONGEST + 1},
        {"its_causal": False},
        {"its_use_cascade": True},
        {"its_num_actual_tokens": 9},
        {"its_sliding_window": (1023, 0)},
        {"its_mm_prefix_range_tensor": torch.ones(8)},
        {"its_rswa_prefix_lens": torch.ones(8)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_all_else_is_vllms(asked: dict[str, Any]) -> None:
    assert not large(**asked)
