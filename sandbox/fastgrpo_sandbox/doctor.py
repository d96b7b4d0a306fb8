"""What this machine lacks for running jails: `python -m fastgrpo_sandbox`."""

from __future__ import annotations

import asyncio

from fastgrpo_sandbox.pool import SandboxPool
from fastgrpo_sandbox.requirements import Check, checks, explain
from fastgrpo_sandbox.types import SandboxUnavailable

PROBE_DEADLINE_S = 60.0


async def probe() -> Check:
    """Starts one real jail, which prints and judges before its pool opens: the check that counts."""
    try:
        async with asyncio.timeout(PROBE_DEADLINE_S), SandboxPool(cells=1) as pool:
            held = (await pool.run("")).memory_by
            return Check("a real jail", True, f"started, ran jobs, ended; memory was held by {held}")
    except (SandboxUnavailable, TimeoutError, OSError) as error:
        return Check("a real jail", False, str(error) or "no answer", explain(str(error)))


def main() -> int:
    """Prints every check; returns 0 when jails work here."""
    found = [*checks(), asyncio.run(probe())]
    for check in found:
        print(f"{'ok  ' if check.fine else 'FAIL'} {check.name}: {check.found}")
        if not check.fine:
            print(f"     fix: {check.fix}")
    return 0 if all(check.fine for check in found) else 1
