"""The loss head beside its floor (three matrix products) and its peers, in one run.

As one script: `python bench/bench_loss_head.py` prints a table.
With pytest-benchmark: `pytest bench/bench_loss_head.py`. On a CPU the same, at a CPU's shapes and without the peers.
Peers, where installed: TRL's ChunkedLogProbFunction, Liger's fused GRPO loss, Apple's cut cross entropy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from model_shapes import CUDA, synchronize, timed
from torch import Tensor

from fastgrpo.kernels import linear_grpo_loss, linear_logprob, reference
from fastgrpo.kernels.reference import LossOptions, TokenInputs
from fastgrpo.training.advantage import group_advantages

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
SHAPES = [(8192, 4096, 151_936), (16_384, 1536, 151_936)] if CUDA else [(4096, 128, 1024), (4096, 256, 2048)]
TRL_CHUNK = 32_768  # what its trainer uses
OPTIONS = LossOptions("token", 0.2, 0.28)
Step = Callable[[], object]


@dataclass
class Case:
    """One head with its loss inputs."""

    hidden_NH: Tensor
    weight_VH: Tensor
    targets_N: Tensor
    tokens: TokenInputs

    def clear(self) -> None:
        self.hidden_NH.grad = self.weight_VH.grad = None


def realistic_head(n: int, h: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, targets) whose logits are shaped like a trained model's.

    A Gaussian background (standard deviation 2 over the vocabulary), above which stand a few candidates drawn by
    Zipf's law: one for 70 % of the tokens, 18 to 26 above it (entropy below 0.1 nats); else four, 13 to 17 above it.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": DEVICE}
    weight_VH = torch.randn(v, h, dtype=DTYPE, **options) * h**-0.5
    zipf_N4 = ((v + 1.0) ** torch.rand(n, 4, **options)).long().clamp(max=v) - 1
    sure_N1 = torch.rand(n, 1, **options) < 0.7
    alone_N4 = torch.tensor([1.0, 0.0, 0.0, 0.0], device=DEVICE) * (18 + 8 * torch.rand(n, 1, **options))
    gap_N4 = torch.where(sure_N1, alone_N4, 13 + 4 * torch.rand(n, 4, **options)).to(DTYPE)
    hidden_NH = 2 * torch.randn(n, h, dtype=DTYPE, **options)
    for k in range(4):
        hidden_NH += gap_N4[:, k, None] * weight_VH[zipf_N4[:, k]]
    pick_N1 = torch.multinomial(torch.softmax(gap_N4.float(), dim=1), 1, generator=generator)
    return hidden_NH, weight_VH, zipf_N4.gather(1, pick_N1)[:, 0]


def make_case(n: int, h: int, v: int) -> Case:
    hidden_NH, weight_VH, targets_N = realistic_head(n, h, v)
    logprobs_N, _ = linear_logprob(hidden_NH, weight_VH, targets_N, entropy=False)
    old_N = logprobs_N + 0.1 * torch.randn(n, device=DEVICE)
    tokens = TokenInputs(torch.randn(n, device=DEVICE), torch.full((n,), 1.0 / n, device=DEVICE), old_N)
    return Case(hidden_NH.requires_grad_(), weight_VH.requires_grad_(), targets_N, tokens)


def floor(case: Case) -> Step:
    """The three products alone, whole: logits, dX, dW."""
    hidden_NH, weight_VH = case.hidden_NH.detach(), case.weight_VH.detach()
    logits_NV = torch.empty(len(hidden_NH), len(weight_VH), device=DEVICE, dtype=DTYPE)

    def step() -> None:
        torch.mm(hidden_NH, weight_VH.T, out=logits_NV)
        torch.mm(logits_NV, weight_VH)
        torch.mm(logits_NV.T, hidden_NH)

    return step


def ours(case: Case) -> Step:
    def step() -> None:
        case.clear()
        keywords = {**case.tokens._asdict(), **OPTIONS._asdict()}
        linear_grpo_loss(case.hidden_NH, case.weight_VH, case.targets_N, **keywords).loss.backward()

    return step


def two_pass(case: Case) -> Step:
    """Our `linear_logprob` with the loss on top: four products."""

    def step() -> None:
        case.clear()
        logprobs_N, _ = linear_logprob(case.hidden_NH, case.weight_VH, case.targets_N)
        reference.policy_loss(logprobs_N, case.tokens, OPTIONS).loss_N.sum().backward()

    return step


def eager(case: Case) -> Step:
    """Plain torch, holding [N, V]."""

    def step() -> None:
        case.clear()
        arguments = (case.hidden_NH, case.weight_VH, case.targets_N, case.tokens, OPTIONS)
        reference.linear_grpo_loss(*arguments)[0].backward()

    return step


def trl(case: Case) -> Step:
    from trl.kernels import ChunkedLogProbFunction

    def step() -> None:
        case.clear()
        arguments = (case.hidden_NH, case.weight_VH, None, case.targets_N, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
        logprobs_N = ChunkedLogProbFunction.apply(*arguments)[0]
        reference.policy_loss(logprobs_N, case.tokens, OPTIONS).loss_N.sum().backward()

    return step


def liger(case: Case) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows, length = len(case.targets_N) // 1024, 1024
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28)
    mask_BT = torch.ones(rows, length, device=DEVICE)
    advantages_B = case.tokens.advantages_N[:rows].contiguous()
    old_N = case.tokens.old_logprobs_N
    assert old_N is not None, "`make_case` gives them"

    def step() -> None:
        case.clear()
        hidden_BTH, old_BT = case.hidden_NH.view(rows, length, -1), old_N.view(rows, length)
        arguments = (hidden_BTH, case.weight_VH, case.targets_N.view(rows, length), mask_BT, advantages_B)
        loss(*arguments, old_per_token_logps=old_BT)[0].backward()

    return step


def cut_cross_entropy(case: Case) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def step() -> None:
        case.clear()
        logprobs_N = -linear_cross_entropy(case.hidden_NH, case.weight_VH, case.targets_N, reduction="none").float()
        reference.policy_loss(logprobs_N, case.tokens, OPTIONS).loss_N.sum().backward()

    return step


def forward_floor(case: Case) -> Step:
    hidden_NH, weight_VH = case.hidden_NH.detach(), case.weight_VH.detach()
    logits_NV = torch.empty(len(hidden_NH), len(weight_VH), device=DEVICE, dtype=DTYPE)
    return lambda: torch.mm(hidden_NH, weight_VH.T, out=logits_NV)


def forward_ours(case: Case) -> Step:
    return torch.no_grad()(lambda: linear_logprob(case.hidden_NH, case.weight_VH, case.targets_N))


def forward_trl(case: Case) -> Step:
    from trl.kernels import ChunkedLogProbFunction

    arguments = (case.hidden_NH, case.weight_VH, None, case.targets_N, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return torch.no_grad()(lambda: ChunkedLogProbFunction.apply(*arguments))


BOTH_WAYS = [floor, ours, two_pass, eager] + [trl, cut_cross_entropy, liger] * CUDA
FORWARD = [forward_floor, forward_ours] + [forward_trl] * CUDA


def milliseconds(step: Step, budget_s: float = 0.8) -> float:
    """Median time of a call, after a warm-up; on a GPU between events, with calls queued ahead."""
    step()
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    repeats = max(3, min(50, int(budget_s / (time.perf_counter() - start))))
    if not CUDA:
        return statistics.median(_wall(step) for _ in range(repeats))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in events:
        before.record()
        step()
        after.record()
    synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def _wall(step: Step) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def extra_gib(case: Case, step: Step) -> float:
    """Peak memory over the inputs and the gradients themselves."""
    case.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    gradients = sum(x.grad.nbytes for x in (case.hidden_NH, case.weight_VH) if x.grad is not None)
    case.clear()
    return (torch.cuda.max_memory_allocated() - before - gradients) / 2**30


def print_table(shape: tuple[int, int, int], candidates: list[Callable[[Case], Step]]) -> None:
    case, base = make_case(*shape), None
    for candidate in candidates:
        try:
            step = candidate(case)
            took = milliseconds(step)
            memory = extra_gib(case, step) if CUDA else float("nan")
        except (ImportError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
            print(f"{shape!s:24} {candidate.__name__:18} {type(error).__name__}: {str(error)[:90]}", flush=True)
            continue
        base = base or took
        print(f"{shape!s:24} {candidate.__name__:18} {took:9.2f} ms {took / base:6.3f} x {memory:7.2f} GiB", flush=True)
        del step


def advantage_steps() -> dict[str, Step]:
    rewards_R = torch.rand(65_536, device=DEVICE)
    ids_R = torch.arange(65_536, device=DEVICE) // 16
    return {mode: partial(group_advantages, rewards_R, ids_R, mode) for mode in ("grpo", "dr_grpo", "rloo")}


def empty_launch() -> Step:
    """A kernel that does nothing, launched as ours are."""
    import triton

    @triton.jit
    def nothing(pointer):  # type: ignore[no-untyped-def]  # Triton cannot read an annotation here
        pass

    one = torch.zeros(1, device=DEVICE)
    return lambda: nothing[(1,)](one)


def graph_microseconds(step: Step) -> float:
    """Device time of one launch, in a replayed graph of 200."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(200):
            step()
    return 1e3 * milliseconds(graph.replay, 0.1) / 200


def queue_microseconds(step: Step) -> float:
    """Wall time of one call from Python, 50 in a row: the median of 20 times, since the host has other work too."""

    def calls() -> None:
        for _ in range(50):
            step()

    step()
    return 1e6 * statistics.median(timed(calls)[1] for _ in range(20)) / 50


def print_advantages() -> None:
    steps = {"empty kernel": empty_launch()} if CUDA else {}
    for name, step in {**steps, **advantage_steps()}.items():
        device = f"{graph_microseconds(step):7.2f} us on the device," if CUDA else ""
        print(f"65,536 advantages {name:14} {device} {queue_microseconds(step):8.2f} us from Python", flush=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("candidate", BOTH_WAYS + FORWARD, ids=lambda f: f.__name__)
def test_loss_head(benchmark: Any, candidate: Callable[[Case], Step], shape: tuple[int, int, int]) -> None:
    step = candidate(make_case(*shape))

    def once() -> None:
        step()
        synchronize()

    benchmark.group = f"{shape} {'forward' if candidate in FORWARD else 'forward and backward'}"
    benchmark.pedantic(once, rounds=5, warmup_rounds=2)


@pytest.mark.parametrize("mode", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages(benchmark: Any, mode: str) -> None:
    step = advantage_steps()[mode]

    def once() -> None:
        step()
        synchronize()

    benchmark(once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without", default="", help="comma-separated candidates to leave out")
    arguments = parser.parse_args()
    left_out = arguments.without.split(",")
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{name}, torch {torch.__version__}, {DTYPE}; ratio to the first line of each block", flush=True)
    for shape in SHAPES:
        print_table(shape, [c for c in BOTH_WAYS if c.__name__ not in left_out])
        print_table(shape, [c for c in FORWARD if c.__name__ not in left_out])
    if CUDA:
        case = make_case(65_536, 4096, 151_936)
        print(f"N=65536 H=4096: ours needs {extra_gib(case, ours(case)):.2f} GiB over inputs and gradients", flush=True)
    print_advantages()


if __name__ == "__main__":
    main()
