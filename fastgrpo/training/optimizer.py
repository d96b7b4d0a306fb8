"""AdamW on fp32 master weights, its state sharded over the ranks of torch.distributed (ZeRO, arXiv 1910.02054).

Every parameter is cut into one flat slice for each rank. A rank keeps fp32 master weights, moments and summed gradients
of its own slices only (ZeRO-2), or with `whole_gradients` the sums of all (ZeRO-1). Gradients are reduce-scattered in
buckets while backward still runs, whole sums once a step. Updated slices are written into the parameters themselves and
all-gathered there, so that where the parameters are vLLM's tensors (`engine.shared_weights`) the all-gather is the
weight sync. With one rank the same code runs without communication.

With `offload` the fp32 state lives in the host's memory and passes through the device in pieces at each step
(ZeRO-Offload, arXiv 2101.06840, but for the arithmetic, which stays on the device).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split
from torch.optim.adamw import adamw

from fastgrpo.ranks.collectives import awaiting, rank_and_world
from fastgrpo.training.pieces import PIECE_ELEMENTS
from fastgrpo.training.slices import GradientBuckets, Shard, gather_updated, slice_of
from fastgrpo.training.tensor_files import Part, load_tensors, own_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWOptions:
    """Gradients are clipped to a global norm of `max_grad_norm`; above `skip_grad_norm` the step is skipped."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    skip_grad_norm: float = math.inf


@dataclass(frozen=True, slots=True)
class StepReport:
    """`grad_norm`: global 2-norm before clipping. `skipped`: the norm was not finite or too large; nothing changed."""

    grad_norm: float
    skipped: bool


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101) on matrices, none on biases and norms.

    Hooks on the parameters take each gradient as backward finishes it, so `parameter.grad` stays None and gradients
    add up over micro-batches in fp32 until `step`. Losses must be scaled so that gradients add up over micro-batches
    and ranks. Every rank must run the same number of backward passes.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        options: AdamWOptions,
        *,
        offload: bool = False,
        whole_gradients: bool = False,
    ) -> None:
        """`lr` may change between steps. `offload` keeps master weights and moments in the host's memory.

        `whole_gradients`: every rank sums them whole, so that they travel once a step (see `GradientBuckets`).
        """
        self.lr, self.options, self.offload = options.lr, options, offload
        self.rank, self.world = rank_and_world()
        self.shards = [self._shard(parameter) for parameter in parameters if parameter.requires_grad]
        if self.world > 1:
            # Where the state is: on another device DTensor would hold copies of it.
            self._mesh = DeviceMesh(self.shards[0].exp_avg.device.type, range(self.world))
        self._buckets = GradientBuckets(len(self.shards), self.world, whole=whole_gradients)
        for index, shard in enumerate(self.shards):
            shard.parameter.register_post_accumulate_grad_hook(_arrival(weakref.ref(self), index))

    def step(self) -> StepReport:
        """Apply the gradients gathered since the last step and forget them. Collective over the ranks."""
        self._buckets.drain()
        shards = [shard for shard in self.shards if shard.gradient is not None]
        gradients = _gradients(shards)
        report = clip_gradients(gradients, self.options)
        if not report.skipped:
            self._update([shard for shard in shards if shard.parameter.ndim > 1], self.options.weight_decay)
            self._update([shard for shard in shards if shard.parameter.ndim <= 1], 0.0)
            gather_updated(shards, self.world)
        self.zero_grad()
        return report

    def zero_grad(self) -> None:
        """Forget the gradients gathered since the last step."""
        self._buckets.drain()
        for shard in self.shards:
            shard.gradient = None

    def parts(self) -> dict[str, Part]:
        """This rank's slices of the state, in the memory where they are used; parameters are named by their order."""
        return own_parts(self._state())

    def load(self, folder: Path) -> None:
        """Restore all ranks' `parts`, as `save_parts` wrote them, on any number of ranks; each reads its own slices."""
        tensors = self._state()
        load_tensors(tensors, folder)
        for shard, steps in zip(self.shards, tensors["steps"], strict=True):
            shard.steps.copy_(steps)

    def _state(self) -> dict[str, Tensor]:
        """Every parameter's whole flat state by name, of which this rank holds its slices; they share memory."""
        tensors = {"steps": torch.stack([shard.steps for shard in self.shards])}
        for index, shard in enumerate(self.shards):
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
        start, mine = slice_of(parameter, self.rank, self.world)
        return Shard(
            parameter=parameter,
            start=start,
            master=None if parameter.dtype == torch.float32 else self._zeros(mine).copy_(mine),
            exp_avg=self._zeros(mine),
            exp_avg_sq=self._zeros(mine),
            steps=torch.zeros((), dtype=torch.float32, device=parameter.device),
        )

    def _zeros(self, mine: Tensor) -> Tensor:
        """State of a slice in fp32: beside it, or in host memory that the device reads at full speed."""
        device = "cpu" if self.offload else mine.device
        return torch.zeros(len(mine), dtype=torch.float32, device=device, pin_memory=self.offload and mine.is_cuda)

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
            beta1=self.options.betas[0],
            beta2=self.options.betas[1],
            lr=self.lr,
            weight_decay=weight_decay,
            eps=self.options.eps,
            maximize=False,
        )


def clip_gradients(gradients: list[Tensor], options: AdamWOptions) -> StepReport:
    """Scale `gradients`, this rank's slices, down to a 2-norm of `max_grad_norm` over all ranks; collective.

    A norm that is not finite or above `skip_grad_norm` leaves them as they are: the step is to be skipped.
    """
    norm = _global_norm(gradients)
    skipped = not norm <= options.skip_grad_norm or math.isinf(norm)
    if not skipped and norm > options.max_grad_norm:
        torch._foreach_mul_(gradients, options.max_grad_norm / norm)
    return StepReport(norm, skipped)


def _global_norm(gradients: list[Tensor]) -> float:
    if not gradients:
        return 0.0
    square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    if rank_and_world()[1] == 1:
        return float(square.sqrt())
    with awaiting("the gradient norms of the other ranks"):
        distributed.all_reduce(square)
        return float(square.sqrt())


def _arrival(optimizer: weakref.ref[AdamW], index: int) -> Callable[[nn.Parameter], None]:
    """A gradient hook that keeps neither optimizer nor shard alive: a policy may outlive several."""

    def arrived(_: nn.Parameter) -> None:
        owner = optimizer()
        if owner is not None:
            owner._buckets.arrived(owner.shards[index])

    return arrived


def _gradients(shards: list[Shard]) -> list[Tensor]:
    return [shard.gradient for shard in shards if shard.gradient is not None]
