"""Tensors that are cut over the ranks, as safetensors in a folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as load_distributed
from torch.distributed.tensor import DTensor

from fastgrpo.policy.host_copy import host_copy
from fastgrpo.ranks.collectives import STAGE_WAIT_S, awaiting, is_first_rank, rank_and_world

# Elements of one file: so many are on the host at once of tensors on a GPU, and hold up other threads where safetensors
# is older than 0.8.
FILE_ELEMENTS = 2**26
COPIERS = 8


class Part(NamedTuple):
    """What one rank has of a tensor: a block of it, and the indices at which that begins."""

    block: Tensor
    start: tuple[int, ...]


def own_parts(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """This rank's part of each of `tensors` (DTensor), in their memory; one that is not cut is the first rank's."""
    parts = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            (chunk,) = tensor.__create_chunk_list__()
            parts[name] = Part(tensor.to_local(), tuple(chunk.offsets))
        elif is_first_rank():
            parts[name] = Part(tensor, (0,) * tensor.ndim)
    return {name: part for name, part in parts.items() if part.block.numel()}


def on_host(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The same in host memory of their own, complete when this returns; on a GPU after what the present stream has.

    Most of the time goes into pages that are new, which several threads take together.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def copied(part: Part) -> Part:
        # Each thread has a stream and a GPU of its own.
        with torch.cuda.stream(stream):
            return Part(host_copy(part.block), part.start)

    with ThreadPoolExecutor(COPIERS, thread_name_prefix="copy") as threads:
        return dict(zip(parts, threads.map(copied, parts.values()), strict=True))


def save_parts(parts: Mapping[str, Part], folder: Path) -> None:
    """Write this rank's `parts` into `folder` as safetensors, with the metadata of torch.distributed.checkpoint.

    Nothing is flushed. Not collective. From safetensors 0.8 on other threads run meanwhile; torch's own writer of these
    files makes each of them in memory, and holds Python's lock for 1 to 2.6 s a GiB.
    """
    ends = accumulate(part.block.numel() for part in parts.values())
    files: dict[int, dict[str, Part]] = {}
    for name, end in zip(parts, ends, strict=True):
        files.setdefault(end // FILE_ELEMENTS, {})[name] = parts[name]
    folder.mkdir(parents=True, exist_ok=True)
    for number, held in enumerate(files.values(), 1):
        starts = {name: {"saved_offsets": part.start} for name, part in held.items()}
        path = folder / f"shard-{rank_and_world()[0] + 1:05}-model-{number:05}-of-{len(files):05}.safetensors"
        metadata = {"DCP_SHARDING_INFO": json.dumps(starts), "DCP_VERSION": "1.0", "format": "pt"}
        save_file({name: part.block for name, part in held.items()}, path, metadata)


def load_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read what all ranks' `save_parts` wrote into the memory of `tensors`, on any number of ranks; collective."""
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
