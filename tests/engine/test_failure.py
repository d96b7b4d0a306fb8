"""When one rank fails all end soon, that rank's error comes first, and the last checkpoint is whole."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from fastgrpo.cli import parse
from fastgrpo.policy.loading import load_policy
from fastgrpo.training.checkpoint import Checkpoints, load
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from tests.helpers import failing_ranks
from tests.helpers.ranks import run_under_agent

ROOT = Path(__file__).parents[2]
# A killed rank says nothing itself: torchrun names it.
ERRORS = {
    "dies": "rank      : 1 ",
    "raises": "ZeroDivisionError: an update divides by zero",
    "hangs": "error: rank 1: generation hangs: a step of vLLM took over 3 s; raise engine.step_timeout_s if it may",
}


@pytest.mark.engine
@pytest.mark.parametrize("how", ERRORS)
def test_a_failing_rank_ends_all_of_them(how: str, tiny_folder: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    arguments = [how, str(tiny_folder), str(tmp_path)]
    if how != "hangs":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*torchrun, "--module", "tests.helpers.failing_ranks", *arguments]
        ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=240, check=False, cwd=ROOT)
        status, stderr = ended.returncode, ended.stderr
    else:
        # What torchrun starts, without the seconds in which each of three processes imports vLLM anew. It may name the
        # rank that waited where another was killed, so only for what a rank says itself.
        status, stderr = run_under_agent(failing_ranks.program, *arguments)
    assert status != 0
    seconds = time.time() - (tmp_path / "failed").stat().st_mtime
    print(f"{how}: all ranks ended within {seconds:.1f} s\n{stderr}")
    assert seconds < 120
    for rank in range(2):
        assert not psutil.pid_exists(int((tmp_path / f"rank{rank}.pid").read_text()))
    said = stderr.split("Root Cause")[1 if how == "dies" else 0]
    first = next(line for line in said.splitlines() if re.search(r"rank +: |error: |Error: ", line))
    assert ERRORS[how] in first
    if how == "hangs":
        assert "Traceback" not in said.split("torch/distributed/elastic")[0]
    checkpoint = Checkpoints(tmp_path / "failing/checkpoints").latest()
    assert checkpoint is not None
    config = parse(["--config", str(tmp_path / "failing/config.toml")], program="").config
    policy = load_policy(checkpoint)
    assert load(checkpoint, config, AdamW(policy.model.parameters(), AdamWOptions(lr=1.0)).load) >= 1
