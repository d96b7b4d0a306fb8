"""What a user sees when something is wrong: one sentence, never a traceback."""

from __future__ import annotations

import os
import sys

USER_ERROR = 2


class UserError(Exception):
    """What ends a run and a user can mend (configuration, model folder, endpoint, disk, a lost rank): one sentence
    naming the culprit and the fix."""


def say_error(sentence: str) -> None:
    """Print an error, with the rank that it came from under torchrun."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"error: {rank}{sentence}", file=sys.stderr, flush=True)
