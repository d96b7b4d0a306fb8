"""Where the policy is and in which type it computes."""

from __future__ import annotations

import torch

from fastgrpo.config import Config


def policy_device() -> torch.device:
    """This process's GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def policy_dtype(config: Config) -> torch.dtype:
    """The type of the weights, in vLLM and in the trainer alike."""
    if config.engine.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.engine.dtype)
