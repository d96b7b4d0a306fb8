"""Python source into a syntax tree, also beside other threads on CPython before 3.11.8."""

from __future__ import annotations

import ast

ATTEMPTS = 10


def parse(source: str) -> ast.Module:
    """`ast.parse(source)`, with its errors.

    CPython 3.11 before 3.11.8 counts the recursion of all trees under construction in one place (gh-106905): another
    thread, or a collection of garbage, in the middle of one makes it a SystemError, which says nothing of the source.
    """
    for _ in range(ATTEMPTS):
        try:
            return ast.parse(source)
        except SystemError:
            continue
    return ast.parse(source)
