"""A class of the tests over one of the solution's: made where its objects live, with methods that ask back.

The tests' side tells its class as a list of [name, kind, value, late]; the solution's side makes it. What a base of the
tests' own defines is told as if the class did; `late` is that of a base behind the solution's.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .known import library_place

UNTOLD = ("__module__", "__qualname__", "__classcell__", "__dict__", "__weakref__", "__annotations__", "__del__")
Told = list[list[Any]]


def told(bases: Sequence[type], space: Mapping[str, Any], is_mirror: Callable[[type], bool]) -> Told:
    """What the class statement `class ...(*bases): space` defines on this side."""
    first = next(number for number, each in enumerate(bases) if is_mirror(each))
    found: dict[str, list[Any]] = {}
    for number, base in reversed(list(enumerate(bases))):
        own = [] if is_mirror(base) else [each for each in base.__mro__ if each is not object and not library_place(each)]
        for each in reversed(own):
            found |= _entries(vars(each), late=number > first)
    return list((found | _entries(space, late=False)).values())


def _entries(space: Mapping[str, Any], late: bool) -> dict[str, list[Any]]:
    kept = {name: value for name, value in space.items() if name not in UNTOLD}
    plain = {name: value for name, value in kept.items() if not isinstance(value, types.ModuleType)}
    return {name: [name, *_taken_apart(value), late] for name, value in plain.items()}


def _taken_apart(value: Any) -> tuple[str, Any]:
    if isinstance(value, types.FunctionType):
        return "function", [value, getattr(value, "__isabstractmethod__", False)]
    if isinstance(value, staticmethod | classmethod):
        return type(value).__name__, value.__func__
    if isinstance(value, property):
        return "property", [value.fget, value.fset, value.fdel]
    return "value", value


def derive(name: str, bases: Sequence[type], named: Mapping[str, Any], entries: Told) -> type:
    """The class that was told. Raises what making it raises."""

    def fill(space: dict[str, Any]) -> None:
        for own, kind, value, late in entries:
            if not (late and any(hasattr(base, own) for base in bases)):
                space[own] = _put_together(own, kind, value)

    return types.new_class(name, tuple(bases), dict(named), fill)


def _put_together(name: str, kind: str, value: Any) -> Any:
    match kind:
        case "function":
            made = method(value[0], name)
            if value[1]:
                made.__isabstractmethod__ = True  # type: ignore[attr-defined]
            return made
        case "staticmethod":
            return staticmethod(method(value, name))
        case "classmethod":
            return classmethod(method(value, name))
        case "property":
            return property(*(each and method(each, name) for each in value))
    return value


def method(lent: Any, name: str) -> types.FunctionType:
    """A function, which binds to an object as what was lent does not."""

    def ask(*args: Any, **named: Any) -> Any:
        return lent(*args, **named)

    ask.__name__ = ask.__qualname__ = name
    return ask


def inherited(made: type) -> list[str]:
    """Names that `super()` may find beyond the operators."""
    return sorted(name for base in made.__bases__ for name in dir(base) if isinstance(name, str))
