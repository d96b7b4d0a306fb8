"""Micro-batches: nothing lost, nothing padded, budgets kept, targets beside the state that predicts them."""

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.training.packing import apart, balance, families, joined, pack
from fastgrpo.training.pieces import partition
from fastgrpo.types import Batch, Sample

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


PROMPTS = [[1], [2, 3, 4], [2, 3, 5, 6, 7]]
completions = st.lists(st.tuples(st.integers(0, 999), st.booleans()), max_size=12)


def sample_of(prompt: list[int], completion: list[tuple[int, bool]]) -> Sample:
    token_ids = prompt + [token for token, _ in completion]
    mask = [0] * len(prompt) + [int(mask) for _, mask in completion]
    return Sample(token_ids, mask, [-float(i) for i in range(len(token_ids))], advantage=0.5)


samples = st.lists(st.builds(sample_of, st.sampled_from(PROMPTS), completions), min_size=1, max_size=12)


def runs_of(batch: Batch) -> list[list[int]]:
    """For each run the positions of its keys."""
    index = batch.runs.key_index_U
    keys = list(range(len(batch.input_ids_T))) if index is None else index.tolist()
    return [keys[start:end] for start, end in pairwise(batch.runs.cu_keys_S.tolist())]


@given(samples, st.integers(1, 64))
def test_every_sequence_sees_itself_and_its_prompt_alone(items: list[Sample], budget: int) -> None:
    sequences = []
    for batch in pack(items, [1.0] * len(items), budget, "cpu"):
        queries = list(pairwise(batch.runs.cu_queries_S.tolist()))
        assert queries[-1][1] == len(batch.input_ids_T) == len(batch.position_ids_T)
        assert batch.runs.max_queries == max(end - start for start, end in queries)
        for (start, end), keys in zip(queries, runs_of(batch), strict=True):
            assert keys[len(keys) - (end - start) :] == list(range(start, end)), "a run's own tokens come last"
            assert batch.position_ids_T[keys].tolist() == list(range(len(keys)))
            sequences.append(batch.input_ids_T[keys].tolist())
        assert batch.runs.max_keys == max(map(len, runs_of(batch)))
        assert len(batch.input_ids_T) <= budget or len(queries) == 1
    missing = Counter(tuple(item.token_ids) for item in items) - Counter(map(tuple, sequences))
    assert not missing


@given(samples, st.integers(1, 64))
def test_pack_aligns_targets_with_their_predicting_position(items: list[Sample], budget: int) -> None:
    weights = [1.0 + i for i in range(len(items))]
    seen = []
    for batch in pack(items, weights, budget, "cpu"):
        for n, position in enumerate(batch.loss_index_N.tolist()):
            i, t = int(batch.sequence_N[n]), int(batch.position_ids_T[position]) + 1
            assert batch.input_ids_T[position] == items[i].token_ids[t - 1]
            assert batch.targets_N[n] == items[i].token_ids[t]
            assert batch.weights_N[n] == weights[i]
            seen.append((i, t, float(batch.sampled_logprobs_N[n])))
    expected = [
        (i, t, item.logprobs[t])
        for i, item in enumerate(items)
        for t in range(1, len(item.token_ids))
        if item.loss_mask[t]
    ]
    assert sorted(seen) == sorted(expected)


@given(samples.flatmap(lambda some: st.permutations([*some, Sample.empty(), Sample.empty()])) | st.just([]))
def test_samples_that_travel_come_apart_as_they_were(items: list[Sample]) -> None:
    found = apart(pickle.loads(pickle.dumps(joined(items))))
    assert len(found) == len(items)
    for one, other in zip(found, items, strict=True):
        assert one.advantage == other.advantage
        for name in ("token_ids", "loss_mask", "logprobs"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert one.routes is None


def routed(prompt: list[int], tokens: int, first: int) -> Sample:
    """A sample of `tokens` after its prompt, all but the last with the experts `first` and on, [., 2, 1]."""
    length = len(prompt) + tokens
    routes = np.stack([np.arange(first, first + length - 1)] * 2, 1)[..., None].astype(np.int8)
    mask = [0] * len(prompt) + [1] * tokens
    return Sample(prompt + [9] * tokens, mask, [0.0] * length, routes=routes)


def test_tokens_keep_their_routes_on_the_way_and_in_a_row() -> None:
    items = [routed([1, 2, 3], 2, 10), routed([1, 2, 3], 4, 30), sample_of([5], [(6, True)]), Sample.empty()]
    items = apart(pickle.loads(pickle.dumps(joined(items))))
    (batch,) = pack(items, [1.0] * 4, 64, "cpu")
    assert batch.replay is not None
    # The prompt has those of the longest; the last token of each, and one that nothing was told of, have none.
    by_run = dict[tuple[int, ...], list[int]](
        {
            (): [],
            (1, 2, 3): [30, 31, 32],
            (9,) * 4: [33, 34, 35, -1],
            (9, 9): [13, -1],
            (5, 6): [-1, -1],
        }
    )
    ends = batch.runs.cu_queries_S.tolist()
    expected = [by_run[tuple(batch.input_ids_T[start:end].tolist())] for start, end in pairwise(ends)]
    assert batch.replay.experts_TLK.dtype == torch.int8
    assert batch.replay.experts_TLK.tolist() == [[[expert], [expert]] for run in expected for expert in run]
    assert pack([sample_of([5], [(6, True)])], [1.0], 64, "cpu")[0].replay is None


def test_a_prompt_is_stored_once_for_all_its_sequences() -> None:
    group = [sample_of([7] * 10, [(i, True)] * 5) for i in range(8)]
    (batch,) = pack(group, [1.0] * 8, 64, "cpu")
    assert len(batch.input_ids_T) == 10 + 8 * 5
    assert [len(batch.input_ids_T) for batch in pack(group, [1.0] * 8, 30, "cpu")] == [30, 30]


@given(samples, st.integers(1, 40))
def test_families_keep_every_sample_once_and_their_limit(items: list[Sample], limit: int) -> None:
    found = families(items, limit)
    assert sorted(i for family in found for i in family.members) == list(range(len(items)))
    for family in found:
        own = sum(len(items[i].token_ids) - family.shared for i in family.members)
        assert family.tokens == family.shared + own
        assert family.tokens <= limit or len(family.members) == 1
