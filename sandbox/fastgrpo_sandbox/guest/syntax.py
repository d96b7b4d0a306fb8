"""Someone else's Python into a syntax tree."""

from __future__ import annotations

import ast
import warnings

ATTEMPTS = 10


def parse(source: str) -> ast.Module:
    """`ast.parse(source)` with its errors and without its warnings, also beside other threads.

    CPython 3.11 before 3.11.8 counts the recursion of all trees under construction in one place (gh-106905): another
    thread, or a collection of garbage, in the middle of one makes it a SystemError, which says nothing of the source.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(ATTEMPTS):
            try:
                return ast.parse(source)
            except SystemError:
                continue
        return ast.parse(source)
