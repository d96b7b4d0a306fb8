"""AdamW on fp32 master weights, its state sharded over the ranks of torch.distributed (ZeRO-2, arXiv 1910.02054).

Every parameter is cut into one flat slice for each rank. A rank keeps fp32 master weights, moments and summed
gradients of its own slices only. Gradients are reduce-scattered in buckets while backward still runs; updated slices
are written into the parameters themselves and all-gathered there, so that where the parameters are vLLM's tensors
(`fastgrpo.weights`) the all-gather is the weight sync. With one rank the same code runs without communication.

With `offload` the fp32 state lives in the host's memory and passes through the device in pieces at each step
(ZeRO-Offload, arXiv 2101.06840, but for the arithmetic, which stays on the device).
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split
from torch.optim.adamw import adamw

from fastgrpo.distributed import STAGE_WAIT_S, all_gather, awaiting, rank_and_world, reduce_scatter
from fastgrpo.watch import within

BUCKET_ELEMENTS = 32 * 2**20
BUCKETS_IN_FLIGHT = 2
# Of a checkpoint's files, over all ranks: a file is built in memory.
FILE_ELEMENTS = 2**28
# Of offloaded state on the device at once.
PIECE_ELEMENTS = 32 * 2**20


@dataclass(frozen=True, slots=True)
class StepReport:
    """`grad_norm`: global 2-norm before clipping. `skipped`: the norm was not finite or too large; nothing changed."""

    grad_norm: float
    skipped: bool


@dataclass(slots=True)
class Shard:
    """This rank's slice [start, start + len) of one flattened parameter. fp32 parameters are their own master.

    `master` and the moments are on the parameter's device, or on the host; `steps` and `gradient` are on the device.
    """

    parameter: nn.Parameter
    start: int
    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    gradient: Tensor | None = None

    @property
    def owned(self) -> Tensor:
        """The slice of the parameter itself; looked up anew, since a weight sync may move the parameter."""
        return self.parameter.detach().view(-1)[self.start : self.start + len(self.exp_avg)]

    def add(self, gradient: Tensor) -> None:
        """Add one micro-batch's gradient of the slice, in fp32. Takes ownership of an fp32 tensor."""
        if self.gradient is None:
            self.gradient = gradient.float()
        else:
            self.gradient.add_(gradient)


@dataclass(slots=True)
class Bucket:
    """A reduce-scatter in flight: row r of `sent` holds rank r's slices of `shards`, end to end."""

    shards: list[Shard]
    sent: Tensor
    received: Tensor
    work: Any


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101) on matrices, none on biases and norms.

    Hooks on the parameters take each gradient as backward finishes it, so `parameter.grad` stays None and gradients
    add up over micro-batches in fp32 until `step`. Losses must be scaled so that gradients add up over micro-batches
    and ranks. Every rank must run the same number of backward passes.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        skip_grad_norm: float = math.inf,
        offload: bool = False,
    ) -> None:
        """Gradients are clipped to a global norm of `max_grad_norm`; above `skip_grad_norm` the step is skipped.

        `offload` keeps master weights and moments in the host's memory; the steps are the same.
        """
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.max_grad_norm, self.skip_grad_norm, self.offload = max_grad_norm, skip_grad_norm, offload
        self.rank, self.world = rank_and_world()
        if self.world > 1:
            on_host = offload or not torch.cuda.is_available()
            self._mesh = DeviceMesh("cpu" if on_host else "cuda", range(self.world))
        self._shards = [self._shard(parameter) for parameter in parameters if parameter.requires_grad]
        self._waiting: list[Shard] = []
        self._arrivals = 0
        self._in_flight: deque[Bucket] = deque()
        for index, shard in enumerate(self._shards):
            shard.parameter.register_post_accumulate_grad_hook(_arrival(weakref.ref(self), index))

    def step(self) -> StepReport:
        """Apply the gradients gathered since the last step and forget them. Collective over the ranks."""
        self._drain()
        shards = [shard for shard in self._shards if shard.gradient is not None]
        gradients = _gradients(shards)
        norm = self._grad_norm(gradients)
        skipped = not norm <= self.skip_grad_norm or math.isinf(norm)
        if not skipped:
            if norm > self.max_grad_norm:
                torch._foreach_mul_(gradients, self.max_grad_norm / norm)
            self._update([shard for shard in shards if shard.parameter.ndim > 1], self.weight_decay)
            self._update([shard for shard in shards if shard.parameter.ndim <= 1], 0.0)
            self._gather(shards)
        self.zero_grad()
        return StepReport(norm, skipped)

    def zero_grad(self) -> None:
        """Forget the gradients gathered since the last step."""
        self._drain()
        for shard in self._shards:
            shard.gradient = None

    def save(self, folder: Path) -> None:
        """Write the state into `folder` as safetensors (torch.distributed.checkpoint). Each rank writes its own slices.

        It loads on any number of ranks; parameters are told apart by their order.
        """
        save_state(self._state(), folder)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; each rank reads its own slices."""
        tensors = self._state()
        load_state(tensors, folder)
        for shard, steps in zip(self._shards, tensors["steps"], strict=True):
            shard.steps.copy_(steps)

    def _state(self) -> dict[str, Tensor]:
        """Every parameter's whole flat state by name, of which this rank holds its slices; they share memory."""
        tensors = {"steps": torch.stack([shard.steps for shard in self._shards])}
        for index, shard in enumerate(self._shards):
            tensors[f"{index}.exp_avg"] = self._sharded(shard, shard.exp_avg)
            tensors[f"{index}.exp_avg_sq"] = self._sharded(shard, shard.exp_avg_sq)
            if shard.master is not None:
                tensors[f"{index}.master"] = self._sharded(shard, shard.master)
        return tensors

    def _sharded(self, shard: Shard, mine: Tensor) -> Tensor:
        """The flat tensor of which `mine` is this rank's slice: DTensor cuts into the same slices as `_shard`."""
        if self.world == 1:
            return mine
        shape = torch.Size([shard.parameter.numel()])
        return DTensor.from_local(mine, self._mesh, [Split(0)], run_check=False, shape=shape, stride=(1,))

    def _shard(self, parameter: nn.Parameter) -> Shard:
        size = math.ceil(parameter.numel() / self.world)
        start = min(self.rank * size, parameter.numel())
        mine = parameter.detach().view(-1)[start : start + size]
        return Shard(
            parameter=parameter,
            start=start,
            master=None if parameter.dtype == torch.float32 else self._zeros(mine).copy_(mine),
            exp_avg=self._zeros(mine),
            exp_avg_sq=self._zeros(mine),
            steps=torch.zeros((), device=parameter.device),
        )

    def _zeros(self, mine: Tensor) -> Tensor:
        """State of a slice in fp32: beside it, or in host memory that the device reads at full speed."""
        device = "cpu" if self.offload else mine.device
        return torch.zeros(len(mine), device=device, pin_memory=self.offload and mine.is_cuda)

    def _arrived(self, shard: Shard) -> None:
        if self.world == 1:
            shard.add(_taken(shard.parameter))
            return
        # A parameter that still waits has added this gradient to the one that it holds.
        if all(waiting is not shard for waiting in self._waiting):
            self._waiting.append(shard)
        self._arrivals += 1
        full = sum(waiting.parameter.numel() for waiting in self._waiting) >= BUCKET_ELEMENTS
        # The last bucket leaves with its own backward, so that micro-batches add up in fp32.
        if full or self._arrivals % len(self._shards) == 0:
            self._send()

    def _send(self) -> None:
        """Start the reduce-scatter of the waiting gradients."""
        shards, self._waiting = self._waiting, []
        sizes = [math.ceil(shard.parameter.numel() / self.world) for shard in shards]
        sent = torch.zeros(self.world, sum(sizes), device=shards[0].parameter.device)
        for shard, part in zip(shards, sent.split(sizes, dim=1), strict=True):
            _copy_rows(part, _taken(shard.parameter))
        received = torch.empty_like(sent[0])
        work = reduce_scatter(received, sent.view(-1), async_op=True)
        self._in_flight.append(Bucket(shards, sent, received, work))
        while len(self._in_flight) > BUCKETS_IN_FLIGHT:
            self._receive(self._in_flight.popleft())

    def _receive(self, bucket: Bucket) -> None:
        with awaiting("the gradients of the other ranks"):
            bucket.work.wait()
        sizes = [math.ceil(shard.parameter.numel() / self.world) for shard in bucket.shards]
        for shard, part in zip(bucket.shards, bucket.received.split(sizes), strict=True):
            shard.add(part[: len(shard.exp_avg)])

    def _drain(self) -> None:
        if self._waiting:
            self._send()
        while self._in_flight:
            self._receive(self._in_flight.popleft())

    def _grad_norm(self, gradients: list[Tensor]) -> float:
        if not gradients:
            return 0.0
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self.world == 1:
            return float(square.sqrt())
        with awaiting("the gradient norms of the other ranks"):
            distributed.all_reduce(square)
            return float(square.sqrt())

    @torch.no_grad()
    def _update(self, shards: list[Shard], weight_decay: float) -> None:
        if self.offload:
            return self._update_offloaded(shards, weight_decay)
        if not shards:
            return
        masters = [shard.owned if shard.master is None else shard.master for shard in shards]
        moments = [shard.exp_avg for shard in shards], [shard.exp_avg_sq for shard in shards]
        self._adamw(masters, _gradients(shards), *moments, [shard.steps for shard in shards], weight_decay)
        rounded = [shard for shard in shards if shard.master is not None]
        if rounded:
            masters = [shard.master for shard in rounded if shard.master is not None]
            torch._foreach_copy_([shard.owned for shard in rounded], masters)

    def _update_offloaded(self, shards: list[Shard], weight_decay: float) -> None:
        for shard, gradient in zip(shards, _gradients(shards), strict=True):
            steps = shard.steps.clone()
            for first in range(0, len(gradient), PIECE_ELEMENTS):
                piece = slice(first, first + PIECE_ELEMENTS)
                held = [state[piece] for state in (shard.exp_avg, shard.exp_avg_sq, shard.master) if state is not None]
                exp_avg, exp_avg_sq, *own = [state.to(gradient.device, non_blocking=True) for state in held]
                master = own[0] if own else shard.owned[piece]
                shard.steps.copy_(steps)
                self._adamw([master], [gradient[piece]], [exp_avg], [exp_avg_sq], [shard.steps], weight_decay)
                shard.owned[piece].copy_(master)
                for state, updated in zip(held, (exp_avg, exp_avg_sq, *own), strict=True):
                    state.copy_(updated, non_blocking=True)
        if shards and shards[0].parameter.is_cuda:
            # Whoever reads the host's memory next does not wait for the device.
            torch.cuda.current_stream().synchronize()

    def _adamw(
        self,
        masters: list[Tensor],
        gradients: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        weight_decay: float,
    ) -> None:
        adamw(
            masters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def _gather(self, shards: list[Shard]) -> None:
        """All-gather the updated slices, straight into the parameters where they divide evenly."""
        if self.world == 1:
            return
        works, padded = [], []
        for shard in shards:
            flat = shard.parameter.detach().view(-1)
            if len(flat) % self.world == 0:
                works.append(all_gather(flat, shard.owned, async_op=True))
            else:
                padded.append(shard)
        for shard in padded:
            self._gather_padded(shard)
        with awaiting("the updated weights of the other ranks"):
            for work in works:
                work.wait()
            if shards and shards[0].parameter.is_cuda:
                torch.cuda.current_stream().synchronize()

    def _gather_padded(self, shard: Shard) -> None:
        flat = shard.parameter.detach().view(-1)
        size = math.ceil(len(flat) / self.world)
        whole = flat.new_empty(self.world * size)
        all_gather(whole, nn.functional.pad(shard.owned, (0, size - len(shard.exp_avg))))
        flat.copy_(whole[: len(flat)])


def save_state(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write `tensors`, of which each rank has its slices (DTensor), into `folder` as safetensors; collective."""
    sizes = accumulate(tensor.numel() for tensor in tensors.values())
    files = {name: 1 + size // FILE_ELEMENTS for name, size in zip(tensors, sizes, strict=True)}
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    with _alone_or_in_time():
        distributed.checkpoint.save(tensors, storage_writer=writer, no_dist=rank_and_world()[1] == 1)


def load_state(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read what `save_state` wrote into the memory of `tensors`, on any number of ranks; collective."""
    reader = HuggingFaceStorageReader(str(folder))
    with _alone_or_in_time():
        distributed.checkpoint.load(tensors, storage_reader=reader, no_dist=rank_and_world()[1] == 1)


@contextmanager
def _alone_or_in_time() -> Iterator[None]:
    """A deadline for the other ranks' part of a checkpoint, and no warning that a single process is alone."""
    with within(STAGE_WAIT_S, "waited for the other ranks' part of the checkpoint"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _arrival(optimizer: weakref.ref[AdamW], index: int) -> Callable[[nn.Parameter], None]:
    """A gradient hook that keeps neither optimizer nor shard alive: a policy may outlive several."""

    def arrived(_: nn.Parameter) -> None:
        owner = optimizer()
        if owner is not None:
            owner._arrived(owner._shards[index])

    return arrived


def _gradients(shards: list[Shard]) -> list[Tensor]:
    return [shard.gradient for shard in shards if shard.gradient is not None]


def _taken(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient, flat, taken off it."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "the hook runs once the gradient is there"
    return gradient.view(-1)


def _copy_rows(rows_WC: Tensor, flat: Tensor) -> None:
    """Write `flat` into the rows of `rows_WC` end to end; the last rows may stay short."""
    size = rows_WC.shape[1]
    full = len(flat) // size
    rows_WC[:full].copy_(flat[: full * size].view(full, size))
    if len(flat) > full * size:
        rows_WC[full, : len(flat) - full * size].copy_(flat[full * size :])
