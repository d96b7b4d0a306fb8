"""What is chosen of the engine: always, and by a configuration on this machine."""

from __future__ import annotations

import torch

from fastgrpo.config import Config
from fastgrpo.errors import UserError

# Tokens that one step of vLLM takes at most. By its own default, 2,048, the prompts of 512 sequences took 37 steps of
# 14 to 25 ms on an H200, bound by their launches; vLLM's server has as many as here.
STEP_TOKENS = 8192


def own_process(config: Config) -> bool:
    """Whether vLLM gets a process of its own: not where ranks hold it together, who step in turn."""
    if config.engine.process == "auto":
        return torch.cuda.is_available() and config.engine.tensor_parallel == 1
    return config.engine.process == "own"


def check_kv_cache(config: Config) -> None:
    """Raise UserError where vLLM has no KV cache in `engine.kv_cache_dtype` on this machine's CPU."""
    if config.engine.kv_cache_dtype == "auto" or torch.cuda.is_available():
        return
    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        raise UserError("engine.kv_cache_dtype fp8 needs a GPU, or a CPU with AVX-512: set it to auto")
