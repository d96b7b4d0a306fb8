"""Forward and backward of one micro-batch, with each part of the fused layers off and on: tokens/s, MFU, memory.

    python bench/bench_train.py [--size 1.5b] [--tokens 17408] [--compile] [--save FILE]
    python bench/bench_train.py --length 32768

Random weights of the Qwen2.5 shape, no engine, no download. Groups of 8 answers of 1,024 tokens to a prompt of 512,
computed once, as many as `--tokens` holds; or with `--length` one sequence of that length. Gradients in bf16 `.grad`
but for the last row, which has the optimizer: fp32 sums, master weights and moments. MFU counts what
`training.flops` counts, over 989 TFLOP/s. The kernels are timed alone, in bytes they must move a second; then where the
time of a step goes, by kind of kernel.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_setup import report, save
from model_shapes import (
    CUDA,
    DENSE,
    GIB,
    PEAK_FLOPS,
    device_name,
    named,
    random_model,
    random_samples,
    seconds_of,
    shape,
    synchronize,
    timed,
)
from profile_training import by_kernel
from torch.nn.functional import linear

from fastgrpo.config import Grpo
from fastgrpo.kernels import layer_torch
from fastgrpo.kernels.layer import passes_on, stacked
from fastgrpo.policy import fused_layers, packed_attention
from fastgrpo.policy.model import Policy
from fastgrpo.training.flops import training_flops
from fastgrpo.training.loss import policy_loss
from fastgrpo.training.memory import Workload, plan_memory
from fastgrpo.training.model_sizes import activation_bytes_per_token
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.training.packing import pack
from fastgrpo.types import Batch

PROMPT, ANSWER, GROUP = (512, 1024, 8) if CUDA else (64, 32, 4)
KINDS = {
    "attention": ("flash", "fmha", "attention"),
    "norms, MLP, rotation": ("_norm_", "_swiglu_", "_rotate_"),
    "a shared prompt's keys": ("_sum_copies", "index"),
    "products": ("gemm", "cutlass", "nvjet", "xmma"),
    "head's rows": ("_loss_kernel", "_fold_kernel", "_dlogits", "_scale_kernel"),
}


def plain_norm_linear(x_TH: Any, norm_H: Any, eps: float, weights: Any, biases: Any = ()) -> Any:
    h_TH = layer_torch.rms_norm(x_TH, norm_H, eps)[0]
    return x_TH, torch.cat(
        [linear(h_TH, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)], -1
    )


def plain_norm_mlp(x_TH: Any, norm_H: Any, eps: float, gate: Any, up: Any, down: Any, *, recompute: bool) -> Any:
    h_TH = layer_torch.rms_norm(x_TH, norm_H, eps)[0]
    return x_TH + linear(torch.nn.functional.silu(linear(h_TH, gate)) * linear(h_TH, up), down)


def plain_rotated(qkv_TF: Any, cos_TD: Any, sin_TD: Any, *, heads: int, kv_heads: int, norms: Any, eps: float) -> Any:
    return layer_torch.rotate(qkv_TF, norms, eps, cos_TD, sin_TD, heads, kv_heads)


PLAIN = {"norm_linear": plain_norm_linear, "norm_mlp": plain_norm_mlp, "rotated": plain_rotated}


@contextmanager
def layers_as(policy: Policy, *fused: str, recompute: bool = False, checkpointing: bool = False) -> Iterator[None]:
    """The layers with these parts fused and the others in eager torch; none at all are transformers' own layers."""
    before = {name: getattr(fused_layers, name) for name in PLAIN}
    if fused:
        policy.fuse_layers(recompute_mlp=recompute)
        for name in PLAIN.keys() - set(fused):
            setattr(fused_layers, name, PLAIN[name])
    policy.gradient_checkpointing(checkpointing)
    try:
        yield
    finally:
        policy.gradient_checkpointing(False)
        policy.model.zero_grad()
        fused_layers.restore_layers(policy.model.base_model)
        for name, function in before.items():
            setattr(fused_layers, name, function)


def measured(policy: Policy, batch: Batch, name: str, expected: float = float("nan")) -> None:
    """One row of the table: median of three. `expected`: GiB of activations by the memory plan."""

    def run() -> None:
        policy_loss(policy, batch, Grpo(tis_cap=0.0)).loss.backward()

    try:
        _, first = timed(run)
        policy.model.zero_grad()
        run()
        start = reset_peak()
        seconds = median(timed(run)[1] for _ in range(3))
    except torch.OutOfMemoryError:
        policy.model.zero_grad()
        reset_peak()
        return report(name, f"out of memory; the plan says {expected:.1f} GiB of activations")
    tokens = len(batch.input_ids_T)
    peak = (torch.cuda.max_memory_allocated() - start) / GIB if CUDA else float("nan")
    mfu = training_flops(policy.model, [batch]) / seconds / PEAK_FLOPS
    report(
        name,
        f"{1e3 * seconds:6.1f} ms, {tokens / seconds:7,.0f} tokens/s, MFU {mfu:.1%}, "
        f"{peak:4.1f} GiB above weights and gradients (plan {expected:.1f}; first {first:.1f} s)",
    )


def reset_peak() -> int:
    """Bytes allocated now; the peak counts from here."""
    if not CUDA:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def parts(policy: Policy, batch: Batch, length: int) -> None:
    """The table's rows: parts off and on."""
    config, tokens = policy.model.config, len(batch.input_ids_T)
    copies = 1.0 if batch.runs.key_index_U is None else len(batch.runs.key_index_U) / tokens

    def planned(layers: Any, recompute: bool = False) -> float:
        dtype = policy.head_weight.dtype
        size = activation_bytes_per_token(config, dtype, layers=layers, recompute_mlp=recompute, key_copies=copies)
        return tokens * size * config.num_hidden_layers / GIB

    everything = tuple(PLAIN)
    if not length:
        with layers_as(policy):
            measured(policy, batch, "transformers' layers", planned("plain"))
        for name in everything:
            with layers_as(policy, name):
                measured(policy, batch, f"fused: {name} alone")
    with layers_as(policy, *everything):
        measured(policy, batch, "fused: all (the default)", planned("fused"))
    with layers_as(policy, *everything):
        separate(policy)
        measured(policy, batch, "  the same, weights not next to each other", planned("fused"))
    with layers_as(policy, *everything, recompute=True):
        measured(policy, batch, "fused, model.recompute_mlp", planned("fused", recompute=True))
    with layers_as(policy, *everything, checkpointing=True):
        kept = tokens * config.num_hidden_layers * config.hidden_size * policy.head_weight.itemsize / GIB
        measured(policy, batch, "fused, model.gradient_checkpointing", kept)


def separate(policy: Policy) -> None:
    """Give every parameter memory of its own."""
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.clone()
    layers: Any = policy.model.base_model.layers
    first = layers[0].mlp
    weights = first.gate_proj.weight, first.up_proj.weight
    assert stacked(weights).data_ptr() != weights[0].data_ptr()


def with_optimizer(policy: Policy, batch: Batch, recompute: bool) -> None:
    """Fused layers, gradients into the optimizer's fp32 sums, and its step."""
    with layers_as(policy, *PLAIN, recompute=recompute):
        try:
            optimizer = AdamW(policy.model.parameters(), AdamWOptions(lr=1e-6))
            measured(policy, batch, "fused, gradients into fp32 sums")
            report("  the optimizer's step, once for all micro-batches", f"{1e3 * timed(optimizer.step)[1]:6.1f} ms")
        except torch.OutOfMemoryError:
            report("fused, with the optimizer", "out of memory: the state does not fit beside this on one GPU")


def kernels(size: str, tokens: int) -> None:
    """Print the time of each row pass alone, and the bytes a second that it must read and write in it."""
    config, dtype = shape(size), torch.bfloat16 if CUDA else torch.float32
    device, hidden, inner = torch.device("cuda" if CUDA else "cpu"), config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head = hidden // heads
    x, dy, norm = (torch.randn(*s, device=device, dtype=dtype) for s in ((tokens, hidden), (tokens, hidden), (hidden,)))
    gate_up, product = (torch.randn(tokens, n * inner, device=device, dtype=dtype) for n in (2, 1))
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head, device=device, dtype=dtype)
    cos, sin = (torch.rand(tokens, head, device=device, dtype=dtype) for _ in range(2))
    passes, options = passes_on(device), (None, 0.0, cos, sin)
    scale = passes.rms_norm(x, norm, 1e-6)[1]
    grads = passes.rotate(qkv, *options, heads, kv_heads)
    units: list[tuple[str, int, Callable[[], Any]]] = [
        ("rms_norm", 2 * x.nbytes, lambda: passes.rms_norm(x, norm, 1e-6)),
        ("rms_norm backward", 5 * x.nbytes, lambda: passes.rms_norm_backward(dy.clone(), x, norm, scale, dy)),
        ("swiglu", 3 * product.nbytes, lambda: passes.swiglu(gate_up)),
        ("swiglu backward", 6 * product.nbytes, lambda: passes.swiglu_backward(gate_up, product, reuse=False)),
        ("rotation", 2 * qkv.nbytes, lambda: passes.rotate(qkv, *options, heads, kv_heads)),
        ("rotation backward", 2 * qkv.nbytes, lambda: passes.rotate_backward(*grads, None, *options)),
    ]
    copying = seconds_of(dy.clone)
    for name, size_bytes, run in units:
        run()
        seconds = seconds_of(run) - (copying if name == "rms_norm backward" else 0.0)
        report(f"kernel: {name}", f"{1e6 * seconds:7.0f} us, {size_bytes / seconds / 1e12:.2f} TB/s")


def breakdown(policy: Policy, batch: Batch) -> None:
    """Milliseconds of the GPU by kind of kernel in one fused forward and backward, and the longest kernels."""

    def run() -> None:
        policy_loss(policy, batch, Grpo(tis_cap=0.0)).loss.backward()
        synchronize()

    with layers_as(policy, *PLAIN):
        run()
        seconds = timed(run)[1]
        by_name, _ = by_kernel(run)
    spent = Counter[str]()
    for name, spent_ms in by_name.items():
        kind = next((k for k, words in KINDS.items() if any(w in name.lower() for w in words)), "other")
        spent[kind] += spent_ms
    idle = 1e3 * seconds - sum(spent.values())
    report(
        "where a step's time goes, ms", ", ".join(f"{k} {v:.1f}" for k, v in spent.most_common()) + f", idle {idle:.1f}"
    )
    for name, spent_ms in by_name.most_common(14):
        print(f"    {spent_ms:7.2f} ms  {name[:120]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=DENSE, default="1.5b" if CUDA else "tiny")
    parser.add_argument("--tokens", type=int, default=2 * (PROMPT + GROUP * ANSWER), help="of the micro-batch")
    parser.add_argument("--length", type=int, default=0, help="one sequence of so many tokens in place of groups")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well, which takes a minute")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if CUDA else "cpu")
    model = random_model(options.size, device.type).train()
    policy = Policy(model if CUDA else model.float(), None)  # type: ignore[arg-type]
    groups, members = (1, 1) if options.length else (max(options.tokens // (PROMPT + GROUP * ANSWER), 1), GROUP)
    answer = options.length - PROMPT if options.length else ANSWER
    made = random_samples(policy.head_weight.shape[0], PROMPT, answer, groups, members)
    (batch,) = pack(made, [1e-6] * len(made), max(options.tokens, options.length), device)
    flash = packed_attention._flash_attention(device) if CUDA else None
    attention = "torch's varlen attention" if flash is None else flash.__module__.split(".")[0]
    title = f"One micro-batch of {len(batch.input_ids_T)} tokens, {named(options.size)}, {attention}"
    print(f"{title}; {device_name()}, torch {torch.__version__}")
    if options.length:
        plan(options.size, options.length)
    parts(policy, batch, options.length)
    kernels(options.size, len(batch.input_ids_T))
    if CUDA:
        breakdown(policy, batch)
    if options.compile:
        policy.compile_layers()
        with layers_as(policy):
            measured(policy, batch, "torch.compile of transformers' layers")
    else:
        with_optimizer(policy, batch, recompute=options.length > 0)
    if options.save:
        save(options.save, title)


def plan(size: str, length: int) -> None:
    """What the memory plan says of a run whose sequences may be `length` long, on 80 GB."""
    for recompute in (False, True):
        workload = Workload(length, 64, length, layers="fused", recompute_mlp=recompute)
        need = plan_memory(shape(size), workload, 72 * GIB).training / GIB
        report(f"plan of one GPU, recompute_mlp {recompute}".lower(), f"{need:.1f} GiB in training")


if __name__ == "__main__":
    main()
