"""Chunk and block sizes by shape. `python bench/tune_loss_head.py` measures the table's rows on a GPU."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class RowBlock(NamedTuple):
    """How one Triton program walks a row of logits: `lanes` neighbours, `unroll` deep, by `warps` warps."""

    lanes: int
    unroll: int
    warps: int


class ForwardTile(NamedTuple):
    """Rows, words and hidden dimensions of a tile, stages of its pipeline, warps; blocks of rows walked together."""

    rows: int
    words: int
    depth: int
    stages: int
    warps: int
    group: int


# Rows of logits up to this many bytes per chunk. GPU: few chunks (each adds a read and a write of dW) in 0.6 GiB at a
# vocabulary of 150 k; CPU: the chunk stays in the cores' caches between the matrix products and the row passes.
CHUNK_BYTES = {"cuda": 640 << 20, "cpu": 8 << 20}
# A sum of chunks' dW is kept in fp32 up to this size; above it in the weight's dtype, rounded once for each chunk.
FP32_SUM_BYTES = 64 << 20
CHUNK_MULTIPLE = {"cuda": 128, "cpu": 16}
# Rows at once where no gradient is wanted. The vocabulary is then walked in equal parts: on an H200 a product of 8192
# rows and 37,984 columns (a quarter of 151,936) is 6 % faster than one of a quarter of the rows and all columns. With
# 38,016 columns, a multiple of 128, cuBLAS picks other tiles and is 5 % slower again, so parts are rounded to 16 only.
FORWARD_ROWS = {"cuda": 8192, "cpu": 1024}
COLUMN_MULTIPLE = 16
# The product that folds its own tiles: on an H100 at 16,384 rows 1.19, 1.07 and 1.04 x the plain product for H = 896,
# 1536 and 2048, where the walk takes 1.28, 1.16 and 1.10 x; for 3072 and 4096 1.14 and 1.11 x, the walk 1.08 and 1.05.
# It begins at a whole group of blocks of rows, as fewer rows share each block of words with fewer others.
FORWARD_TILE = ForwardTile(rows=128, words=256, depth=64, stages=4, warps=8, group=32)
FOLDED_ROWS, FOLDED_HIDDEN = FORWARD_TILE.rows * FORWARD_TILE.group, 2048


def chunk_rows(device: str, rows: int, vocabulary: int, itemsize: int) -> int:
    """Rows of each chunk: equal chunks, as few as the budget allows, so that no small remainder pays for a whole dW."""
    multiple = CHUNK_MULTIPLE[device]
    budget = max(CHUNK_BYTES[device] // (vocabulary * itemsize) // multiple, 1) * multiple
    chunks = -(-rows // budget)
    even = -(-rows // chunks)
    return min(-(-even // multiple) * multiple, rows)


def forward_chunk(device: str, rows: int, vocabulary: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of each chunk where no gradient is wanted: as few chunks of about `elements` logits as can be."""
    row_chunks = -(-rows // FORWARD_ROWS[device])
    chunk = -(-rows // row_chunks)
    column_chunks = -(-vocabulary // max(elements // chunk, COLUMN_MULTIPLE))
    columns = -(-vocabulary // column_chunks)
    return chunk, min(-(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE, vocabulary)


def folding_pays(rows: int, hidden: int, vocabulary: int) -> bool:
    """Whether the product is to fold its own tiles; only the last rows and the last words fill no tile."""
    whole = rows >= FOLDED_ROWS and vocabulary >= FORWARD_TILE.words and hidden % FORWARD_TILE.depth == 0
    return whole and 0 < hidden <= FOLDED_HIDDEN


def row_block(vocabulary: int) -> RowBlock:
    """Block of the kernels that pass over a row once."""
    return RowBlock(1024, 1, 4) if vocabulary <= 4096 else RowBlock(2048, 4, 8)


def loss_row_block(vocabulary: int) -> RowBlock:
    """Block of the kernel that passes over a row twice: wide, so that few rows at once keep the memory busy."""
    return RowBlock(1024, 1, 4) if vocabulary <= 4096 else RowBlock(8192, 4, 32)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def resident_rows(device: torch.device, vocabulary: int) -> int:
    """Rows at work at once in the two-pass kernel: two for each multiprocessor where a row is long."""
    if device.type != "cuda" or vocabulary <= 4096:
        return 1 << 30
    return 2 * multiprocessors(device)
