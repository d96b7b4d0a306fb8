"""What tests look at beside values: the type of an object, and what `inspect` finds in it. Of what is the other side's,
that side is asked; its own word on both decides nothing that plain data is compared with."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from .remote import ask, place_of

INSPECTED = ("getattr_static", "getsource", "getsourcelines", "getgeneratorstate", "getcoroutinestate")


def type_of(value: Any) -> Any:
    """`type(value)`, as tests mean it."""
    return type(value) if place_of(value) is None else value.__class__


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
