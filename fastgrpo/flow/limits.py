"""What one workflow may use."""

from __future__ import annotations

import msgspec

from fastgrpo.config import Sandbox
from fastgrpo_sandbox import Limits


def run_limits(sandbox: Sandbox) -> Limits:
    """What one run of a solution may use, as configured."""
    return Limits(
        wall_s=sandbox.wall_s,
        cpu_s=sandbox.cpu_s,
        memory_mb=sandbox.memory_mb,
        processes=sandbox.processes,
        output_bytes=sandbox.output_bytes,
    )


class WorkflowLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one workflow. `calls`: worker requests and public-test runs; `call_s`: deadline of one worker request.

    `call_s` must be below `session.wall_s`: a worker that hangs is then our failure, not the workflow's timeout.
    At most `at_once` workflows run at once, so that waiting for a busy worker is not charged to a workflow's wall time.
    `text_chars` bounds each text that a workflow sends or returns. `session` are the jail's limits (60 s, arXiv
    2504.15257), `tests` those of one run of the solution against its tests; None = the pool's own.
    """

    calls: int = 24
    call_s: float = 50.0
    at_once: int = 64
    text_chars: int = 100_000
    session: Limits = Limits(wall_s=60.0, cpu_s=5.0, memory_mb=256)
    tests: Limits | None = None
