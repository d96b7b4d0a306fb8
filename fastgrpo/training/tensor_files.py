"""Tensors that are cut over the ranks, as safetensors in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint import load as load_distributed
from torch.distributed.checkpoint import save as save_distributed

from fastgrpo.ranks.collectives import STAGE_WAIT_S, awaiting, rank_and_world

# Elements of one file of sharded tensors, over all ranks: a file is built in memory.
FILE_ELEMENTS = 2**28


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write `tensors`, of which each rank has its slices (DTensor), into `folder` as safetensors; collective."""
    sizes = accumulate(tensor.numel() for tensor in tensors.values())
    files = {name: 1 + size // FILE_ELEMENTS for name, size in zip(tensors, sizes, strict=True)}
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    # The checkpoint is flushed as a whole: a file at a time, the disk would rest while the next one is made.
    writer.sync_files = False
    with _checkpoint_deadline():
        save_distributed(tensors, storage_writer=writer, no_dist=rank_and_world()[1] == 1)


def load_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read what `save_tensors` wrote into the memory of `tensors`, on any number of ranks; collective."""
    reader = HuggingFaceStorageReader(str(folder))
    with _checkpoint_deadline():
        load_distributed(tensors, storage_reader=reader, no_dist=rank_and_world()[1] == 1)


@contextmanager
def _checkpoint_deadline() -> Iterator[None]:
    """A deadline for the other ranks' part of a checkpoint, RankError without them, and no warning of being alone."""
    several = rank_and_world()[1] > 1
    waiting = awaiting("the other ranks' part of the checkpoint", STAGE_WAIT_S) if several else nullcontext()
    with waiting, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
