"""Attention of sequences that decode a token each, with the keys of a shared prompt read once for all of a group.

Completions of one prompt share its blocks of the KV cache. A group's queries go over the shared blocks together, each
sequence's own over the rest, and both sums are added (Hydragen, arXiv 2402.05099). What passes between them is fp32, so
that nothing is rounded that attention in one pass does not round. A shared prompt keeps few multiprocessors busy: from
Hopper on the second kernel begins beside the first, and waits for it where it adds its sums.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.base2 import LOG2_E, PADDING

# Rows of queries that go over shared blocks together: heads of one of keys, times members of a group.
ROWS = 64
# Blocks that a group shares at least: a shorter prefix is not worth the second pass.
LEAST = 2
# The fastest on an H200 for 64 prompts of 512 tokens with 8 completions each, and for 512 prompts.
PREFIX = {"num_warps": 4, "num_stages": 3}
SUFFIX = {"num_warps": 4, "num_stages": 2}


class Groups(NamedTuple):
    """Sequences [B] of a batch in groups of neighbours that share blocks; all int32.

    `blocks_B` has how many blocks a sequence shares with all of its group, 0 where it is alone, `leader_G2` the place
    of each group's first sequence and the members, -1 after the last group; `order_B` the places of all, those with the
    most blocks of their own first.
    """

    blocks_B: Tensor
    leader_G2: Tensor
    order_B: Tensor


@triton.jit
def _shared_kernel(table_ptr, length_ptr, shared_ptr, stride, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """How many whole blocks a sequence has in common with the one before it; each keeps a token beyond them."""
    place = tl.program_id(0)
    before, column_M = tl.maximum(place - 1, 0), tl.arange(0, WIDTH)
    inside_M = column_M < width
    here_M = tl.load(table_ptr + place.to(tl.int64) * stride + column_M, mask=inside_M, other=-1)
    there_M = tl.load(table_ptr + before.to(tl.int64) * stride + column_M, mask=inside_M, other=-2)
    same = tl.min(tl.where(here_M == there_M, WIDTH, column_M), axis=0)
    length = tl.minimum(tl.load(length_ptr + place), tl.load(length_ptr + before))
    whole = tl.maximum(length - 1, 0) // BLOCK
    tl.store(shared_ptr + place, tl.where(place > 0, tl.minimum(same, whole), 0))


@triton.jit
def _later(first, second):
    return tl.maximum(first, second)


@triton.jit(do_not_specialize=["count"])
def _group_kernel(
    shared_ptr, first_ptr, blocks_ptr, leader_ptr, count, LEAST: tl.constexpr, MOST: tl.constexpr, PLACES: tl.constexpr
):
    """One program: a group begins where little is shared with the one before, and after `MOST` members."""
    place_B = tl.arange(0, PLACES)
    inside_B = place_B < count
    begins_B = tl.load(shared_ptr + place_B, mask=inside_B, other=0) < LEAST
    begun_B = tl.associative_scan(tl.where(begins_B, place_B, 0), 0, _later)
    first_B = place_B - (place_B - begun_B) % MOST
    tl.store(first_ptr + place_B, first_B, mask=inside_B)
    tl.debug_barrier()
    members_B, blocks_B = tl.full([PLACES], 1, tl.int32), tl.full([PLACES], 1 << 30, tl.int32)
    for member in range(1, MOST):
        its_B = first_B + member
        same_B = inside_B & (tl.load(first_ptr + its_B, mask=its_B < count, other=-1) == first_B)
        blocks_B = tl.minimum(blocks_B, tl.load(shared_ptr + its_B, mask=same_B, other=1 << 30))
        members_B += same_B.to(tl.int32)
    tl.store(blocks_ptr + place_B, tl.where(members_B > 1, blocks_B, 0), mask=inside_B)
    leads_B = (first_B == place_B) & (members_B > 1)
    number_B = tl.cumsum(leads_B.to(tl.int32), axis=0) - 1
    tl.store(leader_ptr + 2 * number_B, place_B, mask=leads_B)
    tl.store(leader_ptr + 2 * number_B + 1, members_B, mask=leads_B)
    after_B = (place_B >= tl.sum(leads_B.to(tl.int32), axis=0)) & (place_B < count // 2)
    tl.store(leader_ptr + 2 * place_B, place_B * 0 - 1, mask=after_B)


@triton.jit(do_not_specialize=["count"])
def _order_kernel(length_ptr, blocks_ptr, order_ptr, count, BLOCK: tl.constexpr, PLACES: tl.constexpr):
    """How many sequences have more blocks of their own than this one, or as many and come before it: its turn.

    A GPU runs as many programs at once as its shared memory holds. The longest begin first, so that none is left alone.
    """
    place, place_B = tl.program_id(0), tl.arange(0, PLACES)
    inside_B = place_B < count
    length_B = tl.load(length_ptr + place_B, mask=inside_B, other=0)
    own_B = tl.cdiv(length_B, BLOCK) - tl.load(blocks_ptr + place_B, mask=inside_B, other=0)
    own = tl.cdiv(tl.load(length_ptr + place), BLOCK) - tl.load(blocks_ptr + place)
    earlier_B = inside_B & ((own_B > own) | ((own_B == own) & (place_B < place)))
    tl.store(order_ptr + tl.sum(earlier_B.to(tl.int32), axis=0), place)


@triton.jit
def _over_block(query_QD, key_TD, value_TD, inside_T, largest_Q, sum_Q, out_QD, scale):
    """A block's keys and values into the running softmax: largest score in base 2, sum and output, all fp32."""
    score_QT = tl.dot(query_QD, tl.trans(key_TD), input_precision="ieee") * scale
    score_QT = tl.where(inside_T[None, :], score_QT, PADDING)
    new_Q = tl.maximum(largest_Q, tl.max(score_QT, axis=1))
    weight_QT, decay_Q = tl.exp2(score_QT - new_Q[:, None]), tl.exp2(largest_Q - new_Q)
    sum_Q = sum_Q * decay_Q + tl.sum(weight_QT, axis=1)
    added_QD = tl.dot(weight_QT.to(value_TD.dtype), value_TD, input_precision="ieee")
    return new_Q, sum_Q, out_QD * decay_Q[:, None] + added_QD


@triton.jit
def _prefix_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, blocks_ptr, leader_ptr, out_ptr, sum_ptr, scale, query_stride,
    block_stride, token_stride, head_stride, table_stride,
    HEADS: tl.constexpr, SHARE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A group's shared blocks under all its members' queries, of one head of keys."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    group_ptr, head = leader_ptr + 2 * (tl.program_id(0) // HEADS), tl.program_id(0) % HEADS
    first = tl.load(group_ptr)
    if first >= 0:
        row_Q, dim_D, token_T = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, BLOCK)
        inside_Q = row_Q < tl.load(group_ptr + 1) * SHARE
        place_Q, head_Q = (first + row_Q // SHARE).to(tl.int64), head * SHARE + row_Q % SHARE
        query_QD = tl.load(
            query_ptr + place_Q[:, None] * query_stride + head_Q[:, None] * DIM + dim_D[None, :],
            mask=inside_Q[:, None],
            other=0.0,
        )
        offset_TD = token_T[:, None] * token_stride + head * head_stride + dim_D[None, :]
        largest_Q, sum_Q = tl.full([ROWS], PADDING, tl.float32), tl.zeros([ROWS], tl.float32)
        out_QD = tl.zeros([ROWS, DIM], tl.float32)
        row_ptr = table_ptr + first.to(tl.int64) * table_stride
        for column in range(0, tl.load(blocks_ptr + first)):
            start = tl.load(row_ptr + column).to(tl.int64) * block_stride
            key_TD, value_TD = tl.load(key_ptr + start + offset_TD), tl.load(value_ptr + start + offset_TD)
            largest_Q, sum_Q, out_QD = _over_block(
                query_QD, key_TD, value_TD, token_T >= 0, largest_Q, sum_Q, out_QD, scale
            )
        cell_Q = place_Q * (HEADS * SHARE) + head_Q
        tl.store(sum_ptr + 2 * cell_Q, largest_Q, mask=inside_Q)
        tl.store(sum_ptr + 2 * cell_Q + 1, sum_Q, mask=inside_Q)
        tl.store(out_ptr + cell_Q[:, None] * DIM + dim_D[None, :], out_QD, mask=inside_Q[:, None])


@triton.jit
def _suffix_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, length_ptr, blocks_ptr, order_ptr, part_ptr, sum_ptr, out_ptr, scale,
    query_stride, out_stride, block_stride, token_stride, head_stride, table_stride,
    HEADS: tl.constexpr, SHARE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A sequence's own blocks under its queries of one head of keys, then what its group's prefix left of them."""
    place, head = tl.load(order_ptr + tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    length, blocks = tl.load(length_ptr + place), tl.load(blocks_ptr + place)
    row_Q, dim_D, token_T = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, BLOCK)
    inside_Q, head_Q = row_Q < SHARE, head * SHARE + row_Q
    cell_QD = head_Q[:, None] * DIM + dim_D[None, :]
    query_QD = tl.load(query_ptr + place * query_stride + cell_QD, mask=inside_Q[:, None], other=0.0)
    offset_TD = token_T[:, None] * token_stride + head * head_stride + dim_D[None, :]
    largest_Q, sum_Q = tl.full([ROWS], PADDING, tl.float32), tl.zeros([ROWS], tl.float32)
    out_QD = tl.zeros([ROWS, DIM], tl.float32)
    row_ptr = table_ptr + place * table_stride
    for column in range(blocks, tl.cdiv(length, BLOCK)):
        start = tl.load(row_ptr + column).to(tl.int64) * block_stride
        # Places of a block that were not written may hold anything: 0 times that can be nan.
        inside_T = column * BLOCK + token_T < length
        key_TD = tl.load(key_ptr + start + offset_TD, mask=inside_T[:, None], other=0.0)
        value_TD = tl.load(value_ptr + start + offset_TD, mask=inside_T[:, None], other=0.0)
        largest_Q, sum_Q, out_QD = _over_block(query_QD, key_TD, value_TD, inside_T, largest_Q, sum_Q, out_QD, scale)
    if OVERLAPS:
        # Until here nothing was read that the prefix's kernel writes.
        tl.extra.cuda.gdc_wait()
    begun_Q, cell_Q = row_Q < tl.where(blocks > 0, SHARE, 0), place * (HEADS * SHARE) + head_Q
    before_Q = tl.load(sum_ptr + 2 * cell_Q, mask=begun_Q, other=PADDING)
    new_Q = tl.maximum(largest_Q, before_Q)
    decay_Q, before_Q = tl.exp2(largest_Q - new_Q), tl.exp2(before_Q - new_Q)
    sum_Q = sum_Q * decay_Q + tl.load(sum_ptr + 2 * cell_Q + 1, mask=begun_Q, other=0.0) * before_Q
    part_QD = tl.load(part_ptr + place * (HEADS * SHARE * DIM) + cell_QD, mask=begun_Q[:, None], other=0.0)
    out_QD = out_QD * decay_Q[:, None] + part_QD * before_Q[:, None]
    # A place of a CUDA graph that no sequence has, has no keys.
    out_QD = out_QD / tl.where(sum_Q > 0.0, sum_Q, 1.0)[:, None]
    tl.store(out_ptr + place * out_stride + cell_QD, out_QD, mask=inside_Q[:, None])


@cache
def _launches_early(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it runs (programmatic dependent launch): from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def most_members(share: int) -> int:
    """Members of a group at most, a power of two, where `share` heads of queries have one of keys (64 at most)."""
    return 1 << (ROWS // share).bit_length() - 1


def grouped(table_BM: Tensor, length_B: Tensor, block: int, share: int) -> Groups:
    """Groups by the numbers (int32) of each sequence's blocks, `length_B` (int32) tokens of `block` to a block.

    `share` heads of queries have one of keys, 64 at most.
    """
    (count, width), shared_B = table_BM.shape, torch.empty_like(length_B)
    groups = Groups(torch.empty_like(shared_B), shared_B.new_empty(count // 2, 2), torch.empty_like(shared_B))
    places = triton.next_power_of_2(count)
    launch(
        _shared_kernel, count, table_BM, length_B, shared_B, table_BM.stride(0), width, BLOCK=block,
        WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip
    launch(
        _group_kernel, 1, shared_B, torch.empty_like(shared_B), groups.blocks_B, groups.leader_G2, count, LEAST=LEAST,
        MOST=most_members(share), PLACES=places,
    )  # fmt: skip
    launch(_order_kernel, count, length_B, groups.blocks_B, groups.order_B, count, BLOCK=block, PLACES=places)
    return groups


def attend(
    query_BHD: Tensor, key_NTKD: Tensor, value_NTKD: Tensor, table_BM: Tensor, length_B: Tensor, groups: Groups,
    scale: float, out_BHD: Tensor,
) -> None:  # fmt: skip
    """softmax(scale q K^T) V of each sequence's keys and values into `out_BHD`.

    K heads of keys for H of queries; N blocks of T tokens in both caches, whose strides are the same. Sequence b has
    the first `length_B[b]` tokens of the blocks that row b of the table numbers; one of none gets zeros. `groups` are
    those of the same table and lengths. D and T are powers of two, of 16 at least, and H / K is 64 at most. Heads of
    queries and of the output lie side by side.
    """
    (count, heads_q, dim), (_, block, heads, _) = query_BHD.shape, key_NTKD.shape
    share, cache = heads_q // heads, (key_NTKD, value_NTKD, table_BM)
    part_BHD, sum_BH2 = (query_BHD.new_empty(count, heads_q, size, dtype=torch.float32) for size in (dim, 2))
    strides, (blocks_B, leader_G2, order_B) = (*key_NTKD.stride()[:3], table_BM.stride(0)), groups
    overlaps = len(leader_G2) > 0 and _launches_early(query_BHD.device)
    sizes = {"HEADS": heads, "SHARE": share, "DIM": dim, "BLOCK": block, "OVERLAPS": overlaps}
    if len(leader_G2):
        launch(
            _prefix_kernel, len(leader_G2) * heads, query_BHD, *cache, blocks_B, leader_G2, part_BHD, sum_BH2,
            scale * LOG2_E.value, query_BHD.stride(0), *strides, **sizes,
            ROWS=max(16, triton.next_power_of_2(most_members(share) * share)), **PREFIX,
        )  # fmt: skip
    # Triton's interpreter does not know the option.
    early = {"launch_pdl": True} if overlaps else {}
    launch(
        _suffix_kernel, count * heads, query_BHD, *cache, length_B, blocks_B, order_B, part_BHD, sum_BH2, out_BHD,
        scale * LOG2_E.value, query_BHD.stride(0), out_BHD.stride(0), *strides, **sizes,
        ROWS=max(16, triton.next_power_of_2(share)), **SUFFIX, **early,
    )  # fmt: skip
