"""What vLLM imports in its worker's process, where that is one of its own, before it loads the model."""

from fastgrpo.engine.vllm_patches import patched_worker

# As long as the process lives.
_patched = patched_worker()
_patched.__enter__()


class Worker:
    """vLLM adds it to its worker's bases (`worker_extension_cls`): all it is for is that vLLM imports this file."""
