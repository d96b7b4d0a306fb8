"""Tokens drawn from a batch's logits with their logprobs: one read of the logits beside what vLLM 0.25.1 does.

    python bench/bench_sampling.py [--rows 512,64,8]

On a GPU. Logits of Qwen2.5's vocabulary in bf16, a seed for each row. vLLM copies them to float32, draws, and finds
logprob and rank of each token. The floor is the largest logit of each row by torch, which reads the logits once too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from engine_setup import report
from model_shapes import device_name, shape
from torch import Tensor
from triton.testing import do_bench

from fastgrpo.kernels.sampling_triton import sample


def vllms(logits_NV: Tensor, temperature_N: Tensor, seed_N: Tensor, position_N: Tensor) -> Any:
    """The same by vLLM's sampler, whose requests are the rows."""
    gumbel, logprob = (import_module(f"vllm.v1.worker.gpu.sample.{name}") for name in ("gumbel", "logprob"))
    row_N = torch.arange(len(logits_NV), device=logits_NV.device, dtype=torch.int32)
    processed_NV = torch.empty_like(logits_NV, dtype=torch.float32).copy_(logits_NV)
    token_N = gumbel.gumbel_sample(processed_NV, row_N, temperature_N, seed_N, position_N, apply_temperature=False)
    return logprob.compute_topk_logprobs(processed_NV, 0, token_N)


def milliseconds(call: Callable[[], Any]) -> float:
    """Its median, each time with the L2 emptied."""
    return float(do_bench(call, quantiles=[0.5]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="512,64,8")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU: on a CPU vLLM samples with torch")
    torch.manual_seed(0)
    report("device", device_name())
    for rows in map(int, options.rows.split(",")):
        logits_NV = torch.randn(rows, shape("1.5b").vocab_size, device="cuda", dtype=torch.bfloat16) * 3
        temperature_N, seed_N = torch.ones(rows, device="cuda"), torch.arange(rows, device="cuda")
        given = logits_NV, temperature_N, seed_N, torch.full_like(seed_N, 700)
        calls: list[Callable[[], Any]] = [partial(logits_NV.amax, 1), partial(sample, *given), partial(vllms, *given)]
        floor, ours, theirs = map(milliseconds, calls)
        report(f"{rows} rows, ms: ours; vLLM's; one read", f"{ours:.3f}; {theirs:.3f}; {floor:.3f}")
        report("  ours over vLLM's; over one read", f"{ours / theirs:.2f}; {ours / floor:.1f}")


if __name__ == "__main__":
    main()
