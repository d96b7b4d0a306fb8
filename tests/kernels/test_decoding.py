"""Attention of decoding sequences against plain attention over each one's own keys, and the groups that share them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.random_heads import INTERPRETED

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU, or Triton's interpreter"
)


class Batch(NamedTuple):
    query_BHD: Tensor
    key_NTKD: Tensor
    value_NTKD: Tensor
    table_BM: Tensor
    length_B: Tensor


def batch(
    groups: Sequence[tuple[int, int]],
    device: torch.device,
    heads: tuple[int, int] = (4, 2),
    block: int = 16,
    dtype: torch.dtype = torch.float32,
    dim: int = 16,
    empty: int = 2,
) -> Batch:
    """Groups of (members, blocks of their prompt), each member with 1 to 5 blocks of its own, then places of none."""
    draw, free, tables, lengths = random.Random(0), itertools.count(1), [], []
    for members, blocks in groups:
        prompt = [next(free) for _ in range(blocks)]
        for _ in range(members):
            own = [next(free) for _ in range(draw.randint(1, 5))]
            tables.append(prompt + own)
            lengths.append((len(prompt + own) - 1) * block + draw.randint(1, block))
    width = max(map(len, tables)) + 1
    tables = [(row + [1] * width)[:width] for row in [*tables, *[[]] * empty]]
    # As vLLM has them: keys and values of a block side by side, and nan where nothing was written.
    cache = torch.randn(next(free), 2, block, heads[1], dim, device=device).to(dtype)
    table_BM = torch.tensor(tables, dtype=torch.int32, device=device)
    length_B = torch.tensor([*lengths, *[0] * empty], dtype=torch.int32, device=device)
    for row, length in zip(tables, lengths, strict=False):
        if length % block:
            cache[row[length // block], :, length % block :] = float("nan")
    qkv = torch.randn(len(tables), heads[0] + 2 * heads[1], dim, device=device).to(dtype)
    return Batch(qkv[:, : heads[0]], cache[:, 0], cache[:, 1], table_BM, length_B)


def attended(given: Batch) -> Tensor:
    from fastgrpo.kernels.decoding_triton import attend, grouped

    block, share = given.key_NTKD.shape[1], given.query_BHD.shape[1] // given.key_NTKD.shape[2]
    out_BHD = torch.full_like(given.query_BHD, float("nan")).contiguous()
    groups = grouped(given.table_BM, given.length_B, block, share)
    attend(*given, groups, given.query_BHD.shape[2] ** -0.5, out_BHD)
    return out_BHD


def expected(given: Batch) -> Tensor:
    """Plain attention, a sequence after the other, in float64."""
    found = torch.zeros(given.query_BHD.shape, dtype=torch.float64)
    for place, length in enumerate(given.length_B.tolist()):
        numbers = given.table_BM[place].long()
        key_SKD, value_SKD = (cache[numbers].flatten(0, 1)[:length].cpu().double() for cache in given[1:3])
        share = given.query_BHD.shape[1] // key_SKD.shape[1]
        key_SHD, value_SHD = (each.repeat_interleave(share, 1) for each in (key_SKD, value_SKD))
        score_HS = torch.einsum("hd,shd->hs", given.query_BHD[place].cpu().double(), key_SHD)
        weight_HS = (score_HS * given.query_BHD.shape[2] ** -0.5).softmax(1)
        found[place] = torch.einsum("hs,shd->hd", weight_HS, value_SHD)
    return found


GROUPS = [
    [(8, 4)],
    [(1, 3), (1, 0), (1, 1)],
    [(40, 2), (3, 7), (2, 1), (9, 3)],
    [(5, 2), (5, 3)],
]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (2, 2)], ids=str)
def test_it_is_attention(groups: list[tuple[int, int]], heads: tuple[int, int], device: torch.device) -> None:
    given = batch(groups, device, heads)
    torch.testing.assert_close(attended(given).cpu().double(), expected(given), atol=1e-5, rtol=1e-5)


def test_it_rounds_as_attention_in_bf16_does(device: torch.device) -> None:
    # The interpreter multiplies no matrices in bf16.
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    given = batch([(8, 5), (3, 2)], device, (12, 2), 64, dtype, 128)
    torch.testing.assert_close(attended(given).cpu().double(), expected(given), atol=8e-3, rtol=8e-3)


@pytest.mark.parametrize("share", [1, 3, 6, 8, 64])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_what_a_group_shares_all_its_members_have(
    groups: list[tuple[int, int]], share: int, device: torch.device
) -> None:
    from fastgrpo.kernels.decoding_triton import LEAST, ROWS, grouped, most_members

    given, most = batch(groups, device), most_members(share)
    assert most * share <= ROWS < 2 * most * share
    shared, leaders, _ = (each.tolist() for each in grouped(given.table_BM, given.length_B, 16, share))
    tables, lengths = given.table_BM.tolist(), given.length_B.tolist()
    expected, place = [], 0
    for members, blocks in groups:
        parts = [min(most, members - begun) for begun in range(0, members, most)] if blocks >= LEAST else []
        expected += [[place + number * most, size] for number, size in enumerate(parts) if size > 1]
        place += members
    assert leaders[: len(expected)] == expected
    assert all(first == -1 for first, _ in leaders[len(expected) :])
    alone = set(range(len(shared)))
    for first, members in expected:
        its = shared[first]
        assert its >= LEAST
        for place in range(first, first + members):
            alone.remove(place)
            assert shared[place] == its
            assert tables[place][:its] == tables[first][:its]
            assert its * 16 < lengths[place]
    assert not any(shared[place] for place in alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels overlap on a GPU")
def test_a_long_prompt_is_waited_for(device: torch.device) -> None:
    """Each sequence's own blocks are read long before those of its prompt."""
    given = batch([(8, 256), (1, 3)] * 8, device)
    wanted = expected(given)
    for _ in range(10):
        torch.testing.assert_close(attended(given).cpu().double(), wanted, atol=1e-5, rtol=1e-5)


def test_the_longest_begin_first(device: torch.device) -> None:
    from fastgrpo.kernels.decoding_triton import grouped

    given = batch([(8, 4), (1, 9), (3, 2)], device)
    blocks, _, order = (each.tolist() for each in grouped(given.table_BM, given.length_B, 16, 2))
    own = [-(-length // 16) - shared for length, shared in zip(given.length_B.tolist(), blocks, strict=True)]
    assert order == sorted(range(len(own)), key=lambda place: -own[place])


def test_one_sequence_is_alone(device: torch.device) -> None:
    given = batch([(1, 3)], device, empty=0)
    torch.testing.assert_close(attended(given).cpu().double(), expected(given), atol=1e-5, rtol=1e-5)


def test_the_layers_of_a_step_find_its_groups_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's tensors have places for more tokens than the batch has, and keys beside values."""
    from fastgrpo.engine.shared_prefix import decode
    from fastgrpo.kernels import decoding_triton

    given, found, own = batch([(8, 4), (3, 2)], device), [], decoding_triton.grouped
    monkeypatch.setattr(decoding_triton, "grouped", lambda *given: found.append(own(*given)) or found[-1])
    count = len(given.length_B)
    metadata = SimpleNamespace(block_table=given.table_BM, seq_lens=given.length_B, num_actual_tokens=count)
    attention = SimpleNamespace(num_queries_per_kv=2, scale=given.query_BHD.shape[2] ** -0.5)
    query = torch.cat([given.query_BHD, given.query_BHD[:1]])
    for layer in range(2):
        key_NTKD, value_NTKD = given.key_NTKD + layer, given.value_NTKD * (1 + layer)
        output = torch.full_like(query, 7.0)
        decode(attention, query, torch.stack([key_NTKD, value_NTKD], 1), metadata, output)
        wanted = expected(given._replace(key_NTKD=key_NTKD, value_NTKD=value_NTKD))
        torch.testing.assert_close(output[:count].cpu().double(), wanted, atol=1e-5, rtol=1e-5)
        assert (output[count:] == 7.0).all()
    assert len(found) == 1
