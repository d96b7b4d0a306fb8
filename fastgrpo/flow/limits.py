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
    """Bounds of one workflow. `calls`: worker requests and public-test runs; `at_once`: workflows that run at once.

    `session` are the jail's limits (60 s, arXiv 2504.15257). Its `wall_s` counts what the workflow does itself, the
    seconds of the answers it gets and of the tests it runs; neither the wait for a turn at a busy worker or jail, nor a
    failed attempt. `call_s` is the deadline of one attempt at a worker request from its own start, `wait_s` of all
    waiting of one workflow: beyond them the failure is ours. `text_chars` bounds each text that a workflow sends or
    returns; `tests` are the limits of one run of the solution against its tests; None = the pool's own.
    """

    calls: int = 24
    call_s: float = 90.0
    wait_s: float = 600.0
    at_once: int = 64
    text_chars: int = 100_000
    session: Limits = Limits(wall_s=60.0, cpu_s=5.0, memory_mb=256)
    tests: Limits | None = None

    @property
    def jail(self) -> Limits:
        """The limits that the jail itself holds: the host's clock stands still where the jail's does not."""
        return msgspec.structs.replace(self.session, wall_s=self.session.wall_s + self.wait_s)
