"""The sharded optimizer's all-gather of the updated weights into vLLM's memory, beside one all-gather of the bytes.

    torchrun --nproc-per-node 2 bench/bench_ranks.py [--size 1.5b] [--save FILE]

That all-gather is the weight sync over ranks. Random weights of the shape `--size`, medians on the slowest rank.
`bench_loop.py` has the whole step over ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch
from engine_setup import emit, report, save
from model_shapes import CUDA, GIB, SHAPES, named, random_model, timed
from torch import nn

from fastgrpo.program import run_program
from fastgrpo.ranks.collectives import all_gather, joined_ranks, over_ranks
from fastgrpo.training.slices import Shard, gather_updated, slice_of

REPEATS = 20


def slices(parameters: Iterable[nn.Parameter], rank: int, world: int) -> list[Shard]:
    """The optimizer's slices, without its state: at 7 B that would leave no room for the floor's copies."""
    found = []
    for parameter in parameters:
        start, mine = slice_of(parameter, rank, world)
        nothing = torch.empty_like(mine, device="meta")
        found.append(Shard(parameter, start, None, nothing, nothing, nothing))
    return found


def run(size: str, rank: int, world: int) -> dict[str, float]:
    """This rank's part; what all ranks together measured: milliseconds of `ours` and of the `floor`, and `gib`."""
    model = random_model(size, "cuda" if CUDA else "cpu")
    parameters = list(model.parameters())
    shards, norms = slices(parameters, rank, world), torch._foreach_norm(parameters)
    for shard in shards:
        mine = shard.owned.clone()
        shard.parameter.detach().zero_()
        shard.owned.copy_(mine)
    gather_updated(shards, world)
    assert torch.equal(torch.stack(torch._foreach_norm(parameters)), torch.stack(norms))
    one = torch.cat([shard.owned for shard in shards])
    whole = one.new_empty(world * len(one))
    functions = {"ours": lambda: gather_updated(shards, world), "floor": lambda: all_gather(whole, one)}
    for function in functions.values():
        timed(function)
    seconds = {name: median(timed(function)[1] for _ in range(REPEATS)) for name, function in functions.items()}
    slowest = over_ranks(seconds, dict.fromkeys(seconds, max))
    return {name: 1e3 * value for name, value in slowest.items()} | {"gib": whole.nbytes / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    with joined_ranks() as (rank, world):
        if world == 1:
            parser.error("one rank has nobody to gather from: torchrun --nproc-per-node 2 bench/bench_ranks.py")
        measured = run(options.size, rank, world)
        if rank == 0:
            emit("gather", measured)
            ours, floor, gib = measured.values()
            value = f"{ours:.2f}, {floor:.2f}, {ours / floor:.2f} for {gib:.2f} GiB"
            report(f"all-gather over {world} ranks, ms: ours, one call for all the bytes, ratio", value)
            if options.save:
                save(options.save, f"All-gather of the weights, {world} ranks, {named(options.size)}")


if __name__ == "__main__":
    run_program(main)
