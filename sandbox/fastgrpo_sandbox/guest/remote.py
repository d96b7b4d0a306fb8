"""What lives in the other process, as this one sees it: a proxy for each object, a class for each class.

A proxy answers for its attributes, methods and operators by asking. It never answers for its equality or order with
plain data: an object equals, and orders before, only what its own process owns too. A proxy of a subclass of a plain
type is such a plain value as well, and equals whatever that value does. Operators with plain data are for an object
that this side itself made by calling a class of the other (see `meant`): the operand may be what an answer should be.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

UNARY = (
    *("__len__", "__getitem__", "__setitem__", "__delitem__", "__iter__", "__next__", "__reversed__", "__enter__"),
    *("__str__", "__repr__", "__format__", "__bytes__", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
    *("__neg__", "__pos__", "__abs__", "__invert__", "__round__", "__trunc__", "__floor__", "__ceil__", "__hash__"),
    *("__aiter__", "__anext__", "__aenter__", "__aexit__", "__fspath__", "__length_hint__", "__missing__"),
)
ORDER = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul")
BITS = ("lshift", "rshift", "and", "or", "xor")
BINARY = tuple(f"__{prefix}{name}__" for name in (*ARITHMETIC, *BITS) for prefix in ("", "r", "i") if name != "divmod")
BINARY += ("__divmod__", "__rdivmod__")
OWN = ("__call__", "__contains__", "__exit__", "__await__")  # each with a forwarder of its own
SPECIALS = (*UNARY, *ORDER, *BINARY, *OWN)
Place = tuple[Any, Any]  # the peer, and the number or name of the object there


def place_of(value: Any) -> Place | None:
    """Where a proxy's object lives, or None for what is no proxy."""
    kind = type(value)
    if issubclass(kind, Mirror):
        return type.__getattribute__(value, "_fastgrpo_class_")
    return object.__getattribute__(value, "_fastgrpo_place_") if issubclass(kind, Remote) else None


def _ask(value: Any, operation: str, name: str = "", *args: Any) -> Any:
    peer, target = place_of(value)  # type: ignore[misc]
    return peer.request(operation, target, name, args)


def _invoke(value: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    peer, target = place_of(value)  # type: ignore[misc]
    return peer.request("call", target, "", args, named)


class Mirror(type):
    """The class here of a class that lives in the other process; calling it makes an object there."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _mean(_invoke(cls, args, kwargs), cls.__name__[:1].isupper())

    def __getattr__(cls, name: str) -> Any:
        return _ask(cls, "get", name)

    def __setattr__(cls, name: str, value: Any) -> None:
        _ask(cls, "set", name, value)

    def __len__(cls) -> int:
        return _ask(cls, "special", "__len__")

    def __bool__(cls) -> bool:
        return True

    def __iter__(cls) -> Any:
        return _ask(cls, "special", "__iter__")

    def __getitem__(cls, key: Any) -> Any:
        return _ask(cls, "special", "__getitem__", key)

    def __contains__(cls, item: Any) -> bool:
        return any(item is each or item == each for each in cls)


class Remote:
    """An object of the other process."""

    _fastgrpo_meant_ = False
    _fastgrpo_base_: type = object

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        return _ask(self, "get", "__dict__")

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("__traceback__", "__context__", "__cause__", "__suppress_context__"):
            object.__setattr__(self, name, value)
        else:
            _ask(self, "set", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "del", name)

    def __str__(self) -> str:
        return _ask(self, "special", "__str__")

    def __repr__(self) -> str:
        return _ask(self, "special", "__repr__")

    def __dir__(self) -> Any:
        return _ask(self, "special", "__dir__")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an object of another process cannot be copied")


class Function(Remote):
    """A function, method or other callable without more of interest."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _mean(_invoke(self, args, kwargs), False)


class Iterator(Remote):
    """A generator, or an iterator of any kind."""

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        return _ask(self, "special", "__next__")


class Generator(Iterator):
    """A generator, which has a type that tests ask for."""

    __class__ = property(lambda self: types.GeneratorType)

    def send(self, value: Any) -> Any:
        return _ask(self, "special", "send", value)


class Coroutine(Remote):
    """What can be awaited; its own process runs it to its end when this one waits for it."""

    def __await__(self) -> Any:
        return _ask(self, "await")
        yield

    def send(self, value: Any) -> Any:
        raise StopIteration(_ask(self, "await"))

    def throw(self, *error: Any) -> Any:
        raise error[0]

    def close(self) -> None:
        pass


KINDS = {"function": Function, "iterator": Iterator, "generator": Generator, "coroutine": Coroutine}
Function.__doc__ = property(lambda self: _ask(self, "get", "__doc__"))  # type: ignore[assignment]


def _mean(value: Any, meant: bool) -> Any:
    """Marks an object as made by this side, or, where another call returned it, as no longer sure to be."""
    if issubclass(type(value), Remote):
        object.__setattr__(value, "_fastgrpo_meant_", meant)
    return value


def _may_see(value: Any, other: Any) -> bool:
    """Whether an operator of `value` may be asked about `other`."""
    return place_of(other) is not None or place_of(value)[0].is_open or _is_meant(value)  # type: ignore[index]


def _is_meant(value: Any) -> bool:
    return object.__getattribute__(value, "_fastgrpo_meant_")


def _unary(name: str) -> Callable[..., Any]:
    def ask(self: Any, *args: Any) -> Any:
        return _ask(self, "special", name, *args)

    return ask


def _binary(name: str) -> Callable[..., Any]:
    def ask(self: Any, other: Any, *more: Any) -> Any:
        if not _may_see(self, other):
            return _as_plain(self, name, other, *more)
        return _mean(_ask(self, "special", name, other, *more), _is_meant(self))

    return ask


def _order(name: str) -> Callable[[Any, Any], Any]:
    def ask(self: Any, other: Any) -> Any:
        equality = name in ("__eq__", "__ne__")
        if place_of(other) is None and (equality or not _may_see(self, other)):
            return _as_plain(self, name, other)
        return _ask(self, "special", name, other)

    return ask


def _as_plain(self: Any, name: str, *others: Any) -> Any:
    """What the plain type that `self` also is answers."""
    base = type(self)._fastgrpo_base_
    operator = getattr(base, name, None)
    return NotImplemented if base is object or operator is None else operator(self, *others)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _mean(_invoke(self, args, kwargs), False)


def _contains(self: Any, item: Any) -> bool:
    """By iteration, where that is possible and this side did not make the object: an item may be the wanted one."""
    if any("__iter__" in vars(each) for each in type(self).__mro__) and not _may_see(self, item):
        return any(item is each or item == each for each in self)
    return _ask(self, "special", "__contains__", item)


def _exit(self: Any, kind: Any, error: Any, trace: Any) -> Any:
    return _ask(self, "special", "__exit__", kind, error, None)


def _forwarder(name: str) -> property:
    return property(lambda self: _ask(self, "get", name))


FORWARDERS: dict[str, Any] = {name: _unary(name) for name in UNARY}
FORWARDERS |= {name: _order(name) for name in ORDER} | {name: _binary(name) for name in BINARY}
FORWARDERS |= {"__call__": _call, "__contains__": _contains, "__exit__": _exit, "__await__": Coroutine.__await__}


def mirror(place: Place, name: str, bases: tuple[type, ...], base: type, specials: list[str], names: list[str]) -> type:
    """The class here of a class there. `base` is the plain type or exception that it derives from, or object; specials
    are those that it defines over `base`, and `names` the attributes."""
    space: dict[str, Any] = {special: FORWARDERS[special] for special in specials}
    space |= {each: _forwarder(each) for each in names}
    space |= {"_fastgrpo_class_": place, "_fastgrpo_base_": base, "__module__": "solution"}
    if "__eq__" in space and "__hash__" not in space and base is not object:
        space["__hash__"] = base.__hash__
    for wanted in (bases, (Remote, base) if base is not object else (Remote,)):
        try:
            return type.__new__(Mirror, name, wanted, space)
        except TypeError:
            continue
    raise TypeError(f"no class can stand for {name}")


def proxy(kind: type, place: Place, args: tuple[Any, ...] = ()) -> Any:
    """An object here for one there; `args` are those of its plain value."""
    base = kind._fastgrpo_base_  # type: ignore[attr-defined]
    made = base.__new__(kind, *args)
    if issubclass(base, BaseException):
        with contextlib.suppress(TypeError):
            base.__init__(made, *args)
    object.__setattr__(made, "_fastgrpo_place_", place)
    return made
