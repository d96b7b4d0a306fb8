"""Tests that are skipped whatever the solution is: their conditions, asked before it can answer (skipping.py)."""

from __future__ import annotations

import marshal


class Skip(Exception):
    """Raised by the programs where a test is skipped."""


class Stop(BaseException):
    """Raised where what is behind is the run's to tell."""


def skipped(probes: tuple[tuple[int, bytes], ...]) -> set[int]:
    """The numbers of the tests that are skipped."""
    found = set()
    for number, code in probes:
        try:
            exec(marshal.loads(code), {"__name__": "tests", "__skip__": Skip, "__stop__": Stop})
        except Skip:
            found.add(number)
        except (Exception, Stop):
            continue  # the run tells
    return found
