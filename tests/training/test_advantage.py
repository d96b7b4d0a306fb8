"""group_advantages against a loop over groups in fp64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.training.advantage import MODES, STD_EPSILON, group_advantages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def run(groups: list[list[float]], mode: str) -> torch.Tensor:
    rewards_R = torch.tensor([r for group in groups for r in group], dtype=torch.float32, device=DEVICE)
    ids_R = torch.tensor([10 * i for i, group in enumerate(groups) for _ in group], device=DEVICE, dtype=torch.int64)
    return group_advantages(rewards_R, ids_R, mode)


reward = st.one_of(st.sampled_from([0.0, 1.0, -0.5, math.nan]), st.floats(-10, 10, width=32))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(groups=st.lists(st.lists(reward, min_size=1, max_size=9), max_size=12), mode=st.sampled_from(MODES))
def test_ragged_groups(groups, mode):
    found = run(groups, mode).double().cpu()
    # A spread near fp32's rounding of the mean makes grpo's quotient as uncertain as the spread itself.
    valid = [[r for r in g if not math.isnan(r)] for g in groups]
    ill = {i for i, g in enumerate(valid) if len(g) > 1 and 0 < max(g) - min(g) < 1e-3}
    keep = torch.tensor([i not in ill for i, g in enumerate(groups) for _ in g], dtype=torch.bool)
    expected = torch.tensor(by_hand(groups, mode), dtype=torch.float64)
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-3, rtol=1e-3)
    assert found.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_infrastructure_failure_leaves_the_others_alone(mode):
    with_failure = run([[1.0, math.nan, 0.0, 0.0]], mode)
    without = run([[1.0, 0.0, 0.0]], mode)
    assert with_failure[1] == 0
    torch.testing.assert_close(with_failure[[0, 2, 3]], without)
    assert (run([[math.nan, math.nan]], mode) == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, -7.7])
def test_no_variance_is_exactly_zero(value, mode):
    assert (run([[value] * 7, [value]], mode) == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_long_groups(mode):
    groups = [torch.rand(n).tolist() for n in (1, 300, 3, 70, 16, 1100)]
    found = run(groups, mode).double().cpu()
    torch.testing.assert_close(found, torch.tensor(by_hand(groups, mode), dtype=torch.float64), atol=1e-4, rtol=1e-4)


def test_a_group_is_a_run_of_neighbours():
    rewards_R = torch.tensor([1.0, 0.0, 1.0, 0.0], device=DEVICE)
    found = group_advantages(rewards_R, torch.tensor([7, 7, 2, 7], device=DEVICE, dtype=torch.int32), "dr_grpo")
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
