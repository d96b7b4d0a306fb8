"""Micro-batches: nothing lost, nothing padded, budgets kept, targets beside the state that predicts them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.packing import balance, pack, partition
from fastgrpo.types import Sample

lengths = st.lists(st.integers(1, 60), max_size=40)


@given(lengths, st.integers(1, 80))
def test_partition_keeps_every_sequence_once_and_the_budget(sizes: list[int], budget: int) -> None:
    groups = partition(sizes, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        assert sum(sizes[i] for i in group) <= budget or len(group) == 1


@given(lengths, st.integers(1, 80))
def test_partition_never_leaves_two_half_empty_groups(sizes: list[int], budget: int) -> None:
    loads = [sum(sizes[i] for i in group) for group in partition(sizes, budget)]
    assert sum(load <= budget // 2 for load in loads) <= 1


@given(lengths, st.integers(1, 8))
def test_balance_is_within_one_sequence_of_even(sizes: list[int], ranks: int) -> None:
    shares = balance(sizes, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@pytest.mark.parametrize("call", [lambda: partition([1], 0), lambda: balance([1], 0)])
def test_impossible_sizes_are_refused(call) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        call()


samples = st.lists(
    st.lists(st.tuples(st.integers(0, 999), st.booleans()), min_size=1, max_size=20).map(
        lambda tokens: Sample(
            [token for token, _ in tokens],
            [int(mask) for _, mask in tokens],
            [-float(i) for i in range(len(tokens))],
            advantage=0.5,
        )
    ),
    min_size=1,
    max_size=12,
)


@given(samples, st.integers(1, 64))
def test_pack_aligns_targets_with_their_predicting_position(items: list[Sample], budget: int) -> None:
    weights = [1.0 + i for i in range(len(items))]
    seen = []
    for batch in pack(items, weights, budget, "cpu"):
        bounds = batch.cu_seqlens_S.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(batch.input_ids_T) == len(batch.position_ids_T)
        for start, end in pairwise(bounds):
            assert batch.position_ids_T[start:end].tolist() == list(range(end - start))
        for n, position in enumerate(batch.loss_index_N.tolist()):
            assert batch.input_ids_T[position + 1] == batch.targets_N[n]
            assert position + 1 not in bounds, "a target is never the first token of a sequence"
            assert batch.weights_N[n] == weights[batch.sequence_N[n]]
            seen.append((int(batch.sequence_N[n]), int(batch.targets_N[n]), float(batch.sampled_logprobs_N[n])))
    expected = [
        (i, item.token_ids[t], item.logprobs[t])
        for i, item in enumerate(items)
        for t in range(1, len(item.token_ids))
        if item.loss_mask[t]
    ]
    assert sorted(seen) == sorted(expected)
