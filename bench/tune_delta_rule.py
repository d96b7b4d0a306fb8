"""What the blocks of the gated delta rule's kernels were chosen from, on one GPU: `python bench/tune_delta_rule.py`.

Each kernel alone, at the sizes of a layer of Qwen3-Next: microseconds by block, the one in use first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from bench_recurrent import DELTA, DEVICE, delta_inputs
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from fastgrpo.kernels import delta_rule_backward_triton as backward
from fastgrpo.kernels import delta_rule_forward_triton as forward
from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.delta_rule import gated_delta_rule
from fastgrpo.kernels.delta_rule_tiles_triton import Block, Sizes, launch_for

# Not with four warps and one stage: of the same kernels ptxas 12.8, which Triton 3.6 brings, then makes code that reads
# where no memory is, after which nothing runs on the GPU; `tests/helpers/compile_kernels.py` finds such code.
OVER_CHUNKS = [(16, 4, 2), (32, 4, 2), (32, 4, 3), (32, 8, 2), (64, 4, 2), (64, 8, 1)]
OVER_BLOCKS = [(32, 4, 1), (64, 4, 1), (64, 8, 1), (128, 8, 1)]
OVER_VALUES = [(16, 8, 2), (32, 4, 1), (32, 4, 2), (32, 8, 1), (32, 8, 2), (64, 8, 1), (64, 8, 2)]
BLOCKS = {
    "_within_kernel": [(64, 2, 1), (64, 4, 1), (64, 8, 1)],
    "_states_kernel": OVER_CHUNKS,
    "_outputs_kernel": OVER_BLOCKS,
    "_d_within_kernel": OVER_BLOCKS,
    "_d_states_kernel": OVER_CHUNKS,
    "_d_reads_kernel": OVER_VALUES,
    "_d_writes_kernel": OVER_VALUES,
}
# Kernels that have a program for each block of values' columns.
BLOCKED = ("_states_kernel", "_outputs_kernel", "_d_within_kernel", "_d_states_kernel")


def microseconds(run: Callable[[], None]) -> str:
    """Of a launch, or why there is none."""
    try:
        return f"{1e3 * do_bench(run):.0f} us"
    except OutOfResources as error:
        return f"does not fit: {error}"


def time_blocks(kernel: Any, block: Block, sizes: Sizes, programs: int, *tensors: Tensor) -> None:
    """A launch by its block, and the launch itself."""
    name = kernel.fn.__name__
    for other in dict.fromkeys([block, *(Block(*each) for each in BLOCKS[name])]):
        count = programs // sizes.blocks(block) * sizes.blocks(other) if name in BLOCKED else programs
        run = partial(launch_for, kernel, other, sizes, count, *tensors)
        print(f"{name} {tuple(other)}: {microseconds(run)}", flush=True)
    launch_for(kernel, block, sizes, programs, *tensors)


def time_warps(kernel: Any, programs: int, *tensors: Tensor, num_warps: int, **constants: Any) -> None:
    """A launch by its warps, and the launch itself."""
    for warps in dict.fromkeys([num_warps, 1, 2, 4, 8]):
        run = partial(launch, kernel, programs, *tensors, num_warps=warps, **constants)
        print(f"{kernel.fn.__name__} {warps} warps: {microseconds(run)}", flush=True)
    launch(kernel, programs, *tensors, num_warps=num_warps, **constants)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        raise SystemExit("tuning needs a GPU")
    torch.manual_seed(0)
    inputs = delta_inputs(options.rows, options.length, DELTA["qwen3-next"], torch.bfloat16)
    # One after the other: heads that are computed in parts would be measured in each.
    with (
        mock.patch("fastgrpo.kernels.delta_rule.TOGETHER", 2**40),
        mock.patch.object(forward, "launch", time_warps),
        mock.patch.object(forward, "launch_for", time_blocks),
        mock.patch.object(backward, "launch_for", time_blocks),
    ):
        torch.autograd.grad(gated_delta_rule(*inputs)[0].sum(), inputs)


if __name__ == "__main__":
    main()
