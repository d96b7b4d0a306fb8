"""A parameter's slice on each rank, and what travels between ranks: gradients in, updated slices out.

Gradients are reduce-scattered in buckets while backward still runs; updated slices are all-gathered into the parameters
themselves. With one rank nothing travels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fastgrpo.distributed import all_gather, awaiting, reduce_scatter

# Of gradients, or of parameters that are gathered together.
BUCKET_ELEMENTS = 32 * 2**20
BUCKETS_IN_FLIGHT = 2
# Larger parameters are gathered in their place.
SMALL_ELEMENTS = 2**20


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


class GradientBuckets:
    """The way of gradients from backward into the shards of the ranks that own them, summed in fp32."""

    def __init__(self, count: int, world: int) -> None:
        """Each backward pass brings `count` gradients, the same parameters' on all `world` ranks."""
        self._count, self._world = count, world
        self._waiting: list[Shard] = []
        self._arrivals = 0
        self._in_flight: deque[Bucket] = deque()

    def arrived(self, shard: Shard) -> None:
        """Take the gradient that backward has finished off the shard's parameter."""
        if self._world == 1:
            shard.add(_taken(shard.parameter))
            return
        # A parameter that still waits has added this gradient to the one that it holds.
        if all(waiting is not shard for waiting in self._waiting):
            self._waiting.append(shard)
        self._arrivals += 1
        full = sum(waiting.parameter.numel() for waiting in self._waiting) >= BUCKET_ELEMENTS
        # The last bucket leaves with its own backward, so that micro-batches add up in fp32.
        if full or self._arrivals % self._count == 0:
            self._send()

    def _send(self) -> None:
        """Start the reduce-scatter of the waiting gradients."""
        shards, self._waiting = self._waiting, []
        sizes = [math.ceil(shard.parameter.numel() / self._world) for shard in shards]
        sent = torch.empty(self._world, sum(sizes), device=shards[0].parameter.device)
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
        sizes = [math.ceil(shard.parameter.numel() / self._world) for shard in bucket.shards]
        for shard, part in zip(bucket.shards, bucket.received.split(sizes), strict=True):
            shard.add(part[: len(shard.exp_avg)])

    def drain(self) -> None:
        """Wait until every gradient taken is in its shard; collective."""
        if self._waiting:
            self._send()
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
    in_flight = deque[Pack]()
    with awaiting("the updated weights of the other ranks"):
        # These first: the last of them are unpacked while the large ones travel.
        for together in (pack for same_dtype in packed.values() for pack in _packs(same_dtype)):
            in_flight.append(Pack.begun(together, world))
            if len(in_flight) > BUCKETS_IN_FLIGHT:
                in_flight.popleft().finish()
        large = [_all_gather_coalesced(same_dtype) for same_dtype in direct.values()]
        for pack in in_flight:
            pack.finish()
        for work in large:
            work.wait()
        if shards and shards[0].parameter.is_cuda:
            torch.cuda.current_stream().synchronize()


def _packs(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """`shards` in pieces of at most `BUCKET_ELEMENTS` of their parameters' elements, or of one shard."""
    pack, size = list[Shard](), 0
    for shard in shards:
        if pack and size + shard.parameter.numel() > BUCKET_ELEMENTS:
            yield pack
            pack, size = [], 0
        pack.append(shard)
        size += shard.parameter.numel()
    if pack:
        yield pack


@dataclass(slots=True)
class Pack:
    """An all-gather in flight: row r of `received` holds rank r's slices of `shards`, end to end."""

    shards: list[Shard]
    sizes: list[int]
    sent: Tensor
    received: Tensor
    work: Any

    @classmethod
    def begun(cls, shards: list[Shard], world: int) -> Pack:
        """Start it; all `shards` are of one dtype."""
        sizes = [math.ceil(shard.parameter.numel() / world) for shard in shards]
        slices = [shard.owned for shard in shards]
        sent = torch.cat([nn.functional.pad(s, (0, size - len(s))) for s, size in zip(slices, sizes, strict=True)])
        received = sent.new_empty(world, len(sent))
        return cls(shards, sizes, sent, received, all_gather(received.view(-1), sent, async_op=True))

    def finish(self) -> None:
        """Wait for it and write the slices into the parameters."""
        self.work.wait()
        for shard, part_WC in zip(self.shards, self.received.split(self.sizes, dim=1), strict=True):
            flat = _flat(shard)
            flat.copy_(part_WC.reshape(-1)[: len(flat)])


def _all_gather_coalesced(shards: list[Shard]) -> Any:
    """Begin to gather each parameter of `shards`, all of one dtype, in its place, as one operation.

    torch's public call of this kind makes new tensors for the results.
    """
    assert distributed.group.WORLD is not None, "more than one rank have joined"
    wholes, slices = [_flat(shard) for shard in shards], [shard.owned for shard in shards]
    return distributed.group.WORLD.allgather_into_tensor_coalesced(wholes, slices)


def _flat(shard: Shard) -> Tensor:
    """The whole parameter."""
    return shard.parameter.detach().view(-1)


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
