"""What callers of the pools give, looked at before anything starts: another type is a ValueError of one sentence.

And what of it nobody else is to read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# The user and the password in an address.
LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")


def without_login(text: str) -> str:
    """`text` with its addresses less the user and the password in them."""
    return LOGIN.sub("", text)


def require_text(what: str, value: Any) -> None:
    """Raises ValueError where `value` is no str."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text (str), got {type(value).__name__}")


def require_texts(what: str, values: Any) -> None:
    """Raises ValueError where `values` is no list or tuple of texts: a single text is a sequence of letters."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"{what} must be a list of texts, got {type(values).__name__}")
    for number, value in enumerate(values):
        if not isinstance(value, str):  # there may be many
            require_text(f"{what}[{number}]", value)


def require_whole(what: str, value: Any, least: int) -> None:
    """Raises ValueError where `value` is no whole number from `least` on."""
    if type(value) is not int or value < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {value!r}")


def require_kind(what: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Raises ValueError where `value` is neither None nor of one of `kinds`."""
    if value is not None and not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{what} must be {names}, got {type(value).__name__}")


def require_files(files: Any) -> None:
    """Raises ValueError where `files` is no mapping of paths to their content."""
    require_kind("files", files, (Mapping,))
    for path, content in (files or {}).items():
        require_text("a path in files", path)
        if not isinstance(content, str | bytes):
            raise ValueError(f"files[{path!r}] must be text or bytes, got {type(content).__name__}")


def require_cases(cases: Any) -> None:
    """Raises ValueError where `cases` is no list of (stdin, expected stdout)."""
    if not isinstance(cases, list | tuple):
        raise ValueError(f"StdioTests.cases must be a list of (stdin, stdout), got {type(cases).__name__}")
    for number, case in enumerate(cases):
        pair: Sequence[Any] = case if isinstance(case, list | tuple) else ()
        if len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise ValueError(f"StdioTests.cases[{number}] must be two texts (stdin, stdout), got {case!r:.60}")
