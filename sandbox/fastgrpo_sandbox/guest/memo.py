"""Answers that were found once, by the texts that they were asked for, in a bounded number of bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import msgspec

MOST_BYTES = 128 << 20  # of all texts and answers: one problem's tests judge many solutions, one after another
MISSING = object()
F = TypeVar("F", bound=Callable[..., Any])


class _Kept:
    """Two generations, of which the elder is let go once the younger has half of the bytes: what is asked for again
    moves into the younger. No lock, which a fork could leave taken: each step is one of a dict's own."""

    def __init__(self) -> None:
        self.young: dict[tuple[Any, ...], Any] = {}
        self.old: dict[tuple[Any, ...], Any] = {}
        self.held = 0  # bytes of the younger

    def get(self, key: tuple[Any, ...]) -> Any:
        answer = self.young.get(key, MISSING)
        if answer is MISSING and (answer := self.old.get(key, MISSING)) is not MISSING:
            self.add(key, answer)
        return answer

    def add(self, key: tuple[Any, ...], answer: Any) -> None:
        size = bytes_of(key) + bytes_of(answer)
        if size > MOST_BYTES // 2:
            return
        if self.held + size > MOST_BYTES // 2:
            self.old, self.young, self.held = self.young, {}, 0
        self.young[key] = answer
        self.held += size


_kept = _Kept()


def memo(function: F) -> F:
    """A pure function whose answers are kept, those asked for last, in at most MOST_BYTES together with those of all
    others. Its arguments are texts and frozen structs, given by place; its answers nobody changes."""

    @wraps(function)
    def ask(*given: Any) -> Any:
        key = (function, *given)
        answer = _kept.get(key)
        if answer is MISSING:
            answer = function(*given)
            _kept.add(key, answer)
        return answer

    return ask  # type: ignore[return-value]


def known(asked: Callable[..., Any], *given: Any) -> Any:
    """What a function under `memo` would answer, if that is known, else MISSING."""
    return _kept.get((asked.__wrapped__, *given))  # type: ignore[attr-defined]


def learn(answer: Any, asked: Callable[..., Any], *given: Any) -> None:
    """Keeps what a function under `memo` answered in another process."""
    _kept.add((asked.__wrapped__, *given), answer)  # type: ignore[attr-defined]


def bytes_of(value: Any) -> int:
    """Bytes of a value made of texts, numbers, tuples, frozensets and structs."""
    parts = msgspec.structs.astuple(value) if isinstance(value, msgspec.Struct) else value
    inner = sum(map(bytes_of, parts)) if isinstance(parts, tuple | frozenset) else 0
    return sys.getsizeof(value) + inner
