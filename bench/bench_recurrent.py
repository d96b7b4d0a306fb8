"""A recurrent layer's function, forward and backward, beside transformers' own, fla's and its matrix products alone.

    python bench/bench_recurrent.py [--size qwen3-next] [--rows 1] [--length 1024] [--heads 8] [--dtype bfloat16]
        [--save FILE]

Random queries, keys, values and decays of so many rows. Functions take turns, so that all meet the same machine; on a
GPU ours is there with its kernels and in plain torch. The floor of the gated delta rule is its products forward and
backward, of all chunks at once, in fp32 and without what goes from chunk to chunk (kernels that multiply halves of
bfloat16 can be below it); Mamba-2 has none here.
Memory is what forward leaves for backward, inputs included, and the most that is there in either. Operations are those
that the dispatcher sees, views aside: on a GPU about as many launches, besides those of our own kernels, eight for a
part of the delta rule's heads and nine for a part of Mamba-2's rows.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from engine_setup import report, save
from model_shapes import CUDA, device_name, timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from fastgrpo.kernels import delta_rule
from fastgrpo.kernels.chunks import CHUNK
from fastgrpo.kernels.delta_rule import gated_delta_rule
from fastgrpo.kernels.mamba2 import mamba2
from fastgrpo.policy.recurrent import fla_has_gradients

DEVICE = torch.device("cuda" if CUDA else "cpu")
MIB = 2**20
# Heads of values, columns of a key or of Mamba's state, columns of a value; Granite 4's Mamba-2 is of its tiny model.
DELTA = {"qwen3-next": (32, 128, 128), "qwen3.5-0.8b": (16, 128, 128), "tiny": (4, 16, 16)}
MAMBA = {"granite-4-tiny": (48, 128, 64)}
TURNS = 5


class Memory(TorchDispatchMode):
    """Bytes of what operations make and take, now and at most, and how many operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.now -= size


def delta_inputs(rows: int, length: int, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value, g and beta of a layer."""
    heads, key, value = shape
    columns = [torch.randn(rows, length, heads, width, dtype=dtype, device=DEVICE) for width in (key, key, value)]
    g, beta = torch.rand(2, rows, length, heads, device=DEVICE)
    return [each.requires_grad_() for each in (*columns, -g, beta.to(dtype))]


def mamba_inputs(rows: int, length: int, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Values, dt, A, B, C, D and dt's bias of a layer, its B and C shared by all heads."""
    heads, state, value = shape
    x = torch.randn(rows, length, heads, value, dtype=dtype, device=DEVICE)
    dt = torch.rand(rows, length, heads, dtype=dtype, device=DEVICE)
    b, c = torch.randn(2, rows, length, 1, state, dtype=dtype, device=DEVICE)
    a, d, bias = torch.rand(3, heads, device=DEVICE)
    return [each.requires_grad_() for each in (x, dt, -a, b, c, d, bias)]


def ours(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Our delta rule."""
    return gated_delta_rule(query, key, value, g, beta)[0]


def ours_in_torch(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Our delta rule, forward and backward, without its kernels."""
    with mock.patch.object(delta_rule, "triton_runs", return_value=False):
        return ours(query, key, value, g, beta)


def theirs(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """transformers' delta rule, which is fla's where that is installed."""
    return torch_chunk_gated_delta_rule(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def in_torch(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """transformers' own delta rule, also where fla is installed."""
    own: Any = torch_chunk_gated_delta_rule
    while hasattr(own, "__wrapped__"):
        own = own.__wrapped__
    return own(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def our_mamba(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor) -> Tensor:
    """Our Mamba-2."""
    return mamba2(x, dt, a, b, c, d, dt_bias)[0]


def our_mamba_in_torch(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor) -> Tensor:
    """Our Mamba-2, forward and backward, without its kernels."""
    with mock.patch("fastgrpo.kernels.mamba2.triton_runs", return_value=False):
        return our_mamba(x, dt, a, b, c, d, dt_bias)


def mamba_in_torch(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor, *, rows: int
) -> Tensor:
    """transformers' own Mamba-2 over the first `rows` rows, in chunks of Granite's size."""
    own: Any = mamba2_chunk_scan
    while hasattr(own, "__wrapped__"):
        own = own.__wrapped__
    x, dt, b, c = (each[:rows] for each in (x, dt, b, c))
    return own(x, dt, a, b, c, chunk_size=256, D=d, dt_bias=dt_bias, dt_softplus=True)


def mambas(inputs: list[Tensor]) -> dict[str, Callable[..., Tensor]]:
    """Ours, and transformers' own over as many rows as fit: below 5.19 it takes 98 GiB for two of 4,096 tokens."""
    functions: dict[str, Callable[..., Tensor]] = {"ours": our_mamba}
    if CUDA:
        functions["ours, in plain torch"] = our_mamba_in_torch
    rows = len(inputs[0])
    while rows:
        theirs = partial(mamba_in_torch, rows=rows)
        try:
            both(theirs, inputs)
            return functions | {f"transformers' own, {rows} rows": theirs}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows //= 2
    report("transformers' own", "does not fit, a row alone neither")
    return functions


def products(rows: int, length: int, shape: tuple[int, int, int]) -> Callable[[], None]:
    """The products of the rule and of its gradients, each once, of random numbers in fp32."""
    heads, key, value = shape
    chunks = rows * heads * -(-length // CHUNK)
    square = torch.randn(chunks, CHUNK, CHUNK, device=DEVICE)
    keys, values = (torch.randn(chunks, CHUNK, width, device=DEVICE) for width in (key, value))
    state = torch.randn(chunks, key, value, device=DEVICE)

    def run() -> None:
        # By what a product is of, as often as it is needed forward and backward.
        for times, left, right in (
            (2, keys, keys.mT),
            (1, square, keys),
            (2, square, values),
            (2, keys, state),
            (1, keys.mT, values),
            # Backward: of scores, of what is within a chunk, of the inverse, of states.
            (2, values, values.mT),
            (4, square, keys),
            (2, square.mT, values),
            (1, keys, state),
            (2, keys.mT, values),
            (3, values, state.mT),
        ):
            for _ in range(times):
                left @ right

    return run


def both(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, float]:
    """Seconds forward and backward."""
    output, ahead = timed(lambda: function(*inputs))
    _, back = timed(lambda: torch.autograd.grad(output.sum(), inputs))
    return ahead, back


def memory(function: Callable[..., Tensor], inputs: list[Tensor]) -> str:
    """What forward leaves, the peak above nothing, and operations, in words."""
    with Memory() as counted:
        output = function(*inputs)
        kept, ahead = counted.now - output.untyped_storage().nbytes(), counted.operations
        torch.autograd.grad(output.sum(), inputs)
    columns = output.numel()
    return (
        f"keeps {kept / MIB:.1f} MiB ({kept / columns:.1f} bytes a column of values), peak {counted.peak / MIB:.1f} "
        f"({counted.peak / columns:.1f}); {ahead} + {counted.operations - ahead} operations"
    )


def measured(
    functions: dict[str, Callable[..., Tensor]], inputs: list[Tensor], products: Callable[[], None] | None
) -> None:
    """A row for each function, after one for the floor; all take turns."""
    floors: list[float] = []
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for function in functions.values():
        both(function, inputs)
    if products:
        products()
    for _ in range(TURNS):
        if products:
            floors.append(timed(products)[1])
        for name, function in functions.items():
            seconds[name].append(both(function, inputs))
    if floors:
        report("its products alone (the floor)", f"{1e3 * median(floors):.1f} ms")
    for name, function in functions.items():
        ahead, back = (1e3 * median(each) for each in zip(*seconds[name], strict=True))
        over = f", {(ahead + back) / 1e3 / median(floors):.2f} of the floor" if floors else ""
        times = f"{ahead:.1f} + {back:.1f} = {ahead + back:.1f} ms{over}"
        report(name, f"{times}; {memory(function, inputs)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*DELTA, *MAMBA], default="qwen3-next")
    parser.add_argument("--rows", type=int, default=4 if CUDA else 1)
    parser.add_argument("--length", type=int, default=4096 if CUDA else 1024)
    parser.add_argument("--heads", type=int, help="of values, in place of the size's own; a CPU takes 8")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    heads, key, value = (DELTA | MAMBA)[options.size]
    heads = options.heads or (heads if CUDA else min(heads, 8))
    workload = options.rows, options.length, (heads, key, value)
    title = (
        f"{options.size}'s recurrent function, {heads} heads, {options.rows} rows of {options.length} tokens, "
        f"{options.dtype}"
    )
    print(f"{title}; {device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    dtype = getattr(torch, options.dtype)
    if options.size in MAMBA:
        inputs = mamba_inputs(*workload, dtype)
        measured(mambas(inputs), inputs, None)
    else:
        functions = {"ours": ours, "transformers' own": in_torch}
        if CUDA:
            functions["ours, in plain torch"] = ours_in_torch
        if CUDA and fla_has_gradients():
            functions["flash-linear-attention"] = theirs
        measured(functions, delta_inputs(*workload, dtype), products(*workload))
    if options.save:
        save(options.save, title)


if __name__ == "__main__":
    main()
