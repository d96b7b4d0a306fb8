"""`fused_forward.py`'s product in Gluon: warps that load, and two groups of warps that multiply and fold in turn.

Both groups read the same words and a half of the rows each. Nothing holds them in step but the ring of buffers, so that
one multiplies while the other takes its exponentials.
"""

from __future__ import annotations

import torch
import triton
from forward_parts import PART_ROWS, ROUND_TO_BF16, finish
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastgrpo.kernels.reference import LogitTransform
from fastgrpo.kernels.rows_triton import LOG2_E, PADDING

ROWS, WORDS, RING = gl.constexpr(64), gl.constexpr(256), 256  # hidden dimensions in all stages of the ring
GROUP_REGISTERS, LOADER_REGISTERS, REGISTERS = gl.constexpr(240), gl.constexpr(24), 168


@gluon.jit
def _tile_of(number, row_blocks, word_blocks, GROUP: gl.constexpr):
    """(block of 2 * ROWS rows, block of words): rows first within a group, whose hidden states stay in the L2."""
    first = number // (GROUP * word_blocks) * GROUP
    rows = gl.minimum(row_blocks - first, GROUP)
    within = number - first * word_blocks
    return first + within % rows, within // rows


@gluon.jit
def _load(hidden_desc, weight_desc, ring, sizes, GROUP: gl.constexpr):
    """Fills the ring of buffers, tile by tile."""
    hidden_bufs, weight_bufs, ready, empty = ring
    STAGES: gl.constexpr = weight_bufs.type.shape[0]
    DEPTH: gl.constexpr = weight_bufs.type.shape[2]
    rows, vocabulary, hidden = sizes
    row_blocks, word_blocks = gl.cdiv(rows, 2 * ROWS), gl.cdiv(vocabulary, WORDS)
    step = 0
    for number in range(gl.program_id(0), row_blocks * word_blocks, gl.num_programs(0)):
        row_block, word_block = _tile_of(number, row_blocks, word_blocks, GROUP)
        for start in range(0, hidden, DEPTH):
            index, turn = step % STAGES, step // STAGES & 1
            mbarrier.wait(empty.index(index), turn ^ 1)
            bar = ready.index(index)
            mbarrier.expect(bar, 2 * hidden_desc.block_type.nbytes + weight_desc.block_type.nbytes)
            for half in gl.static_range(2):
                row = (2 * row_block + half) * ROWS
                tma.async_copy_global_to_shared(hidden_desc, [row, start], bar, hidden_bufs.index(2 * index + half))
            tma.async_copy_global_to_shared(weight_desc, [word_block * WORDS, start], bar, weight_bufs.index(index))
            step += 1


@gluon.jit
def _multiply(
    ring, sizes, pointers, constants,
    HALF: gl.constexpr, SOFTCAP: gl.constexpr, ENTROPY: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One group of four warps: its half of each tile's rows."""
    hidden_bufs, weight_bufs, ready, empty = ring
    STAGES: gl.constexpr = weight_bufs.type.shape[0]
    DEPTH: gl.constexpr = weight_bufs.type.shape[2]
    rows, vocabulary, hidden = sizes
    bias_ptr, targets_ptr, target_ptr, parts_ptr = pointers
    softcap, scale = constants
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WORDS, 16])
    row_blocks, word_blocks = gl.cdiv(rows, 2 * ROWS), gl.cdiv(vocabulary, WORDS)
    step = 0
    for number in range(gl.program_id(0), row_blocks * word_blocks, gl.num_programs(0)):
        row_block, word_block = _tile_of(number, row_blocks, word_blocks, GROUP)
        logits_RV = gl.zeros([ROWS, WORDS], gl.float32, layout)
        for start in range(0, hidden, DEPTH):
            index = step % STAGES
            mbarrier.wait(ready.index(index), step // STAGES & 1)
            words_KV = weight_bufs.index(index).permute((1, 0))
            flying = warpgroup_mma(hidden_bufs.index(2 * index + HALF), words_KV, logits_RV, is_async=True)
            # All but the product just begun are done, so the buffers before are free.
            logits_RV = warpgroup_mma_wait(num_outstanding=1, deps=(flying,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=start > 0)
            step += 1
        logits_RV = warpgroup_mma_wait(num_outstanding=0, deps=(logits_RV,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        _fold_tile(
            logits_RV, (2 * row_block + HALF) * ROWS, word_block * WORDS, bias_ptr, targets_ptr, target_ptr,
            parts_ptr + word_block.to(gl.int64) * rows, rows, vocabulary, word_blocks.to(gl.int64) * rows,
            softcap, scale, SOFTCAP, ENTROPY, layout,
        )  # fmt: skip


@gluon.jit
def _fold_tile(
    logits_RV, first_row, first_word, bias_ptr, targets_ptr, target_ptr, part_ptr, rows, vocabulary, plane,
    softcap, scale, SOFTCAP: gl.constexpr, ENTROPY: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """As `fused_forward._fold_tile`; the target's logit is stored by the one thread that holds it."""
    word_V = first_word + gl.arange(0, WORDS, gl.SliceLayout(0, layout))
    row_R = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    if bias_ptr is not None:
        bias_V = gl.load(bias_ptr + word_V, mask=word_V < vocabulary, other=0.0)
        logits_RV += bias_V.to(gl.float32)[None, :]
    x_RV = gl.inline_asm_elementwise(ROUND_TO_BF16, "=r,=r,r,r", [logits_RV], dtype=gl.float32, is_pure=True, pack=2)
    if SOFTCAP:
        x_RV = softcap * (2.0 / (1.0 + gl.exp2(x_RV * (-2.0 * 1.4426950408889634 / softcap))) - 1.0)
    if first_word + WORDS > vocabulary:
        x_RV = gl.where((word_V < vocabulary)[None, :], x_RV, PADDING)
    inside_R = row_R < rows
    target_R = gl.load(targets_ptr + row_R, mask=inside_R, other=-1).to(gl.int32)
    here_R = (target_R >= first_word) & (target_R < first_word + WORDS)
    if gl.max(here_R.to(gl.int32), axis=0) > 0:
        found_R = gl.sum(gl.where(word_V[None, :] == target_R[:, None], x_RV, 0.0), axis=1)
        gl.store(target_ptr + row_R, found_R, mask=here_R)
    largest_R = gl.max(x_RV, axis=1)
    distance_RV = x_RV * scale - (largest_R * scale)[:, None]
    e_RV = gl.exp2(distance_RV)
    gl.store(part_ptr + row_R, largest_R, mask=inside_R)
    gl.store(part_ptr + plane + row_R, gl.sum(e_RV, axis=1), mask=inside_R)
    if ENTROPY:
        gl.store(part_ptr + 2 * plane + row_R, gl.sum(e_RV * distance_RV, axis=1), mask=inside_R)


@gluon.jit(do_not_specialize=["rows", "vocabulary", "hidden"])
def _product_kernel(
    hidden_desc, weight_desc, bias_ptr, targets_ptr, target_ptr, parts_ptr, rows, vocabulary, hidden, softcap, scale,
    SOFTCAP: gl.constexpr, ENTROPY: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    hidden_bufs = gl.allocate_shared_memory(hidden_desc.dtype, [2 * STAGES, ROWS, DEPTH], hidden_desc.layout)
    weight_bufs = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, WORDS, DEPTH], weight_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    ring = (hidden_bufs, weight_bufs, ready, empty)
    sizes, constants = (rows, vocabulary, hidden), (softcap, scale)
    pointers = (bias_ptr, targets_ptr, target_ptr, parts_ptr)
    gl.warp_specialize(
        [
            (_multiply, (ring, sizes, pointers, constants, 0, SOFTCAP, ENTROPY, GROUP)),
            (_multiply, (ring, sizes, pointers, constants, 1, SOFTCAP, ENTROPY, GROUP)),
            (_load, (hidden_desc, weight_desc, ring, sizes, GROUP)),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOADER_REGISTERS],
    )


def logprob_forward(
    hidden_NH: Tensor,
    targets_N: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    transform: LogitTransform,
    *,
    entropy: bool = True,
    depth: int = 64,
    group: int = 32,
) -> tuple[Tensor, Tensor]:
    """Target logprob and, if asked for, entropy in nats, fp32 [N]; 12 bytes for `WORDS` logits are held."""
    vocabulary, hidden = weight_VH.shape
    words = triton.cdiv(vocabulary, WORDS.value)
    logprob_N = hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32)
    entropy_N = torch.empty_like(logprob_N if entropy else logprob_N[:0])
    softcap, scale = transform.softcap or 0.0, LOG2_E.value / transform.temperature
    processors = torch.cuda.get_device_properties(hidden_NH.device).multi_processor_count
    for start in range(0, len(hidden_NH), PART_ROWS):
        some = slice(start, start + PART_ROWS)
        hidden_CH, target_C = hidden_NH[some], torch.empty_like(logprob_N[some])
        rows, parts_3PC = len(hidden_CH), target_C.new_empty(3, words, len(hidden_CH))
        _product_kernel[(processors,)](
            _descriptor(hidden_CH, ROWS.value, depth), _descriptor(weight_VH, WORDS.value, depth),
            bias_V, targets_N[some], target_C, parts_3PC, rows, vocabulary, hidden, softcap, scale,
            SOFTCAP=bool(softcap), ENTROPY=entropy, DEPTH=depth, STAGES=RING // depth, GROUP=group,
            num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
        finish(parts_3PC, target_C, (logprob_N[some], entropy_N[some]), scale, entropy=entropy)
    return logprob_N, entropy_N


def _descriptor(values: Tensor, rows: int, depth: int) -> TensorDescriptor:
    block = [rows, depth]
    return TensorDescriptor.from_tensor(values, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))
