"""Rows of recurrent layers in chunks of tokens, and how much of a state is left between two places in them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 64


def chunks_of(length: int) -> int:
    """Chunks of a row, the last one perhaps not full."""
    return -(-length // CHUNK)


def whole_chunks(length: int) -> int:
    """Tokens of the chunks that so many take: what a short row is computed with is as much as a full chunk's."""
    return chunks_of(length) * CHUNK


def in_chunks(given: Tensor) -> Tensor:
    """[B, L, X, ...] as chunks of C = `CHUNK` tokens, [B, L / C, X, C, ...], zeros after the last token."""
    if beyond := -given.shape[1] % CHUNK:
        given = pad(given, (0, 0) * (given.ndim - 2) + (0, beyond))
    return given.unflatten(1, (-1, CHUNK)).movedim(2, 3)


def fading(at: Tensor, since: Tensor, *, own: bool = True) -> Tensor:
    """exp(at_i - since_j) for j < i, and its `own` j = i, else 0: [..., I] and [..., J] to [..., I, J], fp32."""
    later = torch.ones(at.shape[-1], since.shape[-1], dtype=torch.bool, device=at.device).triu_(int(own))
    # Masked before exp, which would overflow.
    return (at[..., :, None] - since[..., None, :]).float().masked_fill_(later, -torch.inf).exp_()
