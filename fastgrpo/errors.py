"""What a user sees when something is wrong: one sentence and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """What ends a run and a user can mend (configuration, model folder, endpoint, disk, a lost rank): one sentence
    naming the culprit and the fix."""


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's `main` and exit: its own code (None = 0), 2 after `UserError`, 130 after Ctrl-C."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
