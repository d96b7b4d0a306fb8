"""group_advantages against a loop over groups in fp64."""

from __future__ import annotations

import math
import statistics
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.training.advantage import MODES, STD_EPSILON, group_advantages
from tests.helpers.random_heads import INTERPRETED


def by_hand(groups: list[list[float]], mode: str) -> list[float]:
    advantages: list[float] = []
    for group in groups:
        valid = [r for r in group if not math.isnan(r)]
        flat = len(valid) < 2 or min(valid) == max(valid)
        mean = 0.0 if flat else statistics.fmean(valid)
        scale = {
            "grpo": lambda v=valid: 1 / (statistics.stdev(v) + STD_EPSILON),
            "dr_grpo": lambda: 1.0,
            "rloo": lambda v=valid: len(v) / (len(v) - 1),
        }[mode]
        advantages += [0.0 if flat or math.isnan(r) else (r - mean) * scale() for r in group]
    return advantages


def run(groups: list[list[float]], mode: str, device: torch.device) -> torch.Tensor:
    rewards_R = torch.tensor([r for group in groups for r in group], dtype=torch.float32, device=device)
    ids_R = torch.tensor([10 * i for i, group in enumerate(groups) for _ in group], device=device, dtype=torch.int64)
    return group_advantages(rewards_R, ids_R, mode)


reward = st.one_of(st.sampled_from([0.0, 1.0, -0.5, math.nan]), st.floats(-10, 10, width=32))


@settings(max_examples=8 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(groups=st.lists(st.lists(reward, min_size=1, max_size=9), max_size=12), mode=st.sampled_from(MODES))
def test_ragged_groups(groups, mode):
    device = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
    found = run(groups, mode, device).double().cpu()
    # A spread near fp32's rounding of the mean makes grpo's quotient as uncertain as the spread itself.
    valid = [[r for r in g if not math.isnan(r)] for g in groups]
    ill = {i for i, g in enumerate(valid) if len(g) > 1 and 0 < max(g) - min(g) < 1e-3}
    keep = torch.tensor([i not in ill for i, g in enumerate(groups) for _ in g], dtype=torch.bool)
    expected = torch.tensor(by_hand(groups, mode), dtype=torch.float64)
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-3, rtol=1e-3)
    assert found.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_infrastructure_failure_leaves_the_others_alone(mode, device):
    with_failure = run([[1.0, math.nan, 0.0, 0.0]], mode, device)
    without = run([[1.0, 0.0, 0.0]], mode, device)
    assert with_failure[1] == 0
    torch.testing.assert_close(with_failure[[0, 2, 3]], without)
    assert (run([[math.nan, math.nan]], mode, device) == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, -7.7])
def test_no_variance_is_exactly_zero(value, mode, device):
    assert (run([[value] * 7, [value]], mode, device) == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_groups_longer_than_a_block(mode, device):
    lengths = [1, 90, 3, 40] if INTERPRETED else [1, 300, 3, 70, 16, 1100]
    groups = [torch.rand(n).tolist() for n in lengths]
    found = run(groups, mode, device).double().cpu()
    torch.testing.assert_close(found, torch.tensor(by_hand(groups, mode), dtype=torch.float64), atol=1e-4, rtol=1e-4)


def test_a_group_is_a_run_of_neighbours(device):
    rewards_R = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    found = group_advantages(rewards_R, torch.tensor([7, 7, 2, 7], device=device, dtype=torch.int32), "dr_grpo")
    assert found.tolist() == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "ppo"}, "mode: expected 'grpo', 'dr_grpo' or 'rloo', got 'ppo'"),
        ({"rewards_R": [1.0, 0.0, 0.0]}, "rewards_R: expected a tensor, got list"),
        ({"rewards_R": torch.ones(2, 2)}, "rewards_R: expected 1 dimension"),
        ({"rewards_R": torch.ones(3).double()}, "rewards_R: expected float32, got torch.float64"),
        ({"group_ids_R": torch.ones(2, dtype=torch.int64)}, r"group_ids_R: expected shape \[3\], got \(2,\)"),
        ({"group_ids_R": torch.ones(3)}, "group_ids_R: expected int32 or int64, got torch.float32"),
    ],
    ids=str,
)
def test_wrong_arguments(change, message):
    good = {"rewards_R": torch.ones(3), "group_ids_R": torch.zeros(3, dtype=torch.int64), "mode": "grpo"}
    with pytest.raises(ValueError, match=message):
        group_advantages(**{**good, **change})


@pytest.mark.parametrize("mode", MODES)
def test_slices_of_any_alignment_and_length(mode, device):
    """A GPU's kernel is compiled once for all of them."""
    rewards_R, ids_R = torch.rand(51, device=device), torch.arange(51, device=device) // 4
    for start in (0, 1, 2, 50):
        found = group_advantages(rewards_R[start:], ids_R[start:], mode)
        torch.testing.assert_close(found, group_advantages(rewards_R[start:].clone(), ids_R[start:].clone(), mode))
        assert found[-1] == 0 if start == 50 else found.abs().max() > 0


class OnSecondGpu(torch.Tensor):
    """A tensor of this machine that says it is elsewhere."""

    def get_device(self) -> int:
        return 1


@pytest.mark.parametrize("interpreted", [False, True])
def test_the_kept_kernel_is_that_of_the_tensors_gpu(monkeypatch, interpreted):
    """Whichever is current; the interpreter keeps none."""
    advantage_triton = pytest.importorskip("fastgrpo.kernels.advantage_triton")
    current, launched = [0], []

    @contextmanager
    def device(number):
        current.append(number)
        yield
        current.pop()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments: launched.append((self.name, grid, arguments[-2:], current[-1]))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    kept = None if interpreted else Kernel("kept")
    monkeypatch.setattr(advantage_triton, "_compiled", lambda number, *_: (launched.append(number), kept)[1])
    monkeypatch.setattr(advantage_triton, "_advantage_kernel", Kernel("Triton's own"))
    rewards_R, ids_R = torch.rand(40).as_subclass(OnSecondGpu), torch.zeros(40, dtype=torch.int64)
    advantage_triton.group_advantages(rewards_R, ids_R, "rloo")
    assert launched == [1, ("Triton's own" if interpreted else "kept", (2, 1, 1), (40, "rloo"), 1)]
    assert current == [0]
