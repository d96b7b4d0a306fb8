"""The short convolution and its silu in Triton: one launch forward, two backward.

A program has T tokens, of all rows one after another, and C channels. Sums are fp32, and only what leaves is rounded.
Backward computes the convolution again, writes the gradient before silu and, for each program, its sums for the weight;
then the gradient of the input reads the tokens after its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.tiles_triton import Rows, rows_of

TOKENS, CHANNELS = 32, 128


@triton.jit
def _tile(tokens, channels, T: tl.constexpr, C: tl.constexpr):
    """(tokens [T, 1] of this program, its channels [1, C], its block of tokens, which of both there are)."""
    across = tl.cdiv(channels, C)
    block = tl.program_id(0) // across
    token_T1 = (block * T + tl.arange(0, T))[:, None]
    channel_1C = (tl.program_id(0) % across * C + tl.arange(0, C))[None, :]
    return token_T1, channel_1C, block, (token_T1 < tokens) & (channel_1C < channels)


@triton.jit
def _sum_of_taps(
    x, weight_ptr, bias_ptr, token_T1, channel_1C, inside_TC, length, channels,
    BIAS: tl.constexpr, W: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """bias + sum_w weight_w x of the token W - 1 - w before, in fp32."""
    sum_TC = tl.zeros([T, C], tl.float32)
    if BIAS:
        sum_TC += tl.load(bias_ptr + channel_1C, mask=channel_1C < channels).to(tl.float32)
    place_T1 = token_T1 % length
    for w in tl.static_range(W):
        there_TC = inside_TC & (place_T1 >= W - 1 - w)
        from_TC = (token_T1 - (W - 1 - w)).to(tl.int64) * x[1] + channel_1C
        weight_1C = tl.load(weight_ptr + channel_1C * W + w, mask=channel_1C < channels).to(tl.float32)
        sum_TC += weight_1C * tl.load(x[0] + from_TC, mask=there_TC, other=0.0).to(tl.float32)
    return sum_TC


@triton.jit(do_not_specialize=["length", "tokens"])
def _forward_kernel(
    weight_ptr, bias_ptr, x, y_ptr, length, tokens, channels,
    BIAS: tl.constexpr, W: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    token_T1, channel_1C, _, inside_TC = _tile(tokens, channels, T, C)
    sum_TC = _sum_of_taps(x, weight_ptr, bias_ptr, token_T1, channel_1C, inside_TC, length, channels, BIAS, W, T, C)
    y_TC = sum_TC * tl.sigmoid(sum_TC)
    tl.store(y_ptr + token_T1.to(tl.int64) * channels + channel_1C, y_TC, mask=inside_TC)


@triton.jit(do_not_specialize=["length", "tokens"])
def _d_sum_kernel(
    weight_ptr, bias_ptr, x, dy, dsum_ptr, dweight_ptr, length, tokens, channels,
    BIAS: tl.constexpr, W: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient before silu, [tokens, channels], and this block's of each tap's weight, then of the bias."""
    token_T1, channel_1C, block, inside_TC = _tile(tokens, channels, T, C)
    sum_TC = _sum_of_taps(x, weight_ptr, bias_ptr, token_T1, channel_1C, inside_TC, length, channels, BIAS, W, T, C)
    sigmoid_TC = tl.sigmoid(sum_TC)
    dy_TC = tl.load(dy[0] + token_T1.to(tl.int64) * dy[1] + channel_1C, mask=inside_TC, other=0.0).to(tl.float32)
    dsum_TC = dy_TC * sigmoid_TC * (1.0 + sum_TC * (1.0 - sigmoid_TC))
    tl.store(dsum_ptr + token_T1.to(tl.int64) * channels + channel_1C, dsum_TC, mask=inside_TC)
    place_T1 = token_T1 % length
    to_1C = block.to(tl.int64) * (W + BIAS) * channels + channel_1C
    for w in tl.static_range(W):
        there_TC = inside_TC & (place_T1 >= W - 1 - w)
        from_TC = (token_T1 - (W - 1 - w)).to(tl.int64) * x[1] + channel_1C
        x_TC = tl.load(x[0] + from_TC, mask=there_TC, other=0.0).to(tl.float32)
        dweight_1C = tl.sum(dsum_TC * x_TC, axis=0, keep_dims=True)
        tl.store(dweight_ptr + to_1C + w * channels, dweight_1C, mask=channel_1C < channels)
    if BIAS:
        dbias_1C = tl.sum(dsum_TC, axis=0, keep_dims=True)
        tl.store(dweight_ptr + to_1C + W * channels, dbias_1C, mask=channel_1C < channels)


@triton.jit(do_not_specialize=["length", "tokens"])
def _d_input_kernel(
    weight_ptr, dsum_ptr, dx_ptr, length, tokens, channels, W: tl.constexpr, T: tl.constexpr, C: tl.constexpr
):
    """What each token gives to itself and to the W - 1 after it."""
    token_T1, channel_1C, _, inside_TC = _tile(tokens, channels, T, C)
    place_T1 = token_T1 % length
    dx_TC = tl.zeros([T, C], tl.float32)
    for w in tl.static_range(W):
        there_TC = inside_TC & (place_T1 + (W - 1 - w) < length)
        from_TC = (token_T1 + (W - 1 - w)).to(tl.int64) * channels + channel_1C
        weight_1C = tl.load(weight_ptr + channel_1C * W + w, mask=channel_1C < channels).to(tl.float32)
        dx_TC += weight_1C * tl.load(dsum_ptr + from_TC, mask=there_TC, other=0.0).to(tl.float32)
    tl.store(dx_ptr + token_T1.to(tl.int64) * channels + channel_1C, dx_TC, mask=inside_TC)


def forward(x_SLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
    """silu of the convolution, [S, L, C]."""
    y_SLC, weight_CW = x_SLC.new_empty(x_SLC.shape), weight_CW.contiguous()
    biased = _bias(weight_CW, bias_C)
    _launch(_forward_kernel, y_SLC, weight_CW, biased, rows_of(x_SLC), y_SLC, BIAS=bias_C is not None)
    return y_SLC


def backward(
    dy_SLC: Tensor, x_SLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the input, of the weight and of the bias, where there is one."""
    weight_CW, (channels, taps) = weight_CW.contiguous(), weight_CW.shape
    dsum_SLC, dx_SLC = x_SLC.new_empty(2, *x_SLC.shape)
    blocks = triton.cdiv(x_SLC.shape[0] * x_SLC.shape[1], TOKENS)
    dweight_BRC = weight_CW.new_empty(blocks, taps + (bias_C is not None), channels, dtype=torch.float32)
    given = (_bias(weight_CW, bias_C), rows_of(x_SLC), rows_of(dy_SLC), dsum_SLC, dweight_BRC)
    _launch(_d_sum_kernel, x_SLC, weight_CW, *given, BIAS=bias_C is not None)
    _launch(_d_input_kernel, x_SLC, weight_CW, dsum_SLC, dx_SLC)
    dweight_RC = dweight_BRC.sum(0).to(weight_CW.dtype)
    return dx_SLC, dweight_RC[:taps].mT, None if bias_C is None else dweight_RC[taps]


def _bias(weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
    """What kernels get for a bias: where there is none, something that is not read."""
    return weight_CW if bias_C is None else bias_C


def _launch(kernel: Any, like_SLC: Tensor, weight_CW: Tensor, *others: Tensor | Rows, **constants: Any) -> None:
    """A program for each block of tokens and channels of `like_SLC`."""
    rows, length, channels = like_SLC.shape
    programs = triton.cdiv(rows * length, TOKENS) * triton.cdiv(channels, CHANNELS)
    sizes = length, rows * length, channels
    blocks = {"W": weight_CW.shape[1], "T": TOKENS, "C": CHANNELS, "num_warps": 4}
    launch(kernel, programs, weight_CW, *others, *sizes, **constants, **blocks)
