"""vLLM's own attention in its worker's process, which imports this as `Worker` in place of the project's."""

from fastgrpo.engine import shared_prefix

shared_prefix.KNOWN_ATTENTION = ""

from fastgrpo.engine.worker import Worker  # noqa: E402

__all__ = ["Worker"]
