"""The short convolution before a recurrent layer's function, with its silu: each channel by itself, differentiable.

    y = convolved(x, weight, bias)      keeps its inputs alone on a GPU

Layers hold tokens as [S, L, C] and give [S, C, L], a view of it. torch convolves [S, C, L] in memory, so that both ways
are copies, and its depthwise convolutions of a row are slow; the kernels read tokens where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv1d, silu

from fastgrpo.kernels.backend import triton_runs


def convolved(x_SCL: Tensor, weight_CW: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """silu(bias + sum_w weight_w x_(l - W + 1 + w)), [S, C, L]: what is before a row's first token is zero."""
    if triton_runs(x_SCL.device):
        out: Tensor = _Convolved.apply(x_SCL.mT, weight_CW, bias_C)
        return out.mT
    channels, taps = weight_CW.shape
    padded = conv1d(x_SCL, weight_CW[:, None], bias_C, padding=taps - 1, groups=channels)
    return silu(padded[..., : x_SCL.shape[-1]])


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
        from fastgrpo.kernels import convolution_triton

        ctx.save_for_backward(x_SLC, weight_CW, bias_C)
        return convolution_triton.forward(x_SLC, weight_CW, bias_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SLC: Tensor) -> tuple[Tensor | None, ...]:
        from fastgrpo.kernels import convolution_triton

        return convolution_triton.backward(dy_SLC, *ctx.saved_tensors)
