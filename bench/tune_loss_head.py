"""What the sizes in kernels/tuning.py were chosen from, on one GPU: `python bench/tune_loss_head.py`."""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from bench_loss_head import DEVICE, OPTIONS, SHAPES, Case, forward_floor, forward_ours, make_case, milliseconds, ours
from torch import Tensor

from fastgrpo.kernels import chunked, forward_triton, reference, rows_triton, tuning
from fastgrpo.kernels.chunked import REPORT
from fastgrpo.kernels.reference import SoftmaxSums

BLOCKS = [(2048, 4, 8), (2048, 8, 8), (4096, 4, 16), (8192, 2, 32), (8192, 4, 32), (16_384, 2, 32)]


def time_blocks(case: Case, rows: int) -> None:
    """Milliseconds of the two row passes over one chunk, by block."""
    logits_CV = case.hidden_NH[:rows].detach() @ case.weight_VH.detach().T
    for block in BLOCKS:
        forward, both = time_block(case, logits_CV, block)
        print(f"{tuple(logits_CV.shape)} {block}: forward {forward:.3f} ms, with gradient {both:.3f} ms", flush=True)


def time_block(case: Case, logits_CV: Tensor, block: tuple[int, int, int]) -> tuple[float, float]:
    """(forward, with gradient), milliseconds."""
    rows, changed_CV = len(logits_CV), logits_CV.clone()
    tokens, report_FC = case.tokens.take(slice(rows)), torch.empty(len(REPORT), rows, device=DEVICE)
    common, sums = (case.targets_N[:rows], reference.LogitTransform()), SoftmaxSums.empty(case.targets_N[:rows])

    def chosen(_: int) -> tuning.RowBlock:
        return tuning.RowBlock(*block)

    with mock.patch.multiple(rows_triton, row_block=chosen, loss_row_block=chosen):
        forward = milliseconds(lambda: rows_triton.fold_rows(logits_CV, *common, sums, entropy=True), 0.05)
        both = milliseconds(
            lambda: rows_triton.loss_rows(changed_CV, *common, tokens, OPTIONS, report_FC, gradient=True), 0.05
        )
    return forward, both


def time_chunks(case: Case) -> None:
    """Milliseconds of the head by the size of its chunks."""
    shape = (*case.hidden_NH.shape, len(case.weight_VH))
    for mib in (320, 480, 640, 800, 1280):
        with mock.patch.dict(tuning.CHUNK_BYTES, cuda=mib << 20), walked():
            forward, both = milliseconds(forward_ours(case)), milliseconds(ours(case))
        print(f"{shape} chunks of {mib} MiB: forward {forward:.2f} ms, both ways {both:.2f} ms", flush=True)
    for rows in (1024, 2048, 4096, 8192):
        with mock.patch.dict(tuning.FORWARD_ROWS, cuda=rows), walked():
            print(f"{shape} forward by {rows} rows: {milliseconds(forward_ours(case)):.2f} ms", flush=True)


def walked() -> Any:
    """The forward pass walks over chunks, whatever the head."""
    return mock.patch.object(chunked, "product_folds", return_value=False)


def time_folding(hidden: int) -> None:
    """Milliseconds of the forward pass: the product alone, the walk over chunks, the product that folds its tiles."""
    shape = (16_384, hidden, 151_936)
    case = make_case(*shape)
    arguments = (case.hidden_NH.detach(), case.targets_N, case.weight_VH.detach(), 1.0)
    product = milliseconds(forward_floor(case))
    with walked():
        walk = milliseconds(forward_ours(case))
    folded = milliseconds(lambda: forward_triton.logprob_forward(*arguments))
    text = f"product {product:.2f} ms, walk {walk:.2f} ({walk / product:.3f} x), folded {folded:.2f}"
    print(f"{shape} {text} ({folded / product:.3f} x)", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if DEVICE.type != "cuda":
        raise SystemExit("tuning needs a GPU: a CPU's sizes are those of its caches")
    for hidden in (896, 1536, 2048, 3072, 4096):
        time_folding(hidden)
    for rows, hidden, vocabulary in SHAPES:
        case = make_case(rows, hidden, vocabulary)
        time_blocks(case, tuning.chunk_rows("cuda", rows, vocabulary, case.weight_VH.element_size()))
        time_chunks(case)


if __name__ == "__main__":
    main()
