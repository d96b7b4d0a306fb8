"""Classes and functions that both sides of a judged pair have: the standard library's, which cross by name."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from .plain import HOLDERS, KINDS, VALUES, name_of

BARE = frozenset({"datetime.tzinfo"})  # a base without a value, which others of the library insist on
KEPT_BACK = (types.ModuleType, types.FrameType, types.CodeType, types.TracebackType)
MEMBERS = ("filename", "filename2", "name", "path")  # of exceptions, beside what is in their dict
VALUE_MODULES = frozenset({"builtins", "collections", "datetime", "decimal", "fractions", "uuid", "pathlib", "array"})
RUNNING = ("__del__", "__getattr__", "__getattribute__")
# Of classes that can be derived from and asked for, and that do nothing by themselves.
ABSTRACT_MODULES = frozenset({"abc", "enum", "numbers", "collections.abc"})
ABSTRACT = frozenset({"typing.Generic", "typing.Protocol"})
PLAIN_BASES: dict[type, Callable[[Any], Sequence[Any]]] = {  # what cannot change, and its constructor's arguments
    int: lambda value: (int.__int__(value),),
    str: lambda value: (str.__str__(value),),
    float: lambda value: (float.__float__(value),),
    bytes: lambda value: (bytes.__getitem__(value, slice(None)),),
    complex: lambda value: (value.real, value.imag),
    tuple: lambda value: list(tuple.__iter__(value)),
    frozenset: lambda value: list(frozenset.__iter__(value)),
}


# Likewise, by name: the parts of VALUES, without what no place of an argument takes.
PLAIN_NAMES = {"decimal.Decimal": 1, "datetime.date": 3, "datetime.datetime": 8, "datetime.timedelta": 3}


def plain_parts(value: Any, base: type) -> Sequence[Any]:
    """The arguments that make a value of `base` equal to what `value` also is."""
    if base in PLAIN_BASES:
        return PLAIN_BASES[base](value)
    name = name_of(base)
    return VALUES[name][0](value)[: PLAIN_NAMES[name]] if name in PLAIN_NAMES else ()


def is_library(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def library_place(value: Any) -> str | None:
    """The full name of a function or class that is the standard library's own."""
    if value is types.AsyncGeneratorType:
        return "types.AsyncGeneratorType"
    module, own = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(own, str) and is_library(module)):
        return None
    return f"{module}.{own}" if getattr(sys.modules.get(module), own, None) is value else None


def library_class(place: str) -> type | None:
    """The class of a full name of the library's, whose objects are no values: isinstance may hold for what the other
    side says to be one. None where nothing here has imported it."""
    module, _, own = place.rpartition(".")
    found = getattr(sys.modules.get(module), own, None) if is_library(module) else None
    if not isinstance(found, type) or found in (object, type):
        return None
    is_value = name_of(found) in VALUES or plain_base(found) is not object or is_abstract(found)
    return None if is_value or library_place(found) is None else found


def known_name(kind: type) -> str | None:
    """The name by which a class crosses: one of a value's modules, an abstract one, or the library's own exceptions."""
    if kind is types.NoneType:
        return "types.NoneType"
    if kind.__module__ in VALUE_MODULES or is_abstract(kind) or issubclass(kind, BaseException):
        return library_place(kind)
    return None


def is_abstract(kind: type) -> bool:
    return kind.__module__ in ABSTRACT_MODULES or name_of(kind) in ABSTRACT


def library_bases(kind: type, base: type) -> list[str]:
    """Names of the library's classes, beside `base`, that `kind` derives from."""
    names = [library_place(each) for each in kind.__mro__ if each not in base.__mro__]
    return [name for name in names if name is not None]


def behind(name: str) -> type | None:
    """A class of `library_bases`, if classes of the other side may be told to derive from it. None for one with code
    that would run here by itself."""
    module, _, own = name.rpartition(".")
    if module in ABSTRACT_MODULES or name in ABSTRACT:
        found: type | None = known(name)
    else:
        kind = getattr(sys.modules.get(module), own, None)
        is_error = isinstance(kind, type) and issubclass(kind, BaseException) and known_name(kind) == name
        found = kind if is_error else library_class(name)
    if found is None:
        return None
    kinds = [each for each in found.__mro__ if each.__module__ != "builtins"]
    return None if any(name in vars(each) for each in kinds for name in RUNNING) else found


def known(name: Any) -> type:
    """The class of a name that crossed. Raises ValueError for what is no class of the kinds of `known_name`."""
    module, _, own = name.rpartition(".")
    found = getattr(importlib.import_module(module), own) if is_library(module) else None
    if not isinstance(found, type) or known_name(found) is None:
        raise ValueError(f"{name} is not a class that may cross")
    return found


NAMED = KINDS.keys() - HOLDERS | PLAIN_NAMES.keys()


def plain_base(kind: type) -> type:
    """The plain type, bare base or library's exception from which a class derives, or object."""
    for each in kind.__mro__:
        if each in PLAIN_BASES or name_of(each) in BARE or (name_of(each) in NAMED and known_name(each)):
            return each
        if issubclass(each, BaseException) and known_name(each):
            return each
    return object


def _attribute(kind: type, name: str) -> Any:
    return next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), None)


def differs(kind: type, base: type, name: str) -> bool:
    return _attribute(kind, name) is not _attribute(base, name)


def overridden(kind: type, base: type) -> set[str]:
    """Attributes of `base` that a subclass has in a form of its own."""
    own = (name for each in kind.__mro__[: kind.__mro__.index(base)] for name in vars(each))
    return {name for name in own if not name.startswith("__") and hasattr(base, name)}


def plain_state(error: BaseException) -> dict[str, Any]:
    """What an exception of the library has beyond its arguments."""
    own = {name: getattr(error, name, None) for name in MEMBERS}
    return {name: value for name, value in (own | vars(error)).items() if value is not None and _may_leave(value)}


def _may_leave(value: Any) -> bool:
    return not isinstance(value, KEPT_BACK)


def error(name: str, args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    kind = known(name)
    made = kind.__new__(kind, *args)
    if not isinstance(made, BaseException):
        raise ValueError(f"{name} is no exception")
    if kind.__module__ == "builtins":
        with contextlib.suppress(TypeError):
            kind.__init__(made, *args)  # type: ignore[misc]
    return set_state(made, args, state)


def set_state(made: BaseException, args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    made.args = args
    for own, value in state.items():
        if own in MEMBERS and hasattr(type(made), own):
            setattr(made, own, value)
        else:
            vars(made)[own] = value
    return made
