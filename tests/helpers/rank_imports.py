"""What the fork server of `ranks.py` imports, which takes seconds. One thread: a team does not survive a fork."""

from __future__ import annotations

import torch

import fastgrpo.train  # noqa: F401
from fastgrpo.engine.vllm_patches import patched_vllm

torch.set_num_threads(1)
with patched_vllm():
    import vllm.v1.engine.llm_engine  # noqa: F401
