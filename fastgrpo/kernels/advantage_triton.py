"""Group advantages in one launch: each program finds the runs its rollouts belong to and compares them pairwise."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.reference import STD_EPSILON

# Constants of the module rather than arguments, each of which would lengthen the launch.
BLOCK, TILE, WARPS = tl.constexpr(32), tl.constexpr(64), 1
EPSILON = tl.constexpr(STD_EPSILON)


@triton.jit
def _is_head(ids_ptr, position, rollouts):
    """Whether a run of equal ids starts at the position; positions outside are no heads."""
    inside = (position >= 0) & (position < rollouts)
    mine = tl.load(ids_ptr + position, mask=inside, other=0)
    before = tl.load(ids_ptr + position - 1, mask=inside & (position > 0), other=0)
    return inside & ((position == 0) | (mine != before))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=["rewards_ptr", "ids_ptr", "advantages_ptr", "rollouts"])
def _advantage_kernel(rewards_ptr, ids_ptr, advantages_ptr, rollouts, MODE: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    row_B = first + tl.arange(0, BLOCK)
    tile_T = tl.arange(0, TILE)
    head_B = _is_head(ids_ptr, row_B, rollouts)
    # Start of the run that holds the block's first rollout, and end of the run that holds its last.
    start, left = tl.max(tl.where(head_B & (row_B == first), row_B, -1), axis=0), first
    while start < 0:
        left -= TILE
        start = tl.max(tl.where(_is_head(ids_ptr, left + tile_T, rollouts), left + tile_T, -1), axis=0)
    end, right = rollouts + 1, first + BLOCK
    while end > rollouts:
        stops_T = _is_head(ids_ptr, right + tile_T, rollouts) | (right + tile_T >= rollouts)
        end = tl.min(tl.where(stops_T, tl.minimum(right + tile_T, rollouts), rollouts + 1), axis=0)
        right += TILE
    # Each rollout's own run within [start, end): from the last head at or before it to the first head after it.
    start_B = tl.maximum(tl.associative_scan(tl.where(head_B, row_B, -1), 0, _larger), start)
    next_head_B = _is_head(ids_ptr, row_B + 1, rollouts) & (row_B + 1 < first + BLOCK)
    end_B = tl.minimum(tl.associative_scan(tl.where(next_head_B, row_B + 1, end), 0, _smaller, reverse=True), end)

    # Sums relative to the rollout's own reward: equal rewards differ by exactly 0.
    reward_B = tl.load(rewards_ptr + row_B, mask=row_B < rollouts, other=float("nan"))
    count_B = tl.zeros([BLOCK], tl.float32)
    total_B = tl.zeros([BLOCK], tl.float32)
    square_B = tl.zeros([BLOCK], tl.float32)
    for j in range(start, end, TILE):
        other_T = j + tile_T
        reward_T = tl.load(rewards_ptr + other_T, mask=other_T < end, other=float("nan"))
        near_TB = (other_T[:, None] >= start_B[None, :]) & (other_T[:, None] < end_B[None, :])
        member_TB = near_TB & (reward_T == reward_T)[:, None]
        difference_TB = tl.where(member_TB, reward_T[:, None] - reward_B[None, :], 0.0)
        count_B += tl.sum(member_TB.to(tl.float32), axis=0)
        total_B += tl.sum(difference_TB, axis=0)
        square_B += tl.sum(difference_TB * difference_TB, axis=0)
    others_B = tl.maximum(count_B - 1.0, 1.0)
    advantage_B = -total_B / tl.maximum(count_B, 1.0)
    if MODE == "rloo":
        advantage_B = -total_B / others_B
    if MODE == "grpo":
        variance_B = tl.maximum(square_B - total_B * total_B / tl.maximum(count_B, 1.0), 0.0) / others_B
        advantage_B = advantage_B / (tl.sqrt(variance_B) + EPSILON)
    tl.store(advantages_ptr + row_B, tl.where(square_B > 0, advantage_B, 0.0), mask=row_B < rollouts)


def group_advantages(rewards_R: Tensor, group_ids_R: Tensor, mode: str) -> Tensor:
    """See `fastgrpo.training.advantage.group_advantages`."""
    device = rewards_R.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        # Triton loads a kernel on the current GPU, launches it there, and keeps it so.
        with torch.cuda.device(device):
            return group_advantages(rewards_R, group_ids_R, mode)
    rewards_R, group_ids_R = rewards_R.contiguous(), group_ids_R.contiguous()
    advantages_R, rollouts = torch.empty_like(rewards_R), rewards_R.numel()
    if rollouts:
        programs = -(-rollouts // BLOCK.value)
        kernel = _compiled(device, group_ids_R.dtype, mode) if device >= 0 else None
        (kernel or _advantage_kernel)[(programs, 1, 1)](rewards_R, group_ids_R, advantages_R, rollouts, mode)
    return advantages_R


@lru_cache
def _compiled(device: int, ids: torch.dtype, mode: str) -> Any:
    """The kernel for these types on the current GPU, which is `device`; None under the interpreter.

    Kept here, as Triton takes 10 us a call to find it again and the rest takes 6. Nothing in it is specialised, so it
    holds for every length and alignment.
    """
    return _advantage_kernel.warmup(torch.float32, ids, torch.float32, 1, mode, grid=(1,), num_warps=WARPS)
