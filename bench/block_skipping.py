"""Would skipping the softmax's small probabilities in the two gradient products pay, and what would it cost?

`python bench/block_skipping.py` (GPU): one chunk of tokens over logits shaped like a trained model's. For each
threshold on p: how many 128 x 128 blocks and how many columns hold anything above it, the time of both gradient
products over those columns alone, and the error of the gradients that way beside bf16's own.
"""

from __future__ import annotations

import argparse

import torch
from bench_loss_head import make_case, milliseconds
from torch import Tensor

ROWS, HIDDEN, VOCABULARY, BLOCK = 2048, 4096, 151_936, 128
THRESHOLDS = (0.0, 2.0**-24, 2.0**-20, 2.0**-16, 2.0**-14, 2.0**-12)


def exact_dlogits(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, slope_N: Tensor) -> tuple[Tensor, Tensor]:
    """(p, dlogits), fp32 [N, V]."""
    p_NV = torch.softmax((hidden_NH @ weight_VH.T).float(), dim=1)
    dlogits_NV = -p_NV * slope_N[:, None]
    return p_NV, dlogits_NV.scatter_add_(1, targets_N[:, None], slope_N[:, None])


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


def median_row_error(found_VH: Tensor, exact_VH: Tensor) -> float:
    errors_V = (found_VH.float() - exact_VH).norm(dim=1) / exact_VH.norm(dim=1).clamp(min=1e-30)
    return errors_V.median().item()


def kept_blocks(above_NV: Tensor) -> float:
    columns = VOCABULARY // BLOCK * BLOCK
    blocks = above_NV[:, :columns].view(ROWS // BLOCK, BLOCK, columns // BLOCK, BLOCK).any(dim=3).any(dim=1)
    return blocks.float().mean().item()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU: it compares the products' times")
    torch.backends.cuda.matmul.allow_tf32 = False
    case = make_case(ROWS, HIDDEN, VOCABULARY)
    hidden_NH, weight_VH = case.hidden_NH.detach(), case.weight_VH.detach()
    slope_N = case.tokens.advantages_N * case.tokens.token_weights_N
    p_NV, dlogits_NV = exact_dlogits(hidden_NH, weight_VH, case.targets_N, slope_N)
    exact_dx_NH, exact_dw_VH = dlogits_NV @ weight_VH.float(), dlogits_NV.T @ hidden_NH.float()
    print(f"{torch.cuda.get_device_name()}: {ROWS} tokens, H {HIDDEN}, V {VOCABULARY}")
    for threshold in THRESHOLDS:
        above_NV = p_NV >= threshold
        above_NV.scatter_(1, case.targets_N[:, None], True)
        columns_K = above_NV.any(dim=0).nonzero()[:, 0]
        low_NV = (dlogits_NV * above_NV).bfloat16()

        def products(low_NV: Tensor = low_NV, columns_K: Tensor = columns_K) -> tuple[Tensor, Tensor, Tensor]:
            if len(columns_K) == VOCABULARY:
                return low_NV @ weight_VH, low_NV.T @ hidden_NH, columns_K
            low_NK = low_NV[:, columns_K]
            return low_NK @ weight_VH[columns_K], low_NK.T @ hidden_NH, columns_K

        dx_NH, dw_KH, _ = products()
        dw_VH = torch.zeros_like(weight_VH).index_copy_(0, columns_K, dw_KH)
        print(
            f"p >= {threshold:8.1e}: blocks {kept_blocks(above_NV):6.1%}, columns {len(columns_K) / VOCABULARY:6.1%}, "
            f"both products {milliseconds(products, 0.1):5.2f} ms; error dX {relative(dx_NH, exact_dx_NH):.1e}, "
            f"dW {relative(dw_VH, exact_dw_VH):.1e}, median row of dW {median_row_error(dw_VH, exact_dw_VH):.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
