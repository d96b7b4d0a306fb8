"""Tensors that two processes of one user have in common, without a copy.

On a GPU the one that allocated a tensor lends it by CUDA IPC, and must outlive the other's use of it. On a CPU it is
moved into an anonymous file of memory, which lives as long as either has it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

ALIGNMENT = 64
# Where `rebuild_cuda_tensor`'s arguments name the GPU, which may have another number in each process.
DEVICE = 6


class InFile(NamedTuple):
    """A contiguous tensor `offset` bytes after the start of a file of `size` bytes."""

    path: str
    size: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class OnGpu(NamedTuple):
    """The arguments of torch's `rebuild_cuda_tensor`."""

    arguments: tuple[Any, ...]


Handles = dict[str, InFile | OnGpu]


class Lent:
    """Tensors as another process can open them: `tensors`, moved where needed, and their `handles`.

    `close` once the other has opened them all; on a GPU keep the tensors until it is done with them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._file: int | None = None
        self.tensors, self.handles = dict(tensors), Handles()
        on_cpu = {name: tensor for name, tensor in tensors.items() if tensor.device.type == "cpu"}
        if on_cpu:
            self._move(on_cpu)
        for name, tensor in tensors.items():
            if name not in on_cpu:
                self.handles[name] = OnGpu(reduce_tensor(tensor.detach().as_subclass(Tensor))[1])

    def _move(self, tensors: Mapping[str, Tensor]) -> None:
        size, offsets = 0, {}
        for name, tensor in tensors.items():
            offsets[name] = size
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._file = os.memfd_create("fastgrpo-weights")
        os.ftruncate(self._file, max(size, ALIGNMENT))
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        for name, tensor in tensors.items():
            handle = InFile(path, max(size, ALIGNMENT), offsets[name], tuple(tensor.shape), tensor.dtype)
            self.handles[name] = handle
        moved = opened(self.handles)
        for name, tensor in tensors.items():
            self.tensors[name] = moved[name].copy_(tensor)

    def close(self) -> None:
        """Nobody opens them any more. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def opened(handles: Handles) -> dict[str, Tensor]:
    """The tensors that another process has lent: the same memory."""
    files: dict[str, Tensor] = {}
    tensors = {}
    for name, handle in handles.items():
        if isinstance(handle, OnGpu):
            arguments = list(handle.arguments)
            arguments[DEVICE] = torch.cuda.current_device()
            tensors[name] = rebuild_cuda_tensor(*arguments)
            continue
        if handle.path not in files:
            files[handle.path] = torch.from_file(handle.path, shared=True, size=handle.size, dtype=torch.uint8)
        length = torch.Size(handle.shape).numel() * handle.dtype.itemsize
        rows = files[handle.path][handle.offset : handle.offset + length]
        tensors[name] = rows.view(handle.dtype).view(handle.shape)
    return tensors


def export_parameters(model: nn.Module) -> Handles:
    """Handles of all parameters of the `model`, which are moved where another process can open them."""
    parameters = dict(model.named_parameters())
    lent = Lent({name: parameter.data for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        if lent.tensors[name].data_ptr() != parameter.data_ptr():
            parameter.data = lent.tensors[name]
    return lent.handles


@torch.no_grad()
def load_lent(weights: Handles, model: Any) -> None:
    """Copy the lent `weights` into vLLM's `model`."""
    model.load_weights(opened(weights).items())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
