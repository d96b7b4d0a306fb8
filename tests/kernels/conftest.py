"""The same tests run on the torch path (a CPU), under Triton's interpreter (test_interpreter.py) and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.random_heads import INTERPRETED


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one and the interpreter is off."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
