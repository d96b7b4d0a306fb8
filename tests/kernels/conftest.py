"""The same tests run on the torch path (a CPU), under Triton's interpreter (test_interpreter.py) and on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.random_heads import INTERPRETED

if INTERPRETED:
    from triton import language
    from triton.runtime import interpreter

    # Once for all: Triton looks through its whole language at each call of a function, a third of these tests' time.
    interpreter._patch_lang(SimpleNamespace(__globals__={"language": language, "core": language.core}))
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one and the interpreter is off."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
