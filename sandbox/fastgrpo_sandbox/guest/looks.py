"""What tests look at beside values: the type of an object, its hints, and what `inspect` finds in it. Of what is the
other side's, that side is asked; its own word on all of them decides nothing that plain data is compared with."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable
from typing import Any

from .remote import ask, place_of, space_of

_hints = typing.get_type_hints
INSPECTED = ("getattr_static", "getsource", "getsourcelines", "getgeneratorstate", "getcoroutinestate")


def type_of(value: Any) -> Any:
    """`type(value)`, as tests mean it."""
    return type(value) if place_of(value) is None else value.__class__


def get_type_hints(obj: Any, globalns: Any = None, localns: Any = None, include_extras: bool = False) -> Any:
    """typing's, but of what is the other side's that side answers: an annotation may be text, and to look at it is to
    evaluate it."""
    if place_of(obj) is None:
        return _hints(obj, globalns, localns, include_extras)
    return ask(obj, "hints", "", include_extras)


class _Super:
    """`super(kind, value)` of a class of the other side."""

    def __init__(self, kind: Any, value: Any) -> None:
        self._kind, self._of = kind, value

    def __getattr__(self, name: str) -> Any:
        return ask(self._of, "super", name, self._kind)


def super_of(kind: Any, value: Any) -> Any:
    """`super(kind, value)`, asked of the other side, but for a class that the tests derived (inherit.py)."""
    is_theirs = place_of(kind) is not None and "__getattribute__" not in space_of(kind)
    return _Super(kind, value) if is_theirs else super(kind, value)


def patch_inspect() -> None:
    """Makes what `inspect` finds in the other side's objects that side's answer."""
    inspect = importlib.import_module("inspect")
    for name in INSPECTED:
        setattr(inspect, name, _asking(name, getattr(inspect, name)))


def _asking(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def look(value: Any, *args: Any) -> Any:
        return own(value, *args) if place_of(value) is None else ask(value, "inspect", name, *args)

    return look


def inspected(value: Any, name: str, args: list[Any]) -> Any:
    """What one of INSPECTED answers where the object lives."""
    return getattr(importlib.import_module("inspect"), name)(value, *args)
