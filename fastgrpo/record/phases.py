"""Where a step's seconds go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Seconds of the step by phase. A phase inside another stops the outer one's clock, so shares add up to 1."""

    def __init__(self) -> None:
        self._stack = ["other"]
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def _settle(self) -> None:
        now = time.perf_counter()
        self._seconds[self._stack[-1]] = self._seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the body's time as `name`. For the one sequential line of a program, not for overlapping tasks."""
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    @property
    def current(self) -> str:
        """The innermost phase running."""
        return self._stack[-1]

    def spent(self, name: str) -> float:
        """Seconds of the phase `name` since the last `take`."""
        self._settle()
        return self._seconds.get(name, 0.0)

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, "other" what was in none."""
        self._settle()
        seconds, self._seconds = self._seconds, {}
        return seconds
