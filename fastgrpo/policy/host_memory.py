"""How much of the host's memory is left for this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def host_memory_free() -> int:
    """Bytes that this process may still take: of those that the machine has and those that its cgroups allow it."""
    lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([machine, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """What each limit over this process leaves, of version 1 and 2; the page cache gives way."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without cgroups
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        root, limit, used, cached = CGROUPS, "memory.max", "memory.current", "inactive_file "
        if "memory" in controllers.split(","):
            root, cached = CGROUPS / "memory", "total_inactive_file "
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif controllers:
            continue
        own = root / name.lstrip("/")
        for folder in (own, *own.parents)[: len(own.relative_to(root).parts) + 1]:
            # A file that is not there, as at the root, and the limit `max` are no limit.
            with suppress(OSError, ValueError):
                allowed = int((folder / limit).read_text())
                statistics = (folder / "memory.stat").read_text().splitlines()
                reclaimed = sum(int(row.split()[1]) for row in statistics if row.startswith(cached))
                yield max(0, allowed - int((folder / used).read_text()) + reclaimed)
