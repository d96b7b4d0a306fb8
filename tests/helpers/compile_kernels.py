"""Compiles every Triton kernel for an H100 on a machine without one: python -m tests.helpers.compile_kernels

Each wrapper is called as on a GPU, and Triton compiles in place of a launch. The interpreter sees neither types nor
what Triton specialises, such as a size of 1, which becomes a constant.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from fastgrpo.kernels import (
    advantage_triton,
    convolution_triton,
    decoding_triton,
    delta_rule_backward_triton,
    delta_rule_forward_triton,
    forward_triton,
    layer_triton,
    mamba2_backward_triton,
    mamba2_forward_triton,
    rows_triton,
    sampling_triton,
)
from fastgrpo.kernels.reference import KlEstimator, LogitTransform, LossOptions, SoftmaxSums, TokenInputs


class Hopper:
    """As much of a CUDA driver as compilation asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def heads(rows: int, vocabulary: int) -> None:
    """The loss head's passes over logits [rows, vocabulary], and the forward product of as many."""
    one_N, targets_N = torch.ones(rows), torch.zeros(rows, dtype=torch.int64)
    logits_NV, hidden_NH, weight_VH = (
        torch.zeros(*size).bfloat16() for size in ((rows, vocabulary), (rows, 64), (vocabulary, 64))
    )
    forward_triton.logprob_forward(hidden_NH, targets_N, weight_VH, 1.0)
    for softcap in (None, 30.0):
        transform = LogitTransform(0.7, softcap)
        sums = SoftmaxSums(*[torch.zeros(rows) for _ in SoftmaxSums._fields])
        rows_triton.fold_rows(logits_NV, targets_N, transform, sums, entropy=softcap is None)
        rows_triton.dlogits_rows(logits_NV, targets_N, transform, one_N, one_N, one_N, one_N)
        tokens = TokenInputs(one_N, one_N, one_N, one_N, one_N, one_N)
        options = LossOptions(kl_weight=0.1, tis_cap=2.0, entropy_weight=0.1)
        changes = [
            {"ratio": "sequence"},
            {"ratio": "cispo"},
            *({"kl_estimator": name} for name in get_args(KlEstimator)),
        ]
        for change in changes if softcap is None else changes[-1:]:
            rows_triton.loss_rows(
                logits_NV,
                targets_N,
                transform,
                tokens,
                options._replace(**change),
                torch.zeros(16, rows),
                gradient=softcap is None,
            )
    rows_triton.scale_(logits_NV, torch.ones(()))
    sampling_triton.sample(logits_NV, one_N, targets_N, targets_N)


def layers(rows: int, width: int) -> None:
    """The decoder layer's passes over [rows, width], of heads of width 64."""
    x_TH, weight_H, scale_T = torch.zeros(rows, width).bfloat16(), torch.ones(width).bfloat16(), torch.ones(rows)
    layer_triton.rms_norm(x_TH, weight_H, 1e-6)
    layer_triton.rms_norm_backward(x_TH, x_TH, weight_H, scale_T, x_TH)
    for weight_T in (None, scale_T):
        layer_triton.swiglu(torch.cat([x_TH, x_TH], 1), weight_T)
        layer_triton.swiglu_backward(torch.cat([x_TH, x_TH], 1), x_TH, weight_T, reuse=False)
    layer_triton.sum_rows(x_TH, x_TH, torch.zeros(rows, 8, dtype=torch.int64))
    count, angle_TD = width // 64, torch.zeros(rows, 64)
    for norms in (None, (torch.ones(64).bfloat16(), torch.ones(64).bfloat16())):
        qkv_TF = torch.zeros(rows, (count + 2) * 64).bfloat16()
        parts = layer_triton.rotate(qkv_TF, norms, 1e-6, angle_TD, angle_TD, count, 1)
        layer_triton.rotate_backward(*parts, qkv_TF, norms, 1e-6, angle_TD, angle_TD)


def decoding(sequences: int, block: int, counts: tuple[int, int], dim: int) -> None:
    """Attention of so many sequences that decode, of heads of queries and of keys."""
    query_BHD = torch.zeros(sequences, counts[0] + 2 * counts[1], dim).bfloat16()[:, : counts[0]]
    cache, length_B = torch.zeros(4, 2, block, counts[1], dim).bfloat16(), torch.ones(sequences, dtype=torch.int32)
    table_BM = torch.zeros(sequences, 13, dtype=torch.int32)
    groups = decoding_triton.grouped(table_BM, length_B, block, counts[0] // counts[1])
    out_BHD = torch.zeros(sequences, counts[0], dim).bfloat16()
    decoding_triton.attend(query_BHD, cache[:, 0], cache[:, 1], table_BM, length_B, groups, 0.1, out_BHD)


def delta_rule(rows: int, length: int, heads: int, keys: int, values: int) -> None:
    """The gated delta rule of such rows, forward and backward."""
    columns = [torch.zeros(rows, length, heads, width).bfloat16() for width in (keys, keys, values)]
    inputs = [*columns, torch.zeros(rows, length, heads), torch.zeros(rows, length, heads).bfloat16()]
    state = torch.zeros(rows, heads, keys, values)
    kept = delta_rule_forward_triton.forward(inputs, columns[2], state, state)
    delta_rule_backward_triton.backward(columns[2], inputs, kept, inputs, state, state)


def convolution(rows: int, length: int, channels: int) -> None:
    """The short convolution of such rows, with a bias and without."""
    x_SLC, weight_CW = torch.zeros(rows, length, channels).bfloat16(), torch.zeros(channels, 4).bfloat16()
    for bias_C in (None, weight_CW[:, 0].contiguous()):
        convolution_triton.forward(x_SLC, weight_CW, bias_C)
        convolution_triton.backward(x_SLC, x_SLC, weight_CW, bias_C)


def mamba2(rows: int, length: int, heads: int, groups: int, state: int, values: int) -> None:
    """Mamba-2 of such rows, forward and backward."""
    x, b, dt = (torch.zeros(rows, length, *of).bfloat16() for of in ((heads, values), (groups, state), (heads,)))
    inputs = [x, dt, torch.zeros(heads), b, b, torch.zeros(heads), torch.zeros(heads)]
    output, states, limit = x.float(), torch.zeros(rows, heads, state, values), (0.0, float("inf"))
    mamba2_forward_triton.forward(inputs, limit, output, states, states)
    mamba2_backward_triton.backward(output, states, inputs, limit, states, inputs, states)


def unwritten(cubin: bytes) -> list[str]:
    """Instructions that read a register before any has written it.

    ptxas 12.8, which Triton 3.6 brings, moves sums of descriptors of `wgmma` before what they are sums of: products
    then read where no shared memory is. ptxas 12.9 and 13.0 do not, of the same PTX.
    """
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(cubin)
        disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        text = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    written, found = set[str](), []
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z].*?) *;", text):
        operation, _, rest = line.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        # A predicate that is written beside a register comes first.
        if operation.startswith(("SHFL", "LOP3")) and re.match(r"!?U?P", operands[0]):
            operands = operands[1:]
        to = re.fullmatch(r"(U?R)(\d+)", operands[0])
        read = {name for operand in operands[1 if to else 0 :] for name in re.findall(r"\bU?R\d+\b", operand)}
        # These keep a part of what they change, which may be all that is ever used of it.
        if to and operation.startswith(("PRMT", "LOP3")):
            read.discard(operands[0])
        if read - written:
            found.append(line)
        if to:
            wide = 128 if "MMA" in operation else 4 if re.search(r"64|128|WIDE|CS2R|LDSM|^D", operation) else 1
            written |= {f"{to[1]}{int(to[2]) + number}" for number in range(wide)}
    return found


def main() -> None:
    driver.set_active(Hopper())
    launched: Any = JITFunction.run

    def compiled(self: Any, *given: Any, **named: Any) -> None:
        """What a launch is given compiles, and is not launched."""
        kernel = launched(self, *given, **named | {"warmup": True})
        if ".delta_rule_" in self.fn.__module__ or ".mamba2_" in self.fn.__module__:
            # `tiles_triton` says why a product of Hopper's must have no left factor in registers.
            products = [line for line in kernel.asm["ttgir"].splitlines() if "warp_group_dot " in line]
            assert not [line for line in products if ": tensor<" in line], self.fn.__name__
            assert not unwritten(kernel.asm["cubin"]), self.fn.__name__

    JITFunction.run = compiled
    for rows, vocabulary in ((1, 128), (300, 1000)):
        heads(rows, vocabulary)
    for rows, width in ((1, 64), (33, 1536)):
        layers(rows, width)
    for sequences, block, counts, dim in ((512, 64, (12, 2), 128), (300, 16, (14, 2), 64), (264, 32, (16, 1), 128)):
        decoding(sequences, block, counts, dim)
    for shape in ((1, 1, 1, 16, 16), (2, 70, 3, 128, 128)):
        delta_rule(*shape)
    for rows, length, channels in ((1, 1, 1), (2, 70, 8192)):
        convolution(rows, length, channels)
    for heads_and_groups, widths in (((1, 1), (16, 16)), ((48, 1), (128, 64)), ((16, 2), (256, 80))):
        mamba2(2, 70, *heads_and_groups, *widths)
    for mode in ("grpo", "dr_grpo", "rloo"):
        advantage_triton.group_advantages(torch.ones(9), torch.zeros(9, dtype=torch.int64), mode)
    print("compiled")


if __name__ == "__main__":
    main()
