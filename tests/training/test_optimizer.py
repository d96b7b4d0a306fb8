from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from fastgrpo.ranks.collectives import RankError
from fastgrpo.training import optimizer as optimizer_module
from fastgrpo.training import slices as shards
from fastgrpo.training import tensor_files
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.training.tensor_files import save_parts
from tests.helpers.ranks import run_two_ranks

OPTIONS = AdamWOptions(lr=3e-2, betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=0.5)
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
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIONS.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIONS.lr, betas=OPTIONS.betas)
    norms = []
    for step in range(steps):
        adam.zero_grad()
        backward(model, step, range(MICRO_BATCHES))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.max_grad_norm)))
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
    assert train(model, AdamW(model.parameters(), OPTIONS), range(STEPS), range(MICRO_BATCHES)) == pytest.approx(
        norms, rel=1e-5
    )
    assert max(norms) > OPTIONS.max_grad_norm, "the test must clip"
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, atol=1e-6, rtol=1e-6)


def test_bf16_parameters_follow_an_fp32_master() -> None:
    """Steps far below bf16's resolution must add up."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    start = model.weight.detach().float()
    optimizer = AdamW(model.parameters(), AdamWOptions(lr=1e-5))
    for _ in range(200):
        model.weight.sum().backward()
        optimizer.step()
    moved = start - model.weight.detach().float()
    torch.testing.assert_close(moved.mean(), torch.tensor(200 * 1e-5), atol=2e-4, rtol=0)


def test_offloaded_state_takes_the_same_steps_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(optimizer_module, "PIECE_ELEMENTS", 32)
    for dtype in (torch.float32, torch.bfloat16):
        there, offloaded = make_model(dtype), make_model(dtype)
        optimizer = AdamW(offloaded.parameters(), OPTIONS, offload=True)
        norms = train(there, AdamW(there.parameters(), OPTIONS), range(4), range(2))
        assert norms[:2] == train(offloaded, optimizer, range(2), range(2))
        save_parts(optimizer.parts(), tmp_path / str(dtype))
        optimizer = AdamW(offloaded.parameters(), OPTIONS)
        optimizer.load(tmp_path / str(dtype))
        assert norms[2:] == train(offloaded, optimizer, range(2, 4), range(2))
        for ours, theirs in zip(offloaded.parameters(), there.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_resume_continues_to_the_same_numbers(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        straight = make_model(dtype)
        train(straight, AdamW(straight.parameters(), OPTIONS), range(4), range(2))
        first = make_model(dtype)
        optimizer = AdamW(first.parameters(), OPTIONS)
        train(first, optimizer, range(2), range(2))
        save_parts(optimizer.parts(), tmp_path / str(dtype))
        second = make_model(dtype)
        second.load_state_dict(first.state_dict())
        resumed = AdamW(second.parameters(), OPTIONS)
        resumed.load(tmp_path / str(dtype))
        train(second, resumed, range(2, 4), range(2))
        for ours, theirs in zip(second.parameters(), straight.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_a_bad_gradient_is_skipped_and_forgotten(bad: float) -> None:
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamW(model.parameters(), replace(OPTIONS, skip_grad_norm=1e6))
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
    optimizer = AdamW(model.parameters(), OPTIONS)
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
    AdamW(model.parameters(), OPTIONS)
    train(model, AdamW(model.parameters(), OPTIONS), range(STEPS), range(MICRO_BATCHES))
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, atol=1e-6, rtol=1e-6)


def join(rank: int, folder: str, timeout_s: float) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=timeout_s)
    )


def rank_main(rank: int, folder: str, resume: bool, whole: bool) -> None:
    """All steps on two ranks, with a checkpoint before the last one; or the last one alone, from the checkpoint.

    `whole`: whole gradients are summed on each.
    """
    # Many small buckets and files, so that several are in flight.
    shards.BUCKET_ELEMENTS = tensor_files.FILE_ELEMENTS = 40
    # Some parameters are gathered by themselves, some together.
    shards.SMALL_ELEMENTS = 40
    join(rank, folder, 60)
    model = make_model()
    optimizer = AdamW(model.parameters(), OPTIONS, whole_gradients=whole)
    half = range(rank * MICRO_BATCHES // 2, (rank + 1) * MICRO_BATCHES // 2)
    norms = []
    if resume:
        restore(model, optimizer, Path(folder))
    else:
        norms = train(model, optimizer, range(STEPS - 1), half)
        save_parts(optimizer.parts(), Path(folder) / "state")
        torch.save([p.detach() for p in model.parameters()], f"{folder}/weights.pt")
    norms += train(model, optimizer, range(STEPS - 1, STEPS), half)
    torch.save({"weights": [p.detach() for p in model.parameters()], "norms": norms}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def restore(model: nn.Module, optimizer: AdamW, folder: Path) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), torch.load(folder / "weights.pt"), strict=True):
            parameter.copy_(value)
    optimizer.load(folder / "state")


def two_ranks(folder: Path, *, resume: bool = False, whole: bool = False) -> list[dict[str, Any]]:
    (folder / "store").unlink(missing_ok=True)
    run_two_ranks(rank_main, str(folder), resume, whole)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.detach(), their, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_two_ranks_are_one_and_resume_on_one(tmp_path: Path, whole: bool) -> None:
    expected, norms = reference()
    for rank in two_ranks(tmp_path, whole=whole):
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)
        assert_same(rank["weights"], expected)
    shards = {path.name.split("-")[1] for path in (tmp_path / "state").iterdir()}
    assert shards == {"00001", "00002"}, "each rank writes its own"
    model = make_model()
    resumed = AdamW(model.parameters(), OPTIONS)
    restore(model, resumed, tmp_path)
    train(model, resumed, range(STEPS - 1, STEPS), range(MICRO_BATCHES))
    assert_same(model.parameters(), expected)


def test_one_rank_resumes_on_two(tmp_path: Path) -> None:
    expected, norms = reference()
    model = make_model()
    optimizer = AdamW(model.parameters(), OPTIONS)
    train(model, optimizer, range(STEPS - 1), range(MICRO_BATCHES))
    save_parts(optimizer.parts(), tmp_path / "state")
    torch.save([p.detach() for p in model.parameters()], tmp_path / "weights.pt")
    for rank in two_ranks(tmp_path, resume=True):
        assert rank["norms"] == pytest.approx(norms[-1:], rel=1e-5)
        assert_same(rank["weights"], expected)


def mixed_parameters() -> list[nn.Parameter]:
    """Two dtypes in turns: even sizes, which are gathered in place, odd ones, and one that rank 1 has nothing of."""
    sizes = ((48, torch.bfloat16), (36, torch.float32), (51, torch.bfloat16), (7, torch.float32), (96, torch.bfloat16))
    sizes += ((1, torch.float32), (42, torch.float32), (3, torch.bfloat16))
    return [nn.Parameter(torch.linspace(-1, 1, n + 1)[1:].to(dtype)) for n, dtype in sizes]


def mixed_steps(parameters: list[nn.Parameter], ranks: int) -> None:
    optimizer = AdamW(parameters, OPTIONS)
    for _ in range(3):
        (sum((parameter.float() - 0.3).square().sum() for parameter in parameters) / ranks).backward()
        optimizer.step()


def mixed_rank_main(rank: int, folder: str) -> None:
    shards.BUCKET_ELEMENTS, shards.SMALL_ELEMENTS = 40, 8
    join(rank, folder, 60)
    parameters = mixed_parameters()
    mixed_steps(parameters, ranks=2)
    torch.save([p.detach() for p in parameters], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_parameters_of_two_dtypes_come_together_unharmed(tmp_path: Path) -> None:
    expected = mixed_parameters()
    mixed_steps(expected, ranks=1)
    run_two_ranks(mixed_rank_main, str(tmp_path))
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt", weights_only=True), [p.detach() for p in expected])


def stalled_rank_main(rank: int, folder: str) -> None:
    join(rank, folder, 3)
    model = make_model()
    optimizer = AdamW(model.parameters(), OPTIONS)
    named = Path(folder) / "named"
    if rank == 1:
        deadline = time.monotonic() + 60
        while not named.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os._exit(0 if named.exists() else 1)
    backward(model, 0, range(1))
    with pytest.raises(RankError, match="waited for the gradients of the other ranks"):
        optimizer.step()
    named.touch()
    os._exit(0)


def test_a_rank_that_stalls_is_named_within_the_deadline(tmp_path: Path) -> None:
    run_two_ranks(stalled_rank_main, str(tmp_path))
