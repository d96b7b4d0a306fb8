"""A parameter's slice on each rank, and what travels between ranks: gradients in, updated slices out.

Gradients are reduce-scattered in buckets, while backward still runs or, summed whole on each rank, once a step; updated
slices are all-gathered into the parameters themselves. With one rank nothing travels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fastgrpo.ranks.collectives import all_gather, awaiting, reduce_scatter
from fastgrpo.training.pieces import BUCKET_ELEMENTS, BUCKETS_IN_FLIGHT, partition

# Larger parameters are gathered in their place.
SMALL_ELEMENTS = 2**20


@dataclass(slots=True)
class Shard:
    """This rank's slice [start, start + len) of one flattened parameter. fp32 parameters are their own master.

    `master` and the moments are on the parameter's device, or on the host; `steps` and `gradient` are on the device.
    `gradient` is of the slice; of the whole parameter while `GradientBuckets` sums whole ones.
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
        return _flat(self.parameter)[self.start : self.start + len(self.exp_avg)]

    def add(self, gradient: Tensor) -> None:
        """Add one micro-batch's gradient, in fp32. Takes ownership of an fp32 tensor."""
        if self.gradient is None:
            self.gradient = gradient.float()
        else:
            self.gradient.add_(gradient)


@dataclass(slots=True)
class Bucket:
    """A collective in flight: row r of the larger side holds rank r's slices of `shards` end to end, each of its size.

    That is `sent` where gradients are reduced and `received` where updated slices are gathered.
    """

    shards: list[Shard]
    sizes: list[int]
    sent: Tensor
    received: Tensor
    work: Any


def slice_of(parameter: nn.Parameter, rank: int, world: int) -> tuple[int, Tensor]:
    """Where `rank`'s slice of the flattened parameter starts, and a view of it; the last ones may be short or empty."""
    size = _slice_size(parameter, world)
    start = min(rank * size, parameter.numel())
    return start, _flat(parameter)[start : start + size]


class GradientBuckets:
    """The way of gradients from backward into the shards of the ranks that own them, summed in fp32.

    They leave with every micro-batch, so that a rank keeps sums of its own slices alone (ZeRO-2); with `whole` a rank
    sums whole gradients and they leave once, in `drain` (ZeRO-1): 4 bytes a parameter more, and as many fewer
    reduce-scatters as there are micro-batches.
    """

    def __init__(self, count: int, world: int, *, whole: bool) -> None:
        """Each backward pass brings `count` gradients, the same parameters' on all `world` ranks."""
        self._count, self._world, self._whole = count, world, whole
        self._waiting: list[Shard] = []
        self._arrivals = 0
        self._in_flight: deque[Bucket] = deque()

    def arrived(self, shard: Shard) -> None:
        """Take the gradient that backward has finished off the shard's parameter."""
        if self._world == 1 or self._whole:
            if self._world > 1 and shard.gradient is None:
                self._waiting.append(shard)
            shard.add(_taken(shard.parameter))
            return
        # Already queued: autograd accumulated into the same `.grad`.
        if all(waiting is not shard for waiting in self._waiting):
            self._waiting.append(shard)
        self._arrivals += 1
        full = sum(waiting.parameter.numel() for waiting in self._waiting) >= BUCKET_ELEMENTS
        # The last bucket leaves with its own backward, so that micro-batches add up in fp32.
        if full or self._arrivals % self._count == 0:
            self._send_waiting()

    def _send_waiting(self) -> None:
        shards, self._waiting = self._waiting, []
        self._send(shards, [_taken(shard.parameter) for shard in shards])

    def _send_sums(self) -> None:
        """Reduce-scatter the whole sums, a bucket after the other; each is freed as it leaves."""
        shards, self._waiting = self._waiting, []
        for indices in partition([shard.parameter.numel() for shard in shards], BUCKET_ELEMENTS):
            bucket, sums = [shards[i] for i in indices], []
            for shard in bucket:
                assert shard.gradient is not None, "a shard waits once it has a sum"
                sums.append(shard.gradient)
                shard.gradient = None
            self._send(bucket, sums)

    def _send(self, shards: list[Shard], gradients: list[Tensor]) -> None:
        """Start the reduce-scatter of the shards' whole flat `gradients`."""
        sizes = _slice_sizes(shards, self._world)
        sent = torch.empty(self._world, sum(sizes), dtype=torch.float32, device=shards[0].parameter.device)
        for gradient, part in zip(gradients, sent.split(sizes, dim=1), strict=True):
            _copy_rows(part, gradient)
        received = torch.empty_like(sent[0])
        work = reduce_scatter(received, sent.view(-1), async_op=True)
        self._in_flight.append(Bucket(shards, sizes, sent, received, work))
        while len(self._in_flight) > BUCKETS_IN_FLIGHT:
            self._receive(self._in_flight.popleft())

    def _receive(self, bucket: Bucket) -> None:
        with awaiting("the gradients of the other ranks"):
            bucket.work.wait()
        for shard, part in zip(bucket.shards, bucket.received.split(bucket.sizes), strict=True):
            shard.add(part[: len(shard.exp_avg)])

    def drain(self) -> None:
        """Wait until every gradient taken is in its shard; collective."""
        if self._waiting:
            self._send_sums() if self._whole else self._send_waiting()
        while self._in_flight:
            self._receive(self._in_flight.popleft())


def gather_updated(shards: Sequence[Shard], world: int) -> None:
    """All-gather the updated slices over `world` ranks: large ones straight into the parameters, in one call.

    Small parameters travel together, as each call costs the time of many bytes; so do uneven ones, padded.
    """
    if world == 1:
        return
    direct, packed = dict[torch.dtype, list[Shard]](), dict[torch.dtype, list[Shard]]()
    for shard in shards:
        size = shard.parameter.numel()
        kind = direct if size >= SMALL_ELEMENTS and size % world == 0 else packed
        kind.setdefault(shard.parameter.dtype, []).append(shard)
    with awaiting("the updated weights of the other ranks"):
        # Large parameters first: the small ones are packed while these travel.
        large = [_all_gather_coalesced(same_dtype) for same_dtype in direct.values()]
        in_flight = deque[Bucket]()
        for same_dtype in packed.values():
            for indices in partition([shard.parameter.numel() for shard in same_dtype], BUCKET_ELEMENTS):
                in_flight.append(_begin_gather([same_dtype[i] for i in indices], world))
                if len(in_flight) > BUCKETS_IN_FLIGHT:
                    _end_gather(in_flight.popleft())
        for bucket in in_flight:
            _end_gather(bucket)
        for work in large:
            work.wait()
        if shards and shards[0].parameter.is_cuda:
            torch.cuda.current_stream().synchronize()


def _begin_gather(shards: list[Shard], world: int) -> Bucket:
    """Start one all-gather of the slices of `shards`, all of one dtype."""
    sizes = _slice_sizes(shards, world)
    sent = torch.cat([_padded(shard.owned, size) for shard, size in zip(shards, sizes, strict=True)])
    received = sent.new_empty(world, len(sent))
    return Bucket(shards, sizes, sent, received, all_gather(received.view(-1), sent, async_op=True))


def _padded(part: Tensor, size: int) -> Tensor:
    return part if len(part) == size else nn.functional.pad(part, (0, size - len(part)))


def _end_gather(bucket: Bucket) -> None:
    """Wait for the bucket's all-gather and write the slices into the parameters."""
    bucket.work.wait()
    targets, sources = [], []
    for shard, part_WC in zip(bucket.shards, bucket.received.split(bucket.sizes, dim=1), strict=True):
        flat = _flat(shard.parameter)
        even = len(flat) == part_WC.numel()
        targets.append(flat.view_as(part_WC) if even else flat)
        sources.append(part_WC if even else part_WC.reshape(-1)[: len(flat)])
    torch._foreach_copy_(targets, sources)


def _all_gather_coalesced(shards: list[Shard]) -> Any:
    """Begin to gather each parameter of `shards`, all of one dtype, in its place, as one operation.

    torch's public call of this kind makes new tensors for the results.
    """
    assert distributed.group.WORLD is not None, "more than one rank have joined"
    wholes, slices = [_flat(shard.parameter) for shard in shards], [shard.owned for shard in shards]
    return distributed.group.WORLD.allgather_into_tensor_coalesced(wholes, slices)


def _slice_sizes(shards: Sequence[Shard], world: int) -> list[int]:
    return [_slice_size(shard.parameter, world) for shard in shards]


def _slice_size(parameter: nn.Parameter, world: int) -> int:
    """Elements of the parameter on a rank that has a whole slice of it."""
    return math.ceil(parameter.numel() / world)


def _flat(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().view(-1)


def _taken(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient, flat, taken off it."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "the hook runs once the gradient is there"
    return gradient.view(-1)


def _copy_rows(rows_WC: Tensor, flat: Tensor) -> None:
    """Write `flat` into the rows of `rows_WC` end to end, and zeros after it."""
    size = rows_WC.shape[1]
    full, rest = divmod(len(flat), size)
    rows_WC[:full].copy_(flat[: full * size].view(full, size))
    if full < len(rows_WC):
        rows_WC[full:].zero_()
        rows_WC[full, :rest].copy_(flat[full * size :])
