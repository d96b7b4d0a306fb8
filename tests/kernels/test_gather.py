"""Gathered rows and the sums over their copies, beside torch's own indexing in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgrpo.kernels.gather import copies_of, gather_rows
from tests.helpers.random_heads import INTERPRETED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "index", "shape"), [
    (5, [0, 1, 0, 1, 2, 0, 1, 3], (2, 16)), (3, [2, 2, 2, 2, 0], (1, 7)), (4, [0, 1, 2, 3], (3, 400)), (1, [0], (1, 1)),
])  # fmt: skip
def test_gradients_are_sums_over_the_copies(device, dtype: torch.dtype, rows: int, index, shape) -> None:
    x = torch.randn(rows, *shape, dtype=torch.float64)
    weights = torch.randn(len(index), *shape).to(dtype)
    copies, first = (torch.from_numpy(part).int().to(device) for part in copies_of(np.array(index), rows))
    mine = x.to(device, dtype).requires_grad_()
    gathered = gather_rows(mine, torch.tensor(index, device=device), copies, first)
    assert torch.equal(gathered.cpu(), x.to(dtype)[index])
    gathered.backward(weights.to(device))
    true = torch.zeros_like(x).index_add_(0, torch.tensor(index), weights.double())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2 if INTERPRETED else 4e-3
    torch.testing.assert_close(mine.grad.cpu().double(), true, atol=tolerance, rtol=tolerance)
