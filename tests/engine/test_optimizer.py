from __future__ import annotations

import math
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn

from fastgrpo import optimizer as optimizer_module
from fastgrpo.distributed import RankError
from fastgrpo.optimizer import AdamW

OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.9), "weight_decay": 0.1, "max_grad_norm": 0.5}
STEPS, MICRO_BATCHES = 4, 4


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Odd sizes: 7 and 13 do not divide by two ranks."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 4)).to(dtype)


def micro_batch(step: int, index: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(100 * step + index)).to(dtype)


def backward(model: nn.Module, step: int, indices: range) -> None:
    dtype = next(model.parameters()).dtype
    for index in indices:
        (model(micro_batch(step, index, dtype)).float().square().sum() / MICRO_BATCHES).backward()


def reference(steps: int = STEPS) -> tuple[list[torch.Tensor], list[float]]:
    """torch's own AdamW with its own clipping, unsharded."""
    model = make_model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIONS["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIONS["lr"], betas=OPTIONS["betas"])
    norms = []
    for step in range(steps):
        adam.zero_grad()
        backward(model, step, range(MICRO_BATCHES))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), OPTIONS["max_grad_norm"])))
        adam.step()
    return [p.detach() for p in model.parameters()], norms


def train(model: nn.Module, optimizer: AdamW, steps: range, share: range) -> list[float]:
    norms = []
    for step in steps:
        backward(model, step, share)
        norms.append(optimizer.step().grad_norm)
    return norms


def test_one_rank_is_torchs_adamw() -> None:
    expected, norms = reference()
    model = make_model()
    assert train(model, AdamW(model.parameters(), **OPTIONS), range(STEPS), range(MICRO_BATCHES)) == pytest.approx(
        norms, rel=1e-5
    )
    assert max(norms) > OPTIONS["max_grad_norm"], "the test must clip"
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, atol=1e-6, rtol=1e-6)


def test_bf16_parameters_follow_an_fp32_master() -> None:
    """Steps far below bf16's resolution must add up."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    start = model.weight.detach().float()
    optimizer = AdamW(model.parameters(), lr=1e-5)
    for _ in range(200):
        model.weight.sum().backward()
        optimizer.step()
    moved = start - model.weight.detach().float()
    torch.testing.assert_close(moved.mean(), torch.tensor(200 * 1e-5), atol=2e-4, rtol=0)


def test_resume_continues_to_the_same_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        straight = make_model(dtype)
        train(straight, AdamW(straight.parameters(), **OPTIONS), range(4), range(2))
        first = make_model(dtype)
        optimizer = AdamW(first.parameters(), **OPTIONS)
        train(first, optimizer, range(2), range(2))
        state, weights = optimizer.state_dict(), first.state_dict()
        second = make_model(dtype)
        second.load_state_dict(weights)
        resumed = AdamW(second.parameters(), **OPTIONS)
        resumed.load_state_dict(state)
        train(second, resumed, range(2, 4), range(2))
        for ours, theirs in zip(second.parameters(), straight.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_a_bad_gradient_is_skipped_and_forgotten(bad: float) -> None:
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamW(model.parameters(), **OPTIONS, skip_grad_norm=1e6)
    (model(micro_batch(0, 0, torch.float32)).sum() * bad).backward()
    report = optimizer.step()
    assert report.skipped
    assert not report.grad_norm <= 1e6
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    backward(model, 0, range(1))
    assert not optimizer.step().skipped
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_moved_parameters_are_still_the_ones_updated() -> None:
    """A weight sync turns parameters into views of other memory after the optimizer was made."""
    expected, _ = reference()
    model = make_model()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    memory = [torch.zeros(2 * p.numel()) for p in model.parameters()]
    for parameter, target in zip(model.parameters(), memory, strict=True):
        view = target[: parameter.numel()].view(parameter.shape)
        parameter.data = view.copy_(parameter.detach())
    train(model, optimizer, range(STEPS), range(MICRO_BATCHES))
    for target, value in zip(memory, expected, strict=True):
        torch.testing.assert_close(target[: value.numel()].view(value.shape), value, atol=1e-6, rtol=1e-6)


def test_a_new_optimizer_takes_over_the_gradients() -> None:
    expected, _ = reference()
    model = make_model()
    AdamW(model.parameters(), **OPTIONS)
    train(model, AdamW(model.parameters(), **OPTIONS), range(STEPS), range(MICRO_BATCHES))
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, atol=1e-6, rtol=1e-6)


def join(rank: int, folder: str, timeout_s: float) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=timeout_s)
    )


def rank_main(rank: int, folder: str, dtype: torch.dtype) -> None:
    # Many small buckets, so that several are in flight.
    optimizer_module.BUCKET_ELEMENTS = 40
    join(rank, folder, 60)
    model = make_model(dtype)
    optimizer = AdamW(model.parameters(), **OPTIONS)
    half = MICRO_BATCHES // 2
    norms = train(model, optimizer, range(STEPS - 1), range(rank * half, rank * half + half))
    state = optimizer.state_dict()
    halfway = [p.detach().clone() for p in model.parameters()]
    norms += train(model, optimizer, range(STEPS - 1, STEPS), range(rank * half, rank * half + half))
    weights = [p.detach() for p in model.parameters()]
    torch.save({"weights": weights, "norms": norms, "state": state, "halfway": halfway}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def two_ranks(dtype: torch.dtype) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_main, args=(folder, dtype), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_are_one_and_resume_on_one() -> None:
    expected, norms = reference()
    ranks = two_ranks(torch.float32)
    for rank in ranks:
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)
        for ours, theirs in zip(rank["weights"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert ranks[1]["state"] == {}
    model = make_model()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), ranks[0]["halfway"], strict=True):
            parameter.copy_(value)
    resumed = AdamW(model.parameters(), **OPTIONS)
    resumed.load_state_dict(ranks[0]["state"])
    train(model, resumed, range(STEPS - 1, STEPS), range(MICRO_BATCHES))
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, atol=1e-6, rtol=1e-6)


def stalled_rank_main(rank: int, folder: str) -> None:
    join(rank, folder, 3)
    model = make_model()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    if rank == 1:
        time.sleep(8)
        os._exit(0)
    backward(model, 0, range(1))
    start = time.monotonic()
    with pytest.raises(RankError, match="waited for the gradients of the other ranks"):
        optimizer.step()
    assert time.monotonic() - start < 7
    os._exit(0)


def test_a_rank_that_stalls_is_named_within_the_deadline(tmp_path: Path) -> None:
    multiprocessing.spawn(stalled_rank_main, args=(str(tmp_path),), nprocs=2)
