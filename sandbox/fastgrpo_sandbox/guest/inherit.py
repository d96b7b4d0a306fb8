"""A class of the tests over one of the solution's: made where its objects live, with methods that ask back.

The tests' side tells its class as a list of [name, kind, value, late]; the solution's side makes it. What a base of the
tests' own defines is told as if the class did; `late` is that of a base behind the solution's.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .known import known_name, library_place
from .mirrors import FORWARDERS, Ask, forwarders
from .remote import Forwarder, Mirror, Remote, ask, place_of, space_of

UNTOLD = ("__module__", "__qualname__", "__classcell__", "__dict__", "__weakref__", "__del__")
ABOVE = ("__init__", "__new__", "__post_init__", "__setattr__", "__delattr__", "__getattr__")  # that super() may find
Told = list[list[Any]]


def theirs(bases: Sequence[type]) -> list[type]:
    """The bases that the other side has, too."""
    return [each for each in bases if place_of(each) or known_name(each)]


def told(bases: Sequence[type], space: Mapping[str, Any]) -> Told:
    """What the class statement `class ...(*bases): space` defines on this side."""
    first = next(number for number, each in enumerate(bases) if place_of(each))
    found: dict[str, list[Any]] = {}
    for number, base in reversed(list(enumerate(bases))):
        for each in reversed(() if place_of(base) else base.__mro__):
            if each is not object and not library_place(each):
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
                made.__isabstractmethod__ = True
            return made
        case "staticmethod":
            return staticmethod(method(value, name))
        case "classmethod":
            return classmethod(method(value, name))
        case "property":
            return property(*[each and method(each, name) for each in value])
    return value


def method(lent: Any, name: str) -> Any:
    """A function, which binds to an object as what was lent does not."""

    def ask(*args: Any, **named: Any) -> Any:
        return lent(*args, **named)

    ask.__name__ = ask.__qualname__ = name
    return ask


def inherited(made: type) -> list[str]:
    """Names that `super()` may find beyond the operators."""
    return sorted(name for base in made.__bases__ for name in dir(base) if isinstance(name, str))


class _Above(Forwarder):
    """An attribute as `super()` finds it."""

    def __init__(self, name: str, owner: list[Any]) -> None:
        super().__init__(name)
        self.name, self.owner = name, owner

    def __get__(self, value: Any, kind: Any = None) -> Any:
        return ask(kind if value is None else value, "super", self.name, self.owner[0])


def derived(made: Any, names: Iterable[str], bases: tuple[type, ...], space: dict[str, Any]) -> type:
    """The class of a class statement whose other half `made` stands for: its own methods run here, `super()` asks."""
    owner = [made]
    by: Ask = lambda value, name, *args: ask(value, "super special", name, owner[0], *args)  # noqa: E731
    operators = forwarders(by)
    asked = [name for name in names if not name.startswith(("__", "_fastgrpo_"))]
    above = {name: _Above(name, owner) for name in (*asked, *ABOVE)}
    above |= {name: operators[name] for name in space_of(made) if name in FORWARDERS}
    if "__call__" in above:
        above["__call__"] = _Above("__call__", owner)
    if "__eq__" in above and "__hash__" not in above:
        above["__hash__"] = operators["__hash__"]
    parent = type.__new__(Mirror, made.__name__, (made,), above)
    local = {name: value for name, value in space.items() if name.startswith("__") or callable(value)}
    local = {name: value for name, value in local.items() if name not in (*ABOVE, "__slots__", "__init_subclass__")}
    local |= {"__getattribute__": _attribute, "__setattr__": Remote.__setattr__, "__delattr__": Remote.__delattr__}
    local |= {"__getattr__": Remote.__getattr__, "_fastgrpo_named_": True}
    rest = [each for each in bases if place_of(each) is None and not issubclass(made, each)]
    after = place_of(bases[0]) is not None
    owner[0] = type.__new__(Mirror, made.__name__, (parent, *rest) if after else (*rest, parent), local)
    return owner[0]


def _attribute(self: Any, name: str) -> Any:
    if name.startswith(("__", "_fastgrpo_")):
        return object.__getattribute__(self, name)
    return ask(self, "get", name)
