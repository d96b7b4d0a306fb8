"""What a result is measured on, in the words that stand over its table."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """The processor's name as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def cores() -> str:
    """How many cores, and whose."""
    return f"{os.cpu_count()} cores ({cpu_model()})"


def shared_machine(load_before: float) -> str:
    """The machine of a benchmark of jails, and how far its absolute figures are to be believed."""
    return (
        f"{cores()}, Linux {platform.release()}, Python {platform.python_version()}; load average {load_before:.1f} at "
        "the start. Above 1, other work shared the machine, and every absolute figure is worse for it."
    )
