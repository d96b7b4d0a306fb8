"""What lives in the other process, as this one sees it: a proxy for each object, a class for each class.

A proxy answers for its attributes, methods and operators by asking. It never answers for its equality or order with
plain data: an object equals, and orders before, only what its own process owns too. A proxy of a subclass of a plain
type is such a plain value as well, and equals whatever that value does. Operators with plain data are for an object
that this side itself made by calling a class of the other (see `meant`): the operand may be what an answer should be.
"""

from __future__ import annotations

import contextlib
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
PAUSE_S = 0.0005  # between two looks at what the other side awaits
Place = tuple[Any, Any]  # the peer, and the number or name of the object there


def place_of(value: Any) -> Place | None:
    """Where a proxy's object lives, or None for what is no proxy."""
    kind = type(value)
    if issubclass(kind, Mirror):
        return type.__getattribute__(value, "_fastgrpo_class_")
    return object.__getattribute__(value, "_fastgrpo_place_") if issubclass(kind, Remote) else None


def space_of(kind: type) -> Any:
    """What a class of this side holds itself."""
    return type.__dict__["__dict__"].__get__(kind)


def _mro(kind: type) -> tuple[type, ...]:
    return type.__dict__["__mro__"].__get__(kind)


def ask(value: Any, operation: str, name: str = "", *args: Any) -> Any:
    peer, target = place_of(value)  # type: ignore[misc]
    return peer.request(operation, target, name, args)


def invoke(value: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    peer, target = place_of(value)  # type: ignore[misc]
    return peer.request("call", target, "", args, named)


class Mirror(type):
    """The class here of a class that lives in the other process; calling it makes an object there."""

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], **named: Any) -> Any:
        """A class statement of this side over a class of the other (inherit.py)."""
        peer = next(place_of(each) for each in bases if place_of(each))[0]  # type: ignore[index]
        return peer.derive(name, bases, space, named)

    def __init__(cls, *args: Any, **named: Any) -> None:
        pass

    @property
    def __doc__(cls) -> Any:  # type: ignore[override]
        return ask(cls, "get", "__doc__")

    @property
    def __mro__(cls) -> tuple[type, ...]:
        return tuple(each for each in _mro(cls) if each.__module__ != __name__)

    @property  # type: ignore[misc]
    def __dict__(cls) -> Any:  # type: ignore[override]
        return ask(cls, "get", "__dict__")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return mean(invoke(cls, args, kwargs), cls.__name__[:1].isupper())

    def __getattr__(cls, name: str) -> Any:
        return ask(cls, "get", name)

    def __setattr__(cls, name: str, value: Any) -> None:
        ask(cls, "set", name, value)
        if name in FORWARDERS and "__getattribute__" in space_of(cls):
            type.__setattr__(cls, name, value)

    def __delattr__(cls, name: str) -> None:
        ask(cls, "del", name)

    def __dir__(cls) -> Any:
        return ask(cls, "special", "__dir__")

    def __len__(cls) -> int:
        return ask(cls, "special", "__len__")

    def __bool__(cls) -> bool:
        return True

    def __iter__(cls) -> Any:
        return ask(cls, "special", "__iter__")

    def __getitem__(cls, key: Any) -> Any:
        return ask(cls, "special", "__getitem__", key)

    def __contains__(cls, item: Any) -> bool:
        return any(item is each or item == each for each in cls)


class Remote:
    """An object of the other process."""

    _fastgrpo_meant_ = False
    _fastgrpo_base_: type = object

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        return ask(self, "get", "__dict__")

    @property
    def __annotations__(self) -> Any:  # type: ignore[override]
        return ask(self, "get", "__annotations__")

    def __getattr__(self, name: str) -> Any:
        return ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("__traceback__", "__context__", "__cause__", "__suppress_context__"):
            object.__setattr__(self, name, value)
        else:
            ask(self, "set", name, value)

    def __delattr__(self, name: str) -> None:
        ask(self, "del", name)

    def __str__(self) -> str:
        return ask(self, "special", "__str__")

    def __repr__(self) -> str:
        return ask(self, "special", "__repr__")

    def __dir__(self) -> Any:
        return ask(self, "special", "__dir__")

    def __copy__(self) -> Any:
        return mean(ask(self, "copy", "copy"), _is_meant(self))

    def __deepcopy__(self, memo: Any) -> Any:
        return mean(ask(self, "copy", "deepcopy"), _is_meant(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an object of another process cannot be copied")


def mean(value: Any, meant: bool) -> Any:
    """Marks an object as made by this side, or, where another call returned it, as no longer sure to be."""
    if issubclass(type(value), Remote):
        object.__setattr__(value, "_fastgrpo_meant_", meant)
    return value


def _may_see(value: Any, other: Any) -> bool:
    """Whether an operator of `value` may be asked about `other`."""
    return place_of(other) is not None or place_of(value)[0].is_open or _is_meant(value)  # type: ignore[index]


def _is_meant(value: Any) -> bool:
    return object.__getattribute__(value, "_fastgrpo_meant_")


Ask = Callable[..., Any]  # of an object, an operator's name and its operands


def _special(value: Any, name: str, *args: Any) -> Any:
    return ask(value, "special", name, *args)


def _unary(name: str, by: Ask = _special) -> Callable[..., Any]:
    def forward(self: Any, *args: Any) -> Any:
        return by(self, name, *args)

    return forward


def _binary(name: str, by: Ask = _special) -> Callable[..., Any]:
    def forward(self: Any, other: Any, *more: Any) -> Any:
        if not _may_see(self, other):
            return _as_plain(self, name, other, *more)
        return mean(by(self, name, other, *more), _is_meant(self))

    return forward


def _order(name: str, by: Ask = _special) -> Callable[[Any, Any], Any]:
    def forward(self: Any, other: Any) -> Any:
        equality = name in ("__eq__", "__ne__")
        if place_of(other) is None and (equality or not _may_see(self, other)):
            return _as_plain(self, name, other)
        return by(self, name, other)

    return forward


def _as_plain(self: Any, name: str, *others: Any) -> Any:
    """What the plain type that `self` also is answers."""
    base = type(self)._fastgrpo_base_
    operator = getattr(base, name, None)
    return NotImplemented if base is object or operator is None else operator(self, *others)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return mean(invoke(self, args, kwargs), False)


def _containing(by: Ask = _special) -> Callable[[Any, Any], bool]:
    def contains(self: Any, item: Any) -> bool:
        """By iteration, where that is possible and this side did not make the object: an item may be the wanted one."""
        if any("__iter__" in space_of(each) for each in _mro(type(self))) and not _may_see(self, item):
            return any(item is each or item == each for each in self)
        return by(self, "__contains__", item)

    return contains


def _exiting(by: Ask = _special) -> Callable[..., Any]:
    return lambda self, kind, error, trace: by(self, "__exit__", kind, error, None)


def _forwarder(name: str) -> property:
    return property(lambda self: ask(self, "get", name))


def awaited(self: Any) -> Any:
    """Waits for what the other process runs, a slice at each look; other tasks of this side go on beside it."""
    from asyncio import CancelledError, _get_running_loop, sleep

    operation = "await"
    while True:
        done, value = ask(self, operation)
        if done:
            return value
        try:
            if _get_running_loop() is not None:
                yield from sleep(PAUSE_S).__await__()
            operation = "await"
        except CancelledError:
            operation = "cancel"


def forwarders(by: Ask = _special) -> dict[str, Any]:
    found: dict[str, Any] = {name: _unary(name, by) for name in UNARY}
    found |= {name: _order(name, by) for name in ORDER} | {name: _binary(name, by) for name in BINARY}
    found |= {"__contains__": _containing(by), "__exit__": _exiting(by)}
    return found | {"__call__": _call, "__await__": awaited}


FORWARDERS = forwarders()


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
