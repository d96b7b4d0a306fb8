"""The stand-in agrees with numpy itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastgrpo_sandbox import numpy_stand_in

VALUES = [0.0, 1.0, 1 + 1e-6, 1 + 1e-4, -1.0, math.inf, -math.inf, math.nan, 10**6, 1j, True]


@pytest.mark.parametrize("left", VALUES)
def test_numbers(left: complex) -> None:
    for right in VALUES:
        assert numpy_stand_in.isclose(left, right) == bool(np.isclose(left, right))
        assert numpy_stand_in.allclose(left, right, rtol=1e-7, atol=1e-6) == np.allclose(left, right, 1e-7, 1e-6)


def test_lists() -> None:
    for left, right in [([1.0, 2.0], (1.0, 2.0)), ([], []), ([1.0, 1.0], 1.0), ([[1.0], [2.0]], [[1.0], [2.5]])]:
        assert numpy_stand_in.allclose(left, right) == np.allclose(left, right)
        assert numpy_stand_in.shape(left) == np.shape(left)
    assert not numpy_stand_in.allclose([], 1.0)  # where numpy has nothing to compare
    assert not numpy_stand_in.allclose(1.0, [[], []])
    with pytest.raises(ValueError, match="broadcast"):
        numpy_stand_in.allclose([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(TypeError):
        numpy_stand_in.allclose("a", 1.0)


def test_ragged_lists_have_no_shape() -> None:
    for shape in (numpy_stand_in.shape, np.shape):
        with pytest.raises(ValueError, match="inhomogeneous"):
            shape([[1.0], [1.0, 2.0]])
