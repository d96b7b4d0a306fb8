"""Candidates for the forward pass without a gradient: each checked, then timed in turn with the product itself.

`python bench/bench_forward.py` on a GPU takes about 80 s, most of it imports and compilation, and at most 100 s.
With `TRITON_INTERPRET=1` on a CPU it only checks the candidate that the interpreter runs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from bench_loss_head import DEVICE, GPU, realistic_head
from torch import Tensor

from fastgrpo.kernels import linear_logprob, reference
from fastgrpo.kernels.chunked import Head
from fastgrpo.kernels.reference import LogitTransform, SoftmaxSums

N, H, V = 16_384, 1536, 151_936
BUDGET_S, GROUP_S = 100.0, 50.0
# (rows, H, V, options) to check; each option is another compilation, so only the first of a group runs them.
PLAIN: list[tuple[int, int, int, dict[str, Any]]] = [(130, 1536, 1003, {}), (70, 64, 2100, {"temperature": 0.7})]
OPTIONS: list[tuple[int, int, int, dict[str, Any]]] = [
    (300, 128, 700, {"bias": True}),
    (70, 64, 2100, {"softcap": 5.0, "temperature": 0.7}),
]
Forward = Callable[[Tensor, Tensor, Head], tuple[Tensor, Tensor]]


def now(hidden_NH: Tensor, targets_N: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """What the package does."""
    temperature, softcap = head.transform
    keywords: dict[str, Any] = {"bias": head.bias_V, "temperature": temperature, "softcap": softcap}
    logprob_N, entropy_N = linear_logprob(hidden_NH, head.weight_VH, targets_N, **keywords)
    assert entropy_N is not None
    return logprob_N, entropy_N


def overlapped(
    hidden_NH: Tensor, targets_N: Tensor, head: Head, *, reserved: int, parts: int = 16
) -> tuple[Tensor, Tensor]:
    """A part's row pass beside the next part's product, which leaves it `reserved` multiprocessors. No bias."""
    from fastgrpo.kernels import rows_triton

    assert head.bias_V is None
    main, side = torch.cuda.current_stream(), _side_stream()
    sums, columns = SoftmaxSums.empty(targets_N), -(-len(head.weight_VH) // parts // 16) * 16
    buffers_2NV = hidden_NH.new_empty(2, len(hidden_NH), columns)
    folded = [torch.cuda.Event(), torch.cuda.Event()]
    side.wait_stream(main)
    with _multiprocessors(reserved):
        for number, start in enumerate(range(0, len(head.weight_VH), columns)):
            weight_CH = head.weight_VH[start : start + columns]
            logits_NC = buffers_2NV[number % 2][:, : len(weight_CH)]
            main.wait_event(folded[number % 2])
            torch.mm(hidden_NH, weight_CH.T, out=logits_NC)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                rows_triton.fold_rows(logits_NC, targets_N - start, head.transform, sums, entropy=True)
                folded[number % 2].record()
    main.wait_stream(side)
    log_total_N = sums.total_N.log()
    logprob_N = (sums.target_N - sums.largest_N) / head.transform.temperature - log_total_N
    return logprob_N, log_total_N - sums.weighted_N / sums.total_N


_STREAMS: list[torch.cuda.Stream] = []


def _side_stream() -> torch.cuda.Stream:
    if not _STREAMS:
        _STREAMS.append(torch.cuda.Stream())
    return _STREAMS[0]


@contextmanager
def _multiprocessors(reserved: int) -> Iterator[None]:
    """cuBLAS leaves so many multiprocessors to others."""
    if not reserved:
        yield
        return
    library = ctypes.CDLL(f"libcublas.so.{(torch.version.cuda or '13').split('.')[0]}")
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    total = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert library.cublasSetSmCountTarget(handle, total - reserved) == 0
    try:
        yield
    finally:
        library.cublasSetSmCountTarget(handle, 0)


def fused(hidden_NH: Tensor, targets_N: Tensor, head: Head, **tile: Any) -> tuple[Tensor, Tensor]:
    """One Triton product that folds its tiles."""
    import fused_forward

    return fused_forward.logprob_forward(hidden_NH, targets_N, *head, tile=fused_forward.Tile(**tile))


def specialised(hidden_NH: Tensor, targets_N: Tensor, head: Head, **sizes: Any) -> tuple[Tensor, Tensor]:
    """The same in Gluon with warps of different duties."""
    import specialised_forward

    return specialised_forward.logprob_forward(hidden_NH, targets_N, *head, **sizes)


def product(hidden_NH: Tensor, weight_VH: Tensor, buffer: Tensor) -> None:
    torch.mm(hidden_NH, weight_VH.T, out=buffer)


def products_in_parts(hidden_NH: Tensor, weight_VH: Tensor, buffer: Tensor, reserved: int = 0) -> None:
    """The package's eight products alone."""
    with _multiprocessors(reserved):
        for hidden_CH in hidden_NH.split(8192):
            for weight_CH in weight_VH.split(37_984):
                logits_CV = buffer.flatten()[: len(hidden_CH) * len(weight_CH)].view(len(hidden_CH), -1)
                torch.mm(hidden_CH, weight_CH.T, out=logits_CV)


def row_passes(targets_N: Tensor, buffer: Tensor) -> None:
    """The package's eight row passes alone."""
    from fastgrpo.kernels import rows_triton

    targets_C = targets_N[:8192]
    sums = SoftmaxSums.empty(targets_C)
    for part in range(8):
        logits_CV = buffer.flatten()[part * 8192 * 37_984 :][: 8192 * 37_984].view(8192, -1)
        rows_triton.fold_rows(logits_CV, targets_C, LogitTransform(), sums, entropy=True)


OVERLAPS = [(0, 16), (8, 16), (16, 16), (24, 16), (16, 8)]
RINGS = [(64, 16), (32, 32)]
# Each in a process of its own, so that one that hangs or reads where it must not costs its own lines only.
GROUPS: dict[str, dict[str, Forward]] = {
    "now": {"now": now},
    "specialised": {
        "specialised": specialised,
        **{f"specialised, {d} deep, {g} blocks of rows": partial(specialised, depth=d, group=g) for d, g in RINGS},
    },
    "overlapped": {f"overlapped, {r} kept, {p} parts": partial(overlapped, reserved=r, parts=p) for r, p in OVERLAPS},
    "fused": {
        "fused 128x256, 4 stages": fused,
        "fused 128x256, 3 stages": partial(fused, stages=3),
        "fused 128x128, two a multiprocessor": partial(fused, words=128, stages=3, warps=4, programs=2),
        "fused 128x256, logits not rounded": partial(fused, rounded=False),
    },
}


def check(forward: Forward, cases: list[tuple[int, int, int, dict[str, Any]]]) -> str:
    """The worst error over that of eager torch in the same dtype, both against float64."""
    worst, dtype = 0.0, torch.bfloat16 if GPU else torch.float32
    for n, h, v, options in cases:
        hidden_NH = (2 * torch.randn(n, h, device=DEVICE)).to(dtype)
        weight_VH = (torch.randn(v, h, device=DEVICE) * h**-0.5).to(dtype)
        bias_V = torch.randn(v, device=DEVICE).to(dtype) if options.get("bias") else None
        targets_N = torch.randint(v, (n,), device=DEVICE)
        targets_N[0], targets_N[-1] = v - 1, 0
        transform = LogitTransform(options.get("temperature", 1.0), options.get("softcap"))
        wide = (
            hidden_NH.double(),
            weight_VH.double(),
            targets_N,
            transform,
            None if bias_V is None else bias_V.double(),
        )
        exact = reference.linear_logprob(*wide)
        eager = reference.linear_logprob(hidden_NH, weight_VH, targets_N, transform, bias_V)
        ours = forward(hidden_NH, targets_N, Head(weight_VH, bias_V, transform))
        for mine, theirs, truth in zip(ours, eager, exact, strict=True):
            error, allowed = ((x.double() - truth).abs().max().item() for x in (mine, theirs))
            worst = max(worst, error / (allowed + 1e-5)) if error == error else float("inf")
    return f"{worst:.2f} x eager's error{'' if worst < 1.5 else ' WRONG'}"


def interleaved(steps: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, list[float]]:
    """Milliseconds of each step that runs, all of them in each round."""
    failing = set(steps)
    for name, step in steps.items():
        with reported(name):
            step()
            failing.remove(name)
    steps = {name: step for name, step in steps.items() if name not in failing}
    events = {name: [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(rounds)] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            before, after = events[name][number]
            before.record()
            step()
            after.record()
    torch.cuda.synchronize()
    return {name: [before.elapsed_time(after) for before, after in pairs] for name, pairs in events.items()}


def report(times: dict[str, list[float]], notes: dict[str, str]) -> None:
    """The median of each, and the median of its ratio to the same round's product."""
    for name, took in times.items():
        ratio = statistics.median(mine / whole for mine, whole in zip(took, times["product"], strict=True))
        print(f"{name:38} {statistics.median(took):7.2f} ms {ratio:6.3f} x  {notes.get(name, '')}", flush=True)


def far_from(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str:
    """Mean distance of logprobs and of entropies."""
    return ", ".join(f"{(a - b).abs().mean().item():.0e}" for a, b in zip(found, expected, strict=True))


def time_group(name_of_group: str) -> None:
    """Checks the candidates of a group and times those that hold."""
    hidden_NH, weight_VH, targets_N = realistic_head(N, H, V)
    head, buffer = Head(weight_VH, None, LogitTransform()), hidden_NH.new_empty(N, V)
    steps: dict[str, Callable[[], object]] = {"product": partial(product, hidden_NH, weight_VH, buffer)}
    if name_of_group == "now":
        steps["products in parts"] = partial(products_in_parts, hidden_NH, weight_VH, buffer)
        steps["products in parts, 16 kept"] = partial(products_in_parts, hidden_NH, weight_VH, buffer, 16)
        steps["row passes"] = partial(row_passes, targets_N, buffer)
    notes: dict[str, str] = {}
    expected = now(hidden_NH, targets_N, head)
    for name, forward in GROUPS[name_of_group].items():
        with reported(name):
            cases = PLAIN + [(512, H, V, {})] + (OPTIONS if forward in (now, fused) or name == "specialised" else [])
            found = forward(hidden_NH, targets_N, head)
            notes[name] = f"{check(forward, cases)}; from now on average {far_from(found, expected)}"
            steps[name] = partial(forward, hidden_NH, targets_N, head)
    with reported("this group"):
        report(interleaved(steps), notes)


@contextmanager
def reported(name: str) -> Iterator[None]:
    """One candidate's failure is a line of the table and does not cost the others' measurement."""
    try:
        yield
    except Exception as error:
        print(f"{name:38} {type(error).__name__}: {str(error)[:300]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "groups", nargs="*", help=f"which of {', '.join(GROUPS)}, the default; one is timed in this process"
    )
    groups = parser.parse_args().groups or list(GROUPS)
    torch.manual_seed(0)
    if not GPU:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("a GPU, or TRITON_INTERPRET=1 for the check alone")
        print("fused", check(partial(fused, rows=64, words=128, group=2), PLAIN + OPTIONS))
    elif len(groups) == 1:
        with torch.no_grad():
            time_group(groups[0])
    else:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, N={N} H={H} V={V}", flush=True)
        end = time.monotonic() + BUDGET_S
        for group in groups:
            with reported(group):
                left = min(GROUP_S, end - time.monotonic())
                subprocess.run([sys.executable, __file__, group], timeout=left, check=True)


if __name__ == "__main__":
    main()
