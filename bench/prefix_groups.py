"""Which neighbours of a batch begin with the same blocks of the KV cache, and what of it is read once for them all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Members of a group at most: with six query heads to one of keys they fill one tile of FlashAttention's.
MOST = 16
# Blocks that a group shares at least: a shorter prefix is not worth the second pass.
LEAST = 2


class Groups(NamedTuple):
    """Sequences [B] of a batch in groups of neighbours, of which as many as there are sequences can be; all int32.

    Group g has the sequences from bounds[g] to bounds[g + 1], whose first `prefix_lens[g]` tokens are the same blocks
    (0 where it has one member, or none). What each has beyond them are its suffix' tokens and blocks.
    """

    bounds: Tensor
    prefix_lens: Tensor
    prefix_tables: Tensor
    suffix_lens: Tensor
    suffix_tables: Tensor


def grouped(table_BM: Tensor, lens_B: Tensor, block: int) -> Groups:
    """Groups by the numbers of each sequence's blocks, `lens_B` tokens of `block` to a block; nothing waits for a GPU.

    Each suffix has a token at least, but for a sequence of none.
    """
    (count, width), device = table_BM.shape, table_BM.device
    index_B = torch.arange(count, device=device)
    whole_B = ((lens_B - 1) // block).clamp(min=0).long()
    same_B = (table_BM[1:] == table_BM[:-1]).int().cumprod(1).sum(1)
    shared_B = torch.zeros_like(index_B)
    shared_B[1:] = torch.minimum(same_B, torch.minimum(whole_B[1:], whole_B[:-1]))
    begins_B = shared_B < LEAST
    first_B = torch.where(begins_B, index_B, 0).cummax(0).values
    begins_B = begins_B | ((index_B - first_B) % MOST == 0)
    group_B = begins_B.cumsum(0) - 1
    # A group shares what each of its members but the first shares with the one before it; one alone shares nothing.
    blocks_G = torch.full_like(index_B, width)
    blocks_G.scatter_reduce_(0, group_B, torch.where(begins_B, width, shared_B), "amin")
    blocks_G = torch.where(blocks_G == width, 0, blocks_G)
    bounds = torch.full((count + 1,), count, device=device)
    bounds.scatter_reduce_(0, group_B, index_B, "amin")
    beyond_B = blocks_G[group_B]
    column_BM = (torch.arange(width, device=device) + beyond_B[:, None]).clamp(max=width - 1)
    return Groups(
        bounds.int(),
        (blocks_G * block).int(),
        table_BM[bounds[:-1].clamp(max=count - 1)],
        (lens_B - beyond_B * block).int(),
        table_BM.gather(1, column_BM),
    )
