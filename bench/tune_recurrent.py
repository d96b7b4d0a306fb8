"""What the blocks of recurrent layers' kernels are chosen from, on one GPU:

    python bench/tune_recurrent.py --function delta     python bench/tune_recurrent.py --function mamba2

Each kernel alone, at the sizes of a layer of Qwen3-Next or of Granite 4's tiny model: microseconds by block, the one in
use first, and how far the results of each are from those of that one, over the largest of these.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from bench_recurrent import DELTA, DEVICE, MAMBA, delta_inputs, mamba_inputs, our_mamba, ours
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from fastgrpo.kernels import (
    delta_rule_backward_triton,
    delta_rule_forward_triton,
    mamba2_backward_triton,
    mamba2_forward_triton,
)
from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.delta_rule_tiles_triton import launch_for as launch_delta
from fastgrpo.kernels.mamba2_forward_triton import launch_for as launch_mamba

# By function and kernel. Those that are left out by four warps and one stage: ptxas 12.8, which Triton 3.6 brings, then
# makes code of the same kernels that reads where no memory is, after which nothing runs on the GPU;
# `tests/helpers/compile_kernels.py` finds such code.
OVER_CHUNKS = [(16, 4, 2), (32, 4, 2), (32, 4, 3), (32, 8, 2), (64, 4, 2), (64, 8, 1)]
OVER_BLOCKS = [(32, 4, 1), (64, 4, 1), (64, 8, 1), (128, 8, 1)]
OVER_VALUES = [(16, 8, 2), (32, 4, 1), (32, 4, 2), (32, 8, 1), (32, 8, 2), (64, 8, 1), (64, 8, 2)]
OVER_STATES = [(64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 16, 4, 2), (128, 32, 4, 3), (128, 64, 8, 2)]
OF_CHUNKS = [(64, 64, 4, 2), (64, 64, 8, 1), (128, 64, 4, 2), (128, 64, 8, 1)]
BLOCKS: dict[str, dict[str, list[Any]]] = {
    "delta": {
        "_within_kernel": [(64, 2, 1), (64, 4, 1), (64, 8, 1)],
        "_states_kernel": OVER_CHUNKS,
        "_outputs_kernel": OVER_BLOCKS,
        "_d_within_kernel": OVER_BLOCKS,
        "_d_states_kernel": OVER_CHUNKS,
        "_d_reads_kernel": OVER_VALUES,
        "_d_writes_kernel": OVER_VALUES,
    },
    "mamba2": {
        "_steps_kernel": [(16, 16, 2, 1)],
        "_states_kernel": OVER_STATES,
        "_outputs_kernel": OF_CHUNKS,
        "_d_states_kernel": OVER_STATES,
        "_d_values_kernel": OF_CHUNKS,
        "_d_steps_kernel": OF_CHUNKS,
        "_d_groups_kernel": [
            (64, 32, 8, 2),
            (64, 64, 4, 2),
            (64, 64, 8, 1),
            (64, 64, 8, 2),
            (128, 32, 8, 2),
            (128, 64, 8, 1),
        ],
    },
}
# Kernels that have a program for each block of values' columns, and of a state's rows.
OF_VALUES = ("_states_kernel", "_outputs_kernel", "_d_within_kernel", "_d_states_kernel")
OF_STATES = ("_states_kernel", "_d_states_kernel", "_d_groups_kernel")


def blocks_of(function: str, kernel: str, sizes: Any, block: Any) -> int:
    """How many such blocks a launch has programs for, where a block that takes all would have one."""
    if function == "delta":
        return int(sizes.blocks(block)) if kernel in OF_VALUES else 1
    of_values = sizes.of_values(block) if kernel in OF_VALUES else 1
    return int(of_values * (sizes.of_states(block) if kernel in OF_STATES else 1))


def tensors_of(given: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among a launch's arguments, some of which come with a stride."""
    for each in given:
        if isinstance(tensor := each[0] if isinstance(each, tuple) else each, Tensor):
            yield tensor


def same(one: Tensor, other: Tensor) -> Tensor:
    """Where two results are the same; what no program writes may be anything."""
    return (one == other) | (one.isnan() & other.isnan())


def apart(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of results over the largest number of its tensor; nan where nothing was written."""
    differences = [0.0]
    for result, wanted in zip(results, expected, strict=True):
        difference = torch.where(same(result, wanted), 0, (result - wanted).abs()).max()
        differences.append(float(difference / wanted.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-30)))
    return float(torch.tensor(differences).max())


def compare(kernel: Any, runs: dict[str, Callable[[], None]], given: tuple[Any, ...]) -> None:
    """A row for each of a launch's `runs`; the first one is the launch itself, and runs last again."""
    first, tensors = next(iter(runs.values())), list(tensors_of(given))
    before = [tensor.clone() for tensor in tensors]
    first()
    results = [now for now, was in zip(tensors, before, strict=True) if not same(now, was).all()]
    del before
    expected = [result.clone() for result in results]
    for name, run in runs.items():
        for result in results:
            result.fill_(torch.nan)
        try:
            run()
            said = f"{1e3 * do_bench(run):.0f} us, apart by {apart(results, expected):.1e}"
        except OutOfResources as error:
            said = f"does not fit: {error}"
        print(f"{kernel.fn.__name__} {name}: {said}", flush=True)
    first()


def time_blocks(
    function: str, launch_for: Any, kernel: Any, block: Any, sizes: Any, programs: int, *given: Any
) -> None:
    """A launch by its block, and the launch itself."""
    name, runs = kernel.fn.__name__, dict[str, Callable[[], None]]()
    for other in dict.fromkeys([block, *(type(block)(*each) for each in BLOCKS[function][name])]):
        count = programs // blocks_of(function, name, sizes, block) * blocks_of(function, name, sizes, other)
        runs[str(tuple(other))] = partial(launch_for, kernel, other, sizes, count, *given)
    compare(kernel, runs, given)


def time_warps(kernel: Any, programs: int, *given: Tensor, num_warps: int, **constants: Any) -> None:
    """A launch by its warps, and the launch itself."""
    runs: dict[str, Callable[[], None]] = {
        f"{warps} warps": partial(launch, kernel, programs, *given, num_warps=warps, **constants)
        for warps in dict.fromkeys([num_warps, 1, 2, 4, 8])
    }
    compare(kernel, runs, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", choices=list(BLOCKS), default="delta")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        raise SystemExit("tuning needs a GPU")
    torch.manual_seed(0)
    with ExitStack() as patches:
        # One after the other: what is computed in parts would be measured in each.
        for module in ("delta_rule", "mamba2"):
            patches.enter_context(mock.patch(f"fastgrpo.kernels.{module}.TOGETHER", 2**40))
        patches.enter_context(mock.patch.object(delta_rule_forward_triton, "launch", time_warps))
        for function, launch_for, modules in (
            ("delta", launch_delta, (delta_rule_forward_triton, delta_rule_backward_triton)),
            ("mamba2", launch_mamba, (mamba2_forward_triton, mamba2_backward_triton)),
        ):
            for module_ in modules:
                patches.enter_context(
                    mock.patch.object(module_, "launch_for", partial(time_blocks, function, launch_for))
                )
        if options.function == "delta":
            inputs = delta_inputs(options.rows, options.length, DELTA["qwen3-next"], torch.bfloat16)
            output = ours(*inputs)
        else:
            inputs = mamba_inputs(options.rows, options.length, MAMBA["granite-4-tiny"], torch.bfloat16)
            output = our_mamba(*inputs)
        torch.autograd.grad(output.sum(), inputs)


if __name__ == "__main__":
    main()
