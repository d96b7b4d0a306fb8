"""Every Triton kernel compiles for an H100, in a process of its own that has no interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.random_heads import INTERPRETED


@pytest.mark.timeout(300)
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreting process")
def test_kernels_compile_for_a_gpu_that_is_not_here():
    pytest.importorskip("triton")
    options = {"cwd": Path(__file__).parents[2], "capture_output": True, "text": True, "timeout": 280}
    command = [sys.executable, "-m", "tests.helpers.compile_kernels"]
    done = subprocess.run(command, env=dict(os.environ), check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
