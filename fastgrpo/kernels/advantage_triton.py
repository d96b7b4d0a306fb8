"""Group advantages in one launch: each program finds the runs its rollouts belong to and compares them pairwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, TILE, WARPS = 32, 64, 2


@triton.jit
def _is_head(ids_ptr, position, rollouts):
    """Whether a run of equal ids starts at the position; positions outside are no heads."""
    inside = (position >= 0) & (position < rollouts)
    mine = tl.load(ids_ptr + position, mask=inside, other=0)
    before = tl.load(ids_ptr + position - 1, mask=inside & (position > 0), other=0)
    return inside & ((position == 0) | (mine != before))


@triton.jit
def _advantage_kernel(
    rewards_ptr, ids_ptr, advantages_ptr, rollouts, epsilon, MODE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    row_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile_T = tl.arange(0, TILE)
    first, past = tl.program_id(0) * BLOCK, (tl.program_id(0) + 1) * BLOCK
    # Start of the run that holds the block's first rollout, and end of the run that holds its last.
    start, left = tl.max(tl.where(_is_head(ids_ptr, row_B, rollouts) & (row_B == first), row_B, -1), axis=0), first
    while start < 0:
        left -= TILE
        start = tl.max(tl.where(_is_head(ids_ptr, left + tile_T, rollouts), left + tile_T, -1), axis=0)
    end, right = rollouts + 1, past
    while end > rollouts:
        after_T = right + tile_T
        stops_T = _is_head(ids_ptr, after_T, rollouts) | (after_T == rollouts) | (right > rollouts)
        end = tl.min(tl.where(stops_T, tl.minimum(after_T, rollouts), rollouts + 1), axis=0)
        right += TILE
    # Each rollout's own run within [start, end): the last head at or before it, the first head after it.
    head_B = _is_head(ids_ptr, row_B, rollouts)
    position_BB = tl.where(head_B, row_B, -1)[None, :]
    start_B = tl.maximum(tl.max(tl.where(position_BB <= row_B[:, None], position_BB, -1), axis=1), start)
    end_B = tl.min(tl.where(position_BB > row_B[:, None], position_BB, end), axis=1)

    count_B = tl.zeros([BLOCK], tl.float32)
    total_B = tl.zeros([BLOCK], tl.float32)
    least_B = tl.full([BLOCK], float("inf"), tl.float32)
    most_B = tl.full([BLOCK], -float("inf"), tl.float32)
    for j in range(start, end, TILE):
        reward_T = tl.load(rewards_ptr + j + tile_T, mask=j + tile_T < end, other=float("nan"))
        near_BT = ((j + tile_T)[None, :] >= start_B[:, None]) & ((j + tile_T)[None, :] < end_B[:, None])
        member_BT = near_BT & (reward_T == reward_T)[None, :]
        count_B += tl.sum(member_BT.to(tl.float32), axis=1)
        total_B += tl.sum(tl.where(member_BT, reward_T[None, :], 0.0), axis=1)
        least_B = tl.minimum(least_B, tl.min(tl.where(member_BT, reward_T[None, :], float("inf")), axis=1))
        most_B = tl.maximum(most_B, tl.max(tl.where(member_BT, reward_T[None, :], -float("inf")), axis=1))
    mean_B = total_B / tl.maximum(count_B, 1.0)
    others_B = tl.maximum(count_B - 1.0, 1.0)
    reward_B = tl.load(rewards_ptr + row_B, mask=row_B < rollouts, other=float("nan"))
    advantage_B = reward_B - mean_B
    if MODE == "rloo":
        advantage_B = advantage_B * count_B / others_B
    if MODE == "grpo":
        square_B = tl.zeros([BLOCK], tl.float32)
        for j in range(start, end, TILE):
            reward_T = tl.load(rewards_ptr + j + tile_T, mask=j + tile_T < end, other=float("nan"))
            near_BT = ((j + tile_T)[None, :] >= start_B[:, None]) & ((j + tile_T)[None, :] < end_B[:, None])
            deviation_BT = reward_T[None, :] - mean_B[:, None]
            member_BT = near_BT & (reward_T == reward_T)[None, :]
            square_B += tl.sum(tl.where(member_BT, deviation_BT * deviation_BT, 0.0), axis=1)
        advantage_B = advantage_B / (tl.sqrt(square_B / others_B) + epsilon)
    counts_B = (most_B > least_B) & (reward_B == reward_B)
    tl.store(advantages_ptr + row_B, tl.where(counts_B, advantage_B, 0.0), mask=row_B < rollouts)


def group_advantages(rewards_R: Tensor, group_ids_R: Tensor, mode: str, epsilon: float) -> Tensor:
    """See `fastgrpo.advantage.group_advantages`."""
    advantages_R = torch.empty_like(rewards_R, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(len(rewards_R), BLOCK),)
    if len(rewards_R):
        arguments = (rewards_R.contiguous(), group_ids_R.contiguous(), advantages_R, len(rewards_R), epsilon)
        _advantage_kernel[grid](*arguments, MODE=mode, BLOCK=BLOCK, TILE=TILE, num_warps=WARPS)
    return advantages_R
