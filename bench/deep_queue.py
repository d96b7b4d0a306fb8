"""vLLM with a step more in flight; imported in its scheduler's process, and in its worker's as `Worker`.

With two the host has the time of one decoding step to read a step's tokens, schedule and launch the next but one.
"""

from vllm.config import VllmConfig

from fastgrpo.engine.worker import Worker

__all__ = ["Worker"]

_own = VllmConfig.max_concurrent_batches.fget  # type: ignore[attr-defined]


def _one_more(config: VllmConfig) -> int:
    batches = _own(config)
    return batches + 1 if batches > 1 else batches


VllmConfig.max_concurrent_batches = property(_one_more)  # type: ignore[assignment, method-assign]
