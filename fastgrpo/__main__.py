"""`python -m fastgrpo`: which programs there are, in the first line of each; needs the standard library alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PROGRAMS = ("doctor", "train", "sft", "evaluate", "solve", "report", "experiments", "serve_worker")


def told() -> str:
    """A line for each program."""
    lines = ["usage: python -m fastgrpo.PROGRAM [--help]", ""]
    for name in PROGRAMS:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        lines.append(f"  {name:<13} {first}")
    return "\n".join([*lines, "", "`python -m fastgrpo_sandbox` says whether this machine can run jails."])


if __name__ == "__main__":
    print(told())
    sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
