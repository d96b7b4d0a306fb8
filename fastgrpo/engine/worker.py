"""What vLLM imports in its worker's process, where that is one of its own, before it loads the model."""

from fastgrpo.engine.vllm_patches import worker_adjusted

# As long as the process lives.
_adjusted = worker_adjusted()
_adjusted.__enter__()


class Worker:
    """The worker's further base (`worker_extension_cls`): importing it is all it is for."""
