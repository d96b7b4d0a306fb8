"""The row passes of a decoder layer in Triton: `layer_torch` in as few reads and writes of memory as they need.

All are bound by memory: a program holds whole rows, or pieces of them, in registers and computes in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.backend import launch
from fastgrpo.kernels.tuning import multiprocessors

COLUMNS, TOKENS = 1024, 32
# Programs for each multiprocessor where each adds up a part of a weight's gradient.
RESIDENT = 4


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, y_ptr, scale_ptr, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row_R, column_W = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside_RW = (row_R < rows)[:, None] & (column_W < width)[None, :]
    offset_RW = row_R.to(tl.int64)[:, None] * width + column_W[None, :]
    x_RW = tl.load(x_ptr + offset_RW, mask=inside_RW, other=0.0).to(tl.float32)
    weight_W = tl.load(weight_ptr + column_W, mask=column_W < width, other=0.0).to(tl.float32)
    scale_R = 1.0 / tl.sqrt(tl.sum(x_RW * x_RW, axis=1) / width + eps)
    rounded_RW = (x_RW * scale_R[:, None]).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + offset_RW, (rounded_RW * weight_W[None, :]).to(y_ptr.dtype.element_ty), mask=inside_RW)
    tl.store(scale_ptr + row_R, scale_R, mask=row_R < rows)


@triton.jit
def _norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, scale_ptr, dresidual_ptr, dx_ptr, dweight_ptr, rows, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes the norm's output over its gradient, which it has read."""
    column_W = tl.arange(0, WIDTH)
    weight_W = tl.load(weight_ptr + column_W, mask=column_W < width, other=0.0).to(tl.float32)
    dweight_W = tl.zeros([WIDTH], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row_R = first + tl.arange(0, ROWS)
        inside_RW = (row_R < rows)[:, None] & (column_W < width)[None, :]
        offset_RW = row_R.to(tl.int64)[:, None] * width + column_W[None, :]
        dy_RW = tl.load(dy_ptr + offset_RW, mask=inside_RW, other=0.0).to(tl.float32)
        x_RW = tl.load(x_ptr + offset_RW, mask=inside_RW, other=0.0).to(tl.float32)
        dresidual_RW = tl.load(dresidual_ptr + offset_RW, mask=inside_RW, other=0.0).to(tl.float32)
        scale_R = tl.load(scale_ptr + row_R, mask=row_R < rows, other=0.0)
        unit_RW = x_RW * scale_R[:, None]
        rounded_RW = unit_RW.to(dy_ptr.dtype.element_ty).to(tl.float32)
        dweight_W += tl.sum(dy_RW * rounded_RW, axis=0)
        g_RW = dy_RW * weight_W[None, :]
        along_R = tl.sum(g_RW * unit_RW, axis=1) / width
        dx_RW = scale_R[:, None] * (g_RW - unit_RW * along_R[:, None]) + dresidual_RW
        tl.store(dx_ptr + offset_RW, dx_RW.to(dx_ptr.dtype.element_ty), mask=inside_RW)
        y_RW = (rounded_RW * weight_W[None, :]).to(dy_ptr.dtype.element_ty)
        tl.debug_barrier()  # every thread has read before any writes
        tl.store(dy_ptr + offset_RW, y_RW, mask=inside_RW)
    tl.store(dweight_ptr + tl.program_id(0) * width + column_W, dweight_W, mask=column_W < width)


@triton.jit
def _swiglu_kernel(gate_up_ptr, weight_ptr, product_ptr, inner, blocks, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    column_B = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside_B, row = column_B < inner, (tl.program_id(0) // blocks).to(tl.int64)
    gate_ptr = gate_up_ptr + row * 2 * inner + column_B
    gate_B = tl.load(gate_ptr, mask=inside_B, other=0.0).to(tl.float32)
    up_B = tl.load(gate_ptr + inner, mask=inside_B, other=0.0).to(tl.float32)
    dtype: tl.constexpr = product_ptr.dtype.element_ty
    product_B = ((gate_B * tl.sigmoid(gate_B)).to(dtype).to(tl.float32) * up_B).to(dtype)
    if WEIGHTED:
        product_B = (product_B.to(tl.float32) * tl.load(weight_ptr + row)).to(dtype)
    tl.store(product_ptr + row * inner + column_B, product_B, mask=inside_B)


@triton.jit
def _swiglu_backward_kernel(
    gate_up_ptr, dproduct_ptr, weight_ptr, dgate_up_ptr, dweight_ptr, inner, blocks,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the product over its gradient; dgate_up_ptr may be gate_up_ptr."""
    column_B = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside_B, row = column_B < inner, (tl.program_id(0) // blocks).to(tl.int64)
    gate_offset_B, offset_B = row * 2 * inner + column_B, row * inner + column_B
    gate_B = tl.load(gate_up_ptr + gate_offset_B, mask=inside_B, other=0.0).to(tl.float32)
    up_B = tl.load(gate_up_ptr + inner + gate_offset_B, mask=inside_B, other=0.0).to(tl.float32)
    dproduct_B = tl.load(dproduct_ptr + offset_B, mask=inside_B, other=0.0).to(tl.float32)
    dtype: tl.constexpr = dproduct_ptr.dtype.element_ty
    sigmoid_B = tl.sigmoid(gate_B)
    activated_B = (gate_B * sigmoid_B).to(dtype).to(tl.float32)
    product_B = (activated_B * up_B).to(dtype)
    if WEIGHTED:
        weight = tl.load(weight_ptr + row)
        tl.store(dweight_ptr + tl.program_id(0), tl.sum(dproduct_B * product_B.to(tl.float32), axis=0))
        dproduct_B = dproduct_B * weight
        product_B = (product_B.to(tl.float32) * weight).to(dtype)
    dgate_B = dproduct_B * up_B * sigmoid_B * (1.0 + gate_B * (1.0 - sigmoid_B))
    dup_B = dproduct_B * activated_B
    tl.debug_barrier()  # every thread has read before any writes
    tl.store(dgate_up_ptr + gate_offset_B, dgate_B.to(dgate_up_ptr.dtype.element_ty), mask=inside_B)
    tl.store(dgate_up_ptr + inner + gate_offset_B, dup_B.to(dgate_up_ptr.dtype.element_ty), mask=inside_B)
    tl.store(dproduct_ptr + offset_B, product_B, mask=inside_B)


@triton.jit
def _sum_rows_kernel(x_ptr, y_ptr, row_ptr, out_ptr, width, blocks, count, BLOCK: tl.constexpr):
    column_B, token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.program_id(0) // blocks
    inside_B, offset_B = column_B < width, token.to(tl.int64) * width + column_B
    sum_B = tl.load(x_ptr + offset_B, mask=inside_B, other=0.0).to(tl.float32)
    for number in range(count):
        row = tl.load(row_ptr + token * count + number).to(tl.int64)
        sum_B += tl.load(y_ptr + row * width + column_B, mask=inside_B, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset_B, sum_B.to(out_ptr.dtype.element_ty), mask=inside_B)


@triton.jit
def _head_of(query_ptr, key_ptr, value_ptr, head, heads, kv_heads, size):
    """(first element of the head in queries, keys or values [T, ., size], elements from a token to the next)."""
    if head < heads:
        start_ptr, stride = query_ptr + head * size, heads * size
    elif head < heads + kv_heads:
        start_ptr, stride = key_ptr + (head - heads) * size, kv_heads * size
    else:
        start_ptr, stride = value_ptr + (head - heads - kv_heads) * size, kv_heads * size
    return start_ptr, stride


@triton.jit
def _unit(first_RD, second_RD, size, eps):
    """(both halves of a head over their root mean square, 1 / that)."""
    squares_R = tl.sum(first_RD * first_RD, axis=1) + tl.sum(second_RD * second_RD, axis=1)
    scale_R = 1.0 / tl.sqrt(squares_R / size + eps)
    return first_RD * scale_R[:, None], second_RD * scale_R[:, None], scale_R


@triton.jit
def _rotate_kernel(
    qkv_ptr, query_ptr, key_ptr, value_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr,
    rows, heads, kv_heads, size, eps, NORM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    block, half = tl.program_id(0) // (heads + 2 * kv_heads), size // 2
    head = tl.program_id(0) % (heads + 2 * kv_heads)
    row_R, column_D = block * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    inside_RD = (row_R < rows)[:, None] & (column_D < half)[None, :]
    wide_row_R1 = row_R.to(tl.int64)[:, None]
    from_ptr = qkv_ptr + wide_row_R1 * (heads + 2 * kv_heads) * size + head * size + column_D[None, :]
    first_RD = tl.load(from_ptr, mask=inside_RD, other=0.0).to(tl.float32)
    second_RD = tl.load(from_ptr + half, mask=inside_RD, other=0.0).to(tl.float32)
    start_ptr, stride = _head_of(query_ptr, key_ptr, value_ptr, head, heads, kv_heads, size)
    to_ptr = start_ptr + wide_row_R1 * stride + column_D[None, :]
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    if head < heads + kv_heads:
        if NORM:
            weight_ptr = query_weight_ptr
            if head >= heads:
                weight_ptr = key_weight_ptr
            first_D = tl.load(weight_ptr + column_D, mask=column_D < half, other=0.0).to(tl.float32)
            second_D = tl.load(weight_ptr + half + column_D, mask=column_D < half, other=0.0).to(tl.float32)
            first_RD, second_RD, _ = _unit(first_RD, second_RD, size, eps)
            first_RD = (first_RD.to(dtype).to(tl.float32) * first_D[None, :]).to(dtype).to(tl.float32)
            second_RD = (second_RD.to(dtype).to(tl.float32) * second_D[None, :]).to(dtype).to(tl.float32)
        cos_RD = tl.load(cos_ptr + wide_row_R1 * size + column_D[None, :], mask=inside_RD, other=0.0).to(tl.float32)
        sin_RD = tl.load(sin_ptr + wide_row_R1 * size + column_D[None, :], mask=inside_RD, other=0.0).to(tl.float32)
        turned_RD = first_RD * cos_RD - second_RD * sin_RD
        second_RD = second_RD * cos_RD + first_RD * sin_RD
        first_RD = turned_RD
    tl.store(to_ptr, first_RD.to(dtype), mask=inside_RD)
    tl.store(to_ptr + half, second_RD.to(dtype), mask=inside_RD)


@triton.jit
def _rotate_backward_kernel(
    dquery_ptr, dkey_ptr, dvalue_ptr, qkv_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr, dqkv_ptr,
    dweight_ptr, rows, heads, kv_heads, size, eps, NORM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    block, half = tl.program_id(0) // (heads + 2 * kv_heads), size // 2
    head = tl.program_id(0) % (heads + 2 * kv_heads)
    row_R, column_D = block * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    inside_RD = (row_R < rows)[:, None] & (column_D < half)[None, :]
    wide_row_R1 = row_R.to(tl.int64)[:, None]
    start_ptr, stride = _head_of(dquery_ptr, dkey_ptr, dvalue_ptr, head, heads, kv_heads, size)
    from_ptr = start_ptr + wide_row_R1 * stride + column_D[None, :]
    first_RD = tl.load(from_ptr, mask=inside_RD, other=0.0).to(tl.float32)
    second_RD = tl.load(from_ptr + half, mask=inside_RD, other=0.0).to(tl.float32)
    offset_RD = wide_row_R1 * (heads + 2 * kv_heads) * size + head * size + column_D[None, :]
    dtype: tl.constexpr = dqkv_ptr.dtype.element_ty
    if head < heads + kv_heads:
        cos_RD = tl.load(cos_ptr + wide_row_R1 * size + column_D[None, :], mask=inside_RD, other=0.0).to(tl.float32)
        sin_RD = tl.load(sin_ptr + wide_row_R1 * size + column_D[None, :], mask=inside_RD, other=0.0).to(tl.float32)
        turned_RD = first_RD * cos_RD + second_RD * sin_RD
        second_RD = second_RD * cos_RD - first_RD * sin_RD
        first_RD = turned_RD
        if NORM:
            weight_ptr = query_weight_ptr
            if head >= heads:
                weight_ptr = key_weight_ptr
            first_D = tl.load(weight_ptr + column_D, mask=column_D < half, other=0.0).to(tl.float32)
            second_D = tl.load(weight_ptr + half + column_D, mask=column_D < half, other=0.0).to(tl.float32)
            x_first_RD = tl.load(qkv_ptr + offset_RD, mask=inside_RD, other=0.0).to(tl.float32)
            x_second_RD = tl.load(qkv_ptr + offset_RD + half, mask=inside_RD, other=0.0).to(tl.float32)
            unit_first_RD, unit_second_RD, scale_R = _unit(x_first_RD, x_second_RD, size, eps)
            to_ptr = dweight_ptr + (block * (heads + kv_heads) + head) * size + column_D
            dfirst_D = tl.sum(first_RD * unit_first_RD.to(dtype).to(tl.float32), axis=0)
            dsecond_D = tl.sum(second_RD * unit_second_RD.to(dtype).to(tl.float32), axis=0)
            tl.store(to_ptr, dfirst_D, mask=column_D < half)
            tl.store(to_ptr + half, dsecond_D, mask=column_D < half)
            first_RD, second_RD = first_RD * first_D[None, :], second_RD * second_D[None, :]
            along_R = tl.sum(first_RD * unit_first_RD, axis=1) + tl.sum(second_RD * unit_second_RD, axis=1)
            along_R = along_R / size
            first_RD = scale_R[:, None] * (first_RD - unit_first_RD * along_R[:, None])
            second_RD = scale_R[:, None] * (second_RD - unit_second_RD * along_R[:, None])
    tl.store(dqkv_ptr + offset_RD, first_RD.to(dtype), mask=inside_RD)
    tl.store(dqkv_ptr + offset_RD + half, second_RD.to(dtype), mask=inside_RD)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`layer_torch.rms_norm`."""
    x_TH, (rows, width) = x_TH.contiguous(), x_TH.shape
    y_TH, scale_T = torch.empty_like(x_TH), x_TH.new_empty(rows, dtype=torch.float32)
    block, wide, warps = _row_block(width, tile=4096, each=32)
    if rows:
        launch(
            _norm_kernel, triton.cdiv(rows, block), x_TH, weight_H, y_TH, scale_T, rows, width, eps,
            ROWS=block, WIDTH=wide, num_warps=warps,
        )  # fmt: skip
    return y_TH, scale_T


def rms_norm_backward(
    dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, scale_T: Tensor, dresidual_TH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_torch.rms_norm_backward`; the norm's output is written over `dy_TH`."""
    dy_TH, dresidual_TH, (rows, width) = dy_TH.contiguous(), dresidual_TH.contiguous(), x_TH.shape
    dx_TH = torch.empty_like(dy_TH)
    block, wide, warps = _row_block(width, tile=2048, each=8)
    programs = max(min(triton.cdiv(rows, block), RESIDENT * multiprocessors(x_TH.device)), 1)
    partial_PH = dy_TH.new_empty(programs, width, dtype=torch.float32)
    launch(
        _norm_backward_kernel, programs,
        dy_TH, x_TH.contiguous(), weight_H, scale_T, dresidual_TH, dx_TH, partial_PH, rows, width,
        ROWS=block, WIDTH=wide, num_warps=warps,
    )  # fmt: skip
    return dx_TH, dy_TH, partial_PH.sum(0).to(weight_H.dtype)


def swiglu(gate_up_TF: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """`layer_torch.swiglu`."""
    rows, inner = len(gate_up_TF), gate_up_TF.shape[1] // 2
    product_TI = gate_up_TF.new_empty(rows, inner)
    blocks = triton.cdiv(inner, COLUMNS)
    if rows:
        launch(
            _swiglu_kernel, rows * blocks, gate_up_TF.contiguous(), weight_T, product_TI, inner, blocks,
            WEIGHTED=weight_T is not None, BLOCK=COLUMNS, num_warps=4,
        )  # fmt: skip
    return product_TI


def swiglu_backward(
    gate_up_TF: Tensor, dproduct_TI: Tensor, weight_T: Tensor | None = None, *, reuse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`layer_torch.swiglu_backward`; the product is written over `dproduct_TI`."""
    gate_up_TF, dproduct_TI = gate_up_TF.contiguous(), dproduct_TI.contiguous()
    rows, inner = dproduct_TI.shape
    dgate_up_TF = gate_up_TF if reuse else torch.empty_like(gate_up_TF)
    blocks = triton.cdiv(inner, COLUMNS)
    partial_TP = None if weight_T is None else weight_T.new_zeros(rows, blocks)
    if rows:
        launch(
            _swiglu_backward_kernel, rows * blocks,
            gate_up_TF, dproduct_TI, weight_T, dgate_up_TF, partial_TP, inner, blocks,
            WEIGHTED=weight_T is not None, BLOCK=COLUMNS, num_warps=4,
        )  # fmt: skip
    return dgate_up_TF, dproduct_TI, None if partial_TP is None else partial_TP.sum(1)


def sum_rows(x_TH: Tensor, y_SH: Tensor, row_TK: Tensor) -> Tensor:
    """`layer_torch.sum_rows`."""
    x_TH, (rows, width) = x_TH.contiguous(), x_TH.shape
    out_TH, blocks = torch.empty_like(x_TH), triton.cdiv(width, COLUMNS)
    if rows:
        launch(
            _sum_rows_kernel, rows * blocks, x_TH, y_SH.contiguous(), row_TK.contiguous(), out_TH,
            width, blocks, row_TK.shape[1], BLOCK=COLUMNS, num_warps=4,
        )  # fmt: skip
    return out_TH


def rotate(
    qkv_TF: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_TD: Tensor,
    sin_TD: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_torch.rotate`."""
    rows, size = len(qkv_TF), qkv_TF.shape[1] // (heads + 2 * kv_heads)
    parts = [qkv_TF.new_empty(rows, count, size) for count in (heads, kv_heads, kv_heads)]
    if rows:
        launch(
            _rotate_kernel, triton.cdiv(rows, TOKENS) * (heads + 2 * kv_heads),
            qkv_TF.contiguous(), *parts, *(norms or (None, None)), cos_TD.contiguous(), sin_TD.contiguous(),
            rows, heads, kv_heads, size, eps,
            NORM=norms is not None, ROWS=TOKENS, HALF=triton.next_power_of_2(size // 2), num_warps=4,
        )  # fmt: skip
    return parts[0], parts[1], parts[2]


def rotate_backward(
    dquery_THD: Tensor,
    dkey_TGD: Tensor,
    dvalue_TGD: Tensor,
    qkv_TF: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_TD: Tensor,
    sin_TD: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`layer_torch.rotate_backward`."""
    (rows, heads, size), kv_heads = dquery_THD.shape, dkey_TGD.shape[1]
    dqkv_TF = dquery_THD.new_empty(rows, (heads + 2 * kv_heads) * size)
    blocks = triton.cdiv(rows, TOKENS)
    dweights = None if norms is None else dqkv_TF.new_zeros(blocks, heads + kv_heads, size, dtype=torch.float32)
    if rows:
        launch(
            _rotate_backward_kernel, blocks * (heads + 2 * kv_heads),
            dquery_THD.contiguous(), dkey_TGD.contiguous(), dvalue_TGD.contiguous(),
            None if qkv_TF is None else qkv_TF.contiguous(), *(norms or (None, None)),
            cos_TD.contiguous(), sin_TD.contiguous(), dqkv_TF, dweights, rows, heads, kv_heads, size, eps,
            NORM=norms is not None, ROWS=TOKENS, HALF=triton.next_power_of_2(size // 2), num_warps=4,
        )  # fmt: skip
    if norms is None or dweights is None:
        return dqkv_TF, None, None
    sums = (part.sum((0, 1)) for part in dweights.split([heads, kv_heads], dim=1))
    dquery_D, dkey_D = (total.to(weight.dtype) for total, weight in zip(sums, norms, strict=True))
    return dqkv_TF, dquery_D, dkey_D


def _row_block(width: int, *, tile: int, each: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program that holds whole rows, about `tile` elements, `each` of them in a thread."""
    wide = triton.next_power_of_2(width)
    rows = max(tile // wide, 1)
    return rows, wide, min(max(rows * wide // (32 * each), 4), 32)
