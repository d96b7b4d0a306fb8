"""What lives in the other process, as this one sees it: a proxy for each object, a class for each class.

A proxy answers for its attributes, methods and operators by asking. It never answers for its equality or order with
plain data: an object equals, and orders before, only what its own process owns too. A proxy of a subclass of a plain
type is such a plain value as well, and equals whatever that value does. Operators with plain data are for an object
that this side itself made by calling a class of the other, which it named (`is_trusted`): the operand may be what an
answer should be.
"""

from __future__ import annotations

import contextlib
import copyreg
import types
from typing import Any

from .annotations import signature
from .known import BARE, library_class
from .plain import name_of

UNARY = (
    *("__len__", "__getitem__", "__setitem__", "__delitem__", "__iter__", "__next__", "__reversed__", "__enter__"),
    *("__str__", "__repr__", "__format__", "__bytes__", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
    *("__neg__", "__pos__", "__abs__", "__invert__", "__round__", "__trunc__", "__floor__", "__ceil__", "__hash__"),
    *("__aiter__", "__anext__", "__aenter__", "__aexit__", "__fspath__", "__length_hint__", "__missing__"),
    *("__get__", "__set__", "__delete__", "__set_name__"),
)
FINDING = frozenset({"__getitem__", "__next__", "__anext__", "__reversed__", "__missing__", "__abs__", "__round__"})
ORDER = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul")
BITS = ("lshift", "rshift", "and", "or", "xor")
BINARY = tuple(f"__{prefix}{name}__" for name in (*ARITHMETIC, *BITS) for prefix in ("", "r", "i") if name != "divmod")
BINARY += ("__divmod__", "__rdivmod__")
OWN = ("__call__", "__contains__", "__exit__", "__await__")  # each with a forwarder of its own
SPECIALS = (*UNARY, *ORDER, *BINARY, *OWN)
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
Place = tuple[Any, Any]  # the peer, and the number or name of the object there


def place_of(value: Any) -> Place | None:
    """Where a proxy's object lives, or None for what is no proxy."""
    kind = type(value)
    if issubclass(kind, Mirror):
        return type.__getattribute__(value, "_fastgrpo_class_")
    return object.__getattribute__(value, "_fastgrpo_place_") if issubclass(kind, Remote) else None


def is_guarded(proxy: Any) -> bool:
    """Whether a proxy is of the judge's side, from which the other is not to hear what is wanted."""
    return place_of(proxy)[0].is_guarded  # type: ignore[index]


def space_of(kind: type) -> Any:
    """What a class of this side holds itself."""
    return type.__dict__["__dict__"].__get__(kind)


def mro_of(kind: type) -> tuple[type, ...]:
    return type.__dict__["__mro__"].__get__(kind)


def ask(value: Any, operation: str, name: str = "", *args: Any) -> Any:
    """What the other side answers. An object that this side made, and that is found in another or in itself, is no
    longer sure to be what is meant there, unless this side handed it over: as an argument, an attribute or an item."""
    peer, target = place_of(value)  # type: ignore[misc]
    found = peer.request(operation, target, name, args)
    if (operation == "get" or name in FINDING) and issubclass(type(found), Remote):
        trust(found, is_trusted(found) and object.__getattribute__(found, "_fastgrpo_handed_"))
    return found


def invoke(value: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    peer, target = place_of(value)  # type: ignore[misc]
    return peer.request("call", target, "", args, named)


class Forwarder(property):
    """An attribute that is asked of the object."""

    def __init__(self, name: str) -> None:
        super().__init__(lambda value: ask(value, "get", name))


class Sealed(Forwarder):
    """One that the plain value answers, which the object also is, unless this side made it: it may be given the wanted
    value to compare with, as `f(1).startswith("abc")` does."""

    def __init__(self, name: str, base: type) -> None:
        own = getattr(base, name)
        plain = getattr(own, "__get__", lambda value: own)
        property.__init__(self, lambda value: ask(value, "get", name) if is_trusted(value) else plain(value))


# Of a class: what is this side's own affair, and what only its own process can tell.
KEPT_HERE = frozenset(
    {*("__name__", "__qualname__", "__module__", "__doc__", "__dict__", "__mro__", "__signature__", "__copy__", "mro")}
)
ASKED = frozenset({"__annotations__", "__flags__", "__class__", "__bases__", "__base__"})


def holder_of(kind: type, name: str) -> type | None:
    """The class in which an object of `kind` finds `name`."""
    return next((each for each in mro_of(kind) if name in space_of(each)), None)


def _is_stand_in(kind: type, name: str) -> bool:
    """Whether what a class is found to have is for its objects alone, and would mislead as the class' own attribute."""
    holder = holder_of(kind, name)
    if holder in (Remote, object):
        return name == "__init__" or is_guarded(kind)
    return (
        holder is not None and issubclass(type(holder), Mirror) and issubclass(type(space_of(holder)[name]), Forwarder)
    )


class Mirror(type):
    """The class here of a class that lives in the other process; calling it makes an object there."""

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], /, **named: Any) -> Any:
        """A class statement of this side over a class of the other (inherit.py)."""
        peer = next(place_of(each) for each in bases if place_of(each))[0]  # type: ignore[index]
        return peer.derive(name, bases, space, named)

    def __init__(cls, /, *args: Any, **named: Any) -> None:
        pass

    def mro(cls) -> list[type]:
        """The library's classes stand behind object: asked for, they are there; what they define is asked of the other
        side."""
        found = type.mro(cls)
        return found + [each for each in space_of(cls).get("_fastgrpo_library_", ()) if each not in found]

    def __getattribute__(cls, name: str) -> Any:
        if name.startswith("_fastgrpo_") or name in KEPT_HERE:
            return type.__getattribute__(cls, name)
        is_asked = name in ASKED and (name == "__annotations__" or is_guarded(cls))
        if is_asked or _is_stand_in(cls, name):
            return ask(cls, "get", name)
        return type.__getattribute__(cls, name)

    @property
    def __doc__(cls) -> Any:  # type: ignore[override]
        return ask(cls, "get", "__doc__")

    @property
    def __mro__(cls) -> tuple[type, ...]:
        return tuple(sorted((each for each in mro_of(cls) if each is not Remote), key=lambda each: each is object))

    @property
    def __signature__(cls) -> Any:
        return signature(*ask(cls, "signature"))

    @property  # type: ignore[misc]
    def __dict__(cls) -> Any:  # type: ignore[override]
        return ask(cls, "get", "__dict__") if is_guarded(cls) else space_of(cls)

    def __repr__(cls) -> str:
        return ask(cls, "special", "__repr__")

    def __call__(cls, /, *args: Any, **kwargs: Any) -> Any:
        is_named = space_of(cls).get("_fastgrpo_named_") is True
        # Of a date the library itself calls the class, when it adds to an object that a function returned.
        return trust(invoke(cls, args, kwargs), is_named and cls._fastgrpo_base_.__module__ != "datetime")

    def __getattr__(cls, name: str) -> Any:
        _refuse(cls, name)
        return ask(cls, "get", name)

    def __setattr__(cls, name: str, value: Any) -> None:
        ask(cls, "set", name, value)
        if name in SPECIALS and "__getattribute__" in space_of(cls):
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
        """`Stack[int]`, which is no other class than the tests named."""
        named = space_of(cls).get("_fastgrpo_named_")
        found = ask(cls, "special", "__getitem__", key)
        type.__setattr__(cls, "_fastgrpo_named_", named)
        return found

    def __contains__(cls, item: Any) -> bool:
        return any(item is each or item == each for each in cls)

    def __instancecheck__(cls, value: Any) -> bool:
        """An object of this side's own is judged by its class alone, which a protocol may count in."""
        if type.__instancecheck__(cls, value):
            return True
        own = place_of(value) is None
        return _is_of(cls, "__subclasscheck__" if own else "__instancecheck__", type(value) if own else value)

    def __subclasscheck__(cls, kind: type) -> bool:
        return type.__subclasscheck__(cls, kind) or _is_of(cls, "__subclasscheck__", kind)


def _refuse(value: Any, name: str) -> None:
    """Raises AttributeError for numpy's protocols, whose owner sees what it compares and says where memory is read."""
    if name.startswith("__array_") and name != "__array__" and is_guarded(value):
        raise AttributeError(name)


def _is_of(kind: Mirror, name: str, value: Any) -> bool:
    """Whether a protocol or abstract class of the other side counts in an object of that side, or a class."""
    return is_guarded(kind) and ask(kind, "special", name, value) is True


def _of_classes(name: str) -> Any:
    """An operator of two classes of the other side, which their metaclass may have."""

    def operator(cls: Any, other: Any) -> Any:
        try:
            return NotImplemented if place_of(other) is None else ask(cls, "special", name, other)
        except AttributeError:
            return NotImplemented

    return operator


for _name in (*ORDER[2:], *(name for name in BINARY if name not in ("__or__", "__ror__"))):
    setattr(Mirror, _name, _of_classes(_name))


class _Copying:
    """What `copy` asks a class for. Who asks an object, as itertools.tee does, is answered by its own process."""

    def __get__(self, value: Any, kind: Any = None) -> Any:
        if value is not None:
            return ask(value, "get", "__copy__")
        return lambda value: trust(ask(value, "copy", "copy"), is_trusted(value))


class Remote:
    """An object of the other process."""

    _fastgrpo_trusted_ = False
    _fastgrpo_made_ = False  # by this side, whatever returned it since
    _fastgrpo_base_: type = object
    _fastgrpo_handed_ = False  # to the other side, which may have kept it in another
    _fastgrpo_numbers_: dict[str, Any] | None = None  # what it said to be worth
    _fastgrpo_like_: type | str | None = None  # of a mock, a class of this side; or one of the library's, by name

    def __init_subclass__(cls) -> None:
        """No class behind this one hears of a proxy's class: what it does about its own is not for that."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        like = object.__getattribute__(self, "_fastgrpo_like_")
        return (library_class(like) if isinstance(like, str) else like) or type(self)

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        return ask(self, "get", "__dict__")

    @property
    def __annotations__(self) -> Any:  # type: ignore[override]
        return ask(self, "get", "__annotations__")

    @property
    def __signature__(self) -> Any:
        return signature(*ask(self, "signature"))

    def __init__(self, /, *args: Any, **named: Any) -> None:
        """Called by name alone: what makes a proxy does without."""
        ask(self, "get", "__init__")(*args, **named)

    def __getattr__(self, name: str) -> Any:
        _refuse(self, name)
        object.__setattr__(self, "_fastgrpo_numbers_", None)  # a method may change it
        return ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, "_fastgrpo_numbers_", None)
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

    __copy__ = _Copying()

    def __deepcopy__(self, memo: Any) -> Any:
        return trust(ask(self, "copy", "deepcopy"), is_trusted(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The object's own process takes it apart and makes the copy; nothing of that is read here."""
        data = ask(self, "pickle", "", int(protocol))
        _pickled[id(self)] = self
        return _another, (id(self), data)


_pickled: dict[int, Any] = {}  # proxies whose pickles may be read again, by id()


def _another(number: int, data: bytes) -> Any:
    first = _pickled[number]
    return trust(place_of(first)[0].request("unpickle", None, "", [data]), is_trusted(first))  # type: ignore[index]


def _the_same(number: int) -> Any:
    return _pickled[number]


def itself(value: Any) -> Any:
    """The pickle of what is the same object when read again: a class, or a function."""
    _pickled[id(value)] = value
    return _the_same, (id(value),)


copyreg.pickle(Mirror, itself)


def hand_over(value: Any) -> None:
    """Notes that the other side is given a proxy's object again."""
    if issubclass(type(value), Remote):
        object.__setattr__(value, "_fastgrpo_handed_", True)


def trust(value: Any, trusted: bool) -> Any:
    """`value`, an object that this side itself made, or, where another call returned it, is no longer sure to have."""
    if issubclass(type(value), Remote):
        object.__setattr__(value, "_fastgrpo_trusted_", trusted)
        if trusted:
            object.__setattr__(value, "_fastgrpo_made_", True)
    return value


def may_see(value: Any, other: Any) -> bool:
    """Whether an operator of `value` may be asked about `other`; a function tells no wanted value."""
    if type(other) in FUNCTIONS:
        return True
    return place_of(other) is not None or is_trusted(value) or not is_guarded(value)


def is_trusted(value: Any) -> bool:
    """Whether this side is sure to have made an object: its operators are shown plain data."""
    return object.__getattribute__(value, "_fastgrpo_trusted_")


def proxy(kind: type, place: Place, args: tuple[Any, ...] = ()) -> Any:
    """An object here for one there; `args` are those of its plain value."""
    base = kind._fastgrpo_base_  # type: ignore[attr-defined]
    made = base.__new__(kind, *args) if name_of(base) not in BARE else object.__new__(kind)
    if issubclass(base, BaseException):
        with contextlib.suppress(TypeError):
            base.__init__(made, *args)
    object.__setattr__(made, "_fastgrpo_place_", place)
    return made
