"""The Triton kernels on a CPU: the same tests in a process of its own, as Triton must be told before its import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.random_heads import INTERPRETED

HERE = Path(__file__).parent
WALK_ONLY = ("normaliser", "nothing", "micro", "tied", "frozen", "dropped")  # test the walk, not the kernels


@pytest.mark.timeout(600)
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreting process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested on the GPU")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    names = (
        "test_head.py",
        "test_forward.py",
        "test_advantage.py",
        "test_layer.py",
        "test_sampling.py",
        "test_decoding.py",
        "test_delta_rule.py",
        "test_convolution.py",
        "test_mamba2.py",
    )
    files = [str(HERE / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", " and ".join(f"not {name}" for name in WALK_ONLY)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    options = {"cwd": HERE.parents[1], "capture_output": True, "text": True, "timeout": 540}
    done = subprocess.run(command, env=environment, check=False, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
