"""Where a test cannot run: what each needs, and why it is skipped elsewhere."""

from __future__ import annotations

import pytest
import torch

exact = pytest.mark.skipif(
    torch.cuda.is_available(), reason="holds vLLM to the trainer's float32 logprobs, which a GPU's bfloat16 loses"
)
two_gpus_or_none = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs")
