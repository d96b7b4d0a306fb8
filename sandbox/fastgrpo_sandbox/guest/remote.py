"""What lives in the other process, as this one sees it: a proxy for each object, a class for each class.

A proxy answers for its attributes, methods and operators by asking. It never answers for its equality or order with
plain data: an object equals, and orders before, only what its own process owns too. A proxy of a subclass of a plain
type is such a plain value as well, and equals whatever that value does. Operators with plain data are for an object
that this side itself made by calling a class of the other (see `meant`): the operand may be what an answer should be.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable
from typing import Any

from .inherit import told
from .known import known_name

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
ABOVE = ("__init__", "__new__", "__post_init__", "__setattr__", "__delattr__", "__getattr__")  # that super() may find
PAUSE_S = 0.0005  # between two looks at what the other side awaits
Place = tuple[Any, Any]  # the peer, and the number or name of the object there


def place_of(value: Any) -> Place | None:
    """Where a proxy's object lives, or None for what is no proxy."""
    kind = type(value)
    if issubclass(kind, Mirror):
        return type.__getattribute__(value, "_fastgrpo_class_")
    return object.__getattribute__(value, "_fastgrpo_place_") if issubclass(kind, Remote) else None


def _space(kind: type) -> Any:
    """What a class of this side holds itself."""
    return type.__dict__["__dict__"].__get__(kind)


def _mro(kind: type) -> tuple[type, ...]:
    return type.__dict__["__mro__"].__get__(kind)


def _ask(value: Any, operation: str, name: str = "", *args: Any) -> Any:
    peer, target = place_of(value)  # type: ignore[misc]
    return peer.request(operation, target, name, args)


def _invoke(value: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    peer, target = place_of(value)  # type: ignore[misc]
    return peer.request("call", target, "", args, named)


class Mirror(type):
    """The class here of a class that lives in the other process; calling it makes an object there."""

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], **named: Any) -> Any:
        """A class statement of this side over a class of the other (inherit.py)."""
        peer = next(place_of(each) for each in bases if place_of(each))[0]  # type: ignore[index]
        theirs = [each for each in bases if place_of(each) or known_name(each)]
        entries = told(bases, space, lambda each: place_of(each) is not None)
        made, names = peer.request("subclass", None, name, [theirs, named, entries])
        return peer.stand_in(made, derived(made, names, bases, space))

    def __init__(cls, *args: Any, **named: Any) -> None:
        pass

    @property
    def __doc__(cls) -> Any:  # type: ignore[override]
        return _ask(cls, "get", "__doc__")

    @property
    def __mro__(cls) -> tuple[type, ...]:  # type: ignore[override]
        return tuple(each for each in _mro(cls) if each.__module__ != __name__)

    @property
    def __dict__(cls) -> Any:  # type: ignore[override]
        return _ask(cls, "get", "__dict__")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _mean(_invoke(cls, args, kwargs), cls.__name__[:1].isupper())

    def __getattr__(cls, name: str) -> Any:
        return _ask(cls, "get", name)

    def __setattr__(cls, name: str, value: Any) -> None:
        _ask(cls, "set", name, value)
        if name in FORWARDERS and "__getattribute__" in _space(cls):
            type.__setattr__(cls, name, value)

    def __delattr__(cls, name: str) -> None:
        _ask(cls, "del", name)

    def __dir__(cls) -> Any:
        return _ask(cls, "special", "__dir__")

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

    @property
    def __annotations__(self) -> Any:  # type: ignore[override]
        return _ask(self, "get", "__annotations__")

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

    def __copy__(self) -> Any:
        return _mean(_ask(self, "copy", "copy"), _is_meant(self))

    def __deepcopy__(self, memo: Any) -> Any:
        return _mean(_ask(self, "copy", "deepcopy"), _is_meant(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an object of another process cannot be copied")


class Callback(Remote):
    """A callable without more of interest."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _mean(_invoke(self, args, kwargs), False)


class Function(Callback):
    """A function, which has a type that tests ask for."""

    __class__ = property(lambda self: types.FunctionType)  # type: ignore[assignment]
    __globals__: Any = property(lambda self: {})  # where annotations are looked up; the other side's stay there


class Method(Callback):
    """A method of an object."""

    __class__ = property(lambda self: types.MethodType)  # type: ignore[assignment]


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
    """What can be awaited. It runs on a loop of its own process, a slice at a time, so that both sides' tasks go on."""

    def __await__(self) -> Any:
        from asyncio import CancelledError, _get_running_loop, sleep

        operation = "await"
        while True:
            done, value = _ask(self, operation)
            if done:
                return value
            try:
                if _get_running_loop() is not None:
                    yield from sleep(PAUSE_S).__await__()
                operation = "await"
            except CancelledError:
                operation = "cancel"

    def _steps(self) -> Any:
        try:
            return object.__getattribute__(self, "_fastgrpo_steps_")
        except AttributeError:
            object.__setattr__(self, "_fastgrpo_steps_", self.__await__())
            return object.__getattribute__(self, "_fastgrpo_steps_")

    def send(self, value: Any) -> Any:
        return self._steps().send(value)

    def throw(self, *error: Any) -> Any:
        return self._steps().throw(*error)

    def close(self) -> None:
        self._steps().close()


class Described(Remote):
    """An attribute that a class answers with, and of which tests ask the type."""

    _fastgrpo_kind_: type = property

    __class__ = property(lambda self: type(self)._fastgrpo_kind_)  # type: ignore[assignment]


class Static(Described):
    """A static method, before it is asked of a class."""

    _fastgrpo_kind_ = staticmethod


class OfClass(Described):
    """Likewise a class method."""

    _fastgrpo_kind_ = classmethod


KINDS = {"function": Function, "method": Method, "builtin": Callback, "property": Described, "staticmethod": Static}
KINDS |= {"classmethod": OfClass, "iterator": Iterator, "generator": Generator, "coroutine": Coroutine}
for _kind in (Remote, *KINDS.values()):
    _kind.__doc__ = property(lambda self: _ask(self, "get", "__doc__"))  # type: ignore[assignment]


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


Ask = Callable[..., Any]  # of an object, an operator's name and its operands


def _special(value: Any, name: str, *args: Any) -> Any:
    return _ask(value, "special", name, *args)


def _unary(name: str, ask: Ask = _special) -> Callable[..., Any]:
    def forward(self: Any, *args: Any) -> Any:
        return ask(self, name, *args)

    return forward


def _binary(name: str, ask: Ask = _special) -> Callable[..., Any]:
    def forward(self: Any, other: Any, *more: Any) -> Any:
        if not _may_see(self, other):
            return _as_plain(self, name, other, *more)
        return _mean(ask(self, name, other, *more), _is_meant(self))

    return forward


def _order(name: str, ask: Ask = _special) -> Callable[[Any, Any], Any]:
    def forward(self: Any, other: Any) -> Any:
        equality = name in ("__eq__", "__ne__")
        if place_of(other) is None and (equality or not _may_see(self, other)):
            return _as_plain(self, name, other)
        return ask(self, name, other)

    return forward


def _as_plain(self: Any, name: str, *others: Any) -> Any:
    """What the plain type that `self` also is answers."""
    base = type(self)._fastgrpo_base_
    operator = getattr(base, name, None)
    return NotImplemented if base is object or operator is None else operator(self, *others)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _mean(_invoke(self, args, kwargs), False)


def _containing(ask: Ask = _special) -> Callable[[Any, Any], bool]:
    def contains(self: Any, item: Any) -> bool:
        """By iteration, where that is possible and this side did not make the object: an item may be the wanted one."""
        if any("__iter__" in _space(each) for each in _mro(type(self))) and not _may_see(self, item):
            return any(item is each or item == each for each in self)
        return ask(self, "__contains__", item)

    return contains


def _exiting(ask: Ask = _special) -> Callable[..., Any]:
    return lambda self, kind, error, trace: ask(self, "__exit__", kind, error, None)


def _forwarder(name: str) -> property:
    return property(lambda self: _ask(self, "get", name))


def _forwarders(ask: Ask = _special) -> dict[str, Any]:
    found: dict[str, Any] = {name: _unary(name, ask) for name in UNARY}
    found |= {name: _order(name, ask) for name in ORDER} | {name: _binary(name, ask) for name in BINARY}
    found |= {"__contains__": _containing(ask), "__exit__": _exiting(ask)}
    return found | {"__call__": _call, "__await__": Coroutine.__await__}


FORWARDERS = _forwarders()


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


class _Above:
    """An attribute as `super()` finds it."""

    def __init__(self, name: str, owner: list[Any]) -> None:
        self.name, self.owner = name, owner

    def __get__(self, value: Any, kind: Any = None) -> Any:
        return _ask(kind if value is None else value, "super", self.name, self.owner[0])


def derived(made: Any, names: Iterable[str], bases: tuple[type, ...], space: dict[str, Any]) -> type:
    """The class of a class statement whose other half `made` stands for: its own methods run here, `super()` asks."""
    owner = [made]
    ask: Ask = lambda value, name, *args: _ask(value, "super special", name, owner[0], *args)  # noqa: E731
    operators = _forwarders(ask)
    asked = [name for name in names if not name.startswith(("__", "_fastgrpo_"))]
    above = {name: _Above(name, owner) for name in (*asked, *ABOVE)}
    above |= {name: operators[name] for name in _space(made) if name in FORWARDERS}
    if "__call__" in above:
        above["__call__"] = _Above("__call__", owner)
    if "__eq__" in above and "__hash__" not in above:
        above["__hash__"] = operators["__hash__"]
    parent = type.__new__(Mirror, made.__name__, (made,), above)
    local = {name: value for name, value in space.items() if name.startswith("__") or callable(value)}
    local = {name: value for name, value in local.items() if name not in (*ABOVE, "__slots__", "__init_subclass__")}
    local |= {"__getattribute__": _attribute, "__setattr__": Remote.__setattr__, "__delattr__": Remote.__delattr__}
    local["__getattr__"] = Remote.__getattr__
    rest = [each for each in bases if place_of(each) is None and not issubclass(made, each)]
    after = place_of(bases[0]) is not None
    owner[0] = type.__new__(Mirror, made.__name__, (parent, *rest) if after else (*rest, parent), local)
    return owner[0]


def _attribute(self: Any, name: str) -> Any:
    if name.startswith(("__", "_fastgrpo_")):
        return object.__getattribute__(self, name)
    return _ask(self, "get", name)


def proxy(kind: type, place: Place, args: tuple[Any, ...] = ()) -> Any:
    """An object here for one there; `args` are those of its plain value."""
    base = kind._fastgrpo_base_  # type: ignore[attr-defined]
    made = base.__new__(kind, *args)
    if issubclass(base, BaseException):
        with contextlib.suppress(TypeError):
            base.__init__(made, *args)
    object.__setattr__(made, "_fastgrpo_place_", place)
    return made
