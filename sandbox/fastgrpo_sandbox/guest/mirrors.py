"""Classes for those of the other process, and the operators of their objects, which ask."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from .known import MEMBERS, is_abstract
from .plain import HOLDERS, KINDS, name_of
from .remote import (
    BINARY,
    ORDER,
    SPECIALS,
    UNARY,
    Forwarder,
    Mirror,
    Place,
    Remote,
    Sealed,
    ask,
    holder_of,
    invoke,
    is_guarded,
    is_trusted,
    may_see,
    place_of,
    trust,
)

PAUSE_S = 0.0005  # between two looks at what the other side awaits
NUMBERS = ("__int__", "__float__", "__complex__", "__index__")
CONSTANT = (str, bytes, int, float, complex, frozenset)  # a tuple's names are often fields
# Methods of a container that are shown what is wanted, beside those of CONSTANT.
SHOWN = {
    "set": ("issubset", "issuperset", "isdisjoint", "difference", "symmetric_difference", "intersection"),
    "bytearray": ("startswith", "endswith", "find", "rfind", "count", "index", "rindex"),
    "list": ("count", "index"),
    "collections.deque": ("count", "index"),
}
HOLDING = frozenset({"tuple", "frozenset", "str", "bytes", *KINDS}) - HOLDERS
HELD = ("__iter__", "__len__")  # of a container: how much there is to compare
HELD_BY_NAME = frozenset({"keys", "values", "items", "elements", "most_common", "total"})  # likewise
CONTAINERS = (("Mapping", dict), ("Set", set), ("MutableSequence", list))
Ask = Callable[..., Any]  # of an object, an operator's name and its operands


def _special(value: Any, name: str, *args: Any) -> Any:
    return ask(value, "special", name, *args)


def _unary(name: str, by: Ask = _special) -> Callable[..., Any]:
    def forward(self: Any, *args: Any) -> Any:
        return by(self, name, *args)

    return forward


def _number(name: str, by: Ask = _special) -> Callable[[Any], Any]:
    """What an object is worth as a number. One that a function returned says it once, until its attributes are used:
    another value at each look would pass tests that put an answer into a formula."""

    def forward(self: Any) -> Any:
        if is_trusted(self):
            return by(self, name)
        base = type(self)._fastgrpo_base_
        if base in (int, float, complex) and hasattr(base, name):
            return getattr(base, name)(self)
        said = object.__getattribute__(self, "_fastgrpo_numbers_") or {}
        if name not in said:
            said = {**said, name: by(self, name)}
            object.__setattr__(self, "_fastgrpo_numbers_", said)
        return said[name]

    return forward


def _held(name: str, base: type) -> Callable[..., Any]:
    """Of an object of the solution's that is a plain container too, what that holds: one that a function returned would
    show each look something else, and `len(got) == len(wanted) and all(map(same, got, wanted))` nothing."""
    plain, special = getattr(base, name), FORWARDERS[name]

    def forward(self: Any) -> Any:
        return special(self) if _says_what_it_holds(self) else plain(self)

    return forward


class Contents(Forwarder):
    """A method of such a container that shows what it holds, as a dict's `items`: `_held`, by name."""

    def __init__(self, name: str, base: type) -> None:
        plain = getattr(base, name)

        def get(value: Any) -> Any:
            return ask(value, "get", name) if _says_what_it_holds(value) else plain.__get__(value)

        property.__init__(self, get)


def _says_what_it_holds(value: Any) -> bool:
    """Whether a container's own class is asked: where this side made the object, or has nothing to keep from it."""
    return object.__getattribute__(value, "_fastgrpo_made_") or not is_guarded(value)


def _binary(name: str, by: Ask = _special) -> Callable[..., Any]:
    def forward(self: Any, other: Any, *more: Any) -> Any:
        if not may_see(self, other):
            return _as_plain(self, name, other, *more)
        return trust(by(self, name, other, *more), is_trusted(self))

    return forward


def _order(name: str, by: Ask = _special) -> Callable[[Any, Any], Any]:
    def forward(self: Any, other: Any) -> Any:
        equality = name in ("__eq__", "__ne__")
        if place_of(other) is None and (equality or not may_see(self, other)):
            return _as_plain(self, name, other)
        return by(self, name, other)

    return forward


def _as_plain(self: Any, name: str, *others: Any) -> Any:
    """What the plain type that `self` also is answers. The items of one of the library's abstract containers are
    compared here."""
    base = type(self)._fastgrpo_base_
    if base is object and name in ("__eq__", "__ne__"):
        plain = next((plain for kind, plain in CONTAINERS if kind in _library_names(self)), None)
        if plain is not None and type(others[0]) is plain:
            items = ask(self, "get", "items")() if plain is dict else self
            return (plain(items) == others[0]) is (name == "__eq__")
    if base is Counter:  # its operators look at themselves by methods that a subclass may have
        self = Counter(dict(dict.items(self)))
    operator = getattr(base, name, None)
    return NotImplemented if base is object or operator is None else operator(self, *others)


def _library_names(self: Any) -> set[str]:
    mro = type.__dict__["__mro__"].__get__(type(self))
    return {each.__name__ for each in mro if each.__module__ == "collections.abc"}


def _call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    return trust(invoke(self, args, kwargs), False)


def _containing(by: Ask = _special) -> Callable[[Any, Any], bool]:
    def contains(self: Any, item: Any) -> bool:
        """By iteration where this side did not make the object: an item may be the wanted one."""
        if may_see(self, item):
            return by(self, "__contains__", item)
        base = type(self)._fastgrpo_base_
        if base in CONSTANT and hasattr(base, "__contains__"):
            return base.__contains__(self, item)
        if not any(holder_of(type(self), name) for name in ("__iter__", "__getitem__")):
            raise TypeError("an object that a function returned does not say what it holds: it cannot be iterated over")
        return any(item is each or item == each for each in self)

    return contains


def _exiting(name: str, by: Ask = _special) -> Callable[..., Any]:
    """The end of a `with`. A traceback stays in its own process, and what the tests themselves found to be wrong is not
    for the solution to end."""

    def leave(self: Any, kind: Any, error: Any, trace: Any) -> Any:
        found = by(self, name, kind, error, None)
        if not _is_finding(self, error, trace):
            return found
        return False if name == "__exit__" else _in_vain(found)

    return leave


async def _in_vain(waiting: Any) -> bool:
    await waiting
    return False


def _is_finding(self: Any, error: Any, trace: Any) -> bool:
    """Whether an error is a failed assertion of this side's, and not one that the other side raised."""
    if not (isinstance(error, AssertionError) and is_guarded(self)):
        return False
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or trace.tb_frame.f_globals.get("__name__") != f"{__package__}.peer"


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
    found |= {name: _number(name, by) for name in NUMBERS}
    found |= {"__contains__": _containing(by)} | {name: _exiting(name, by) for name in ("__exit__", "__aexit__")}
    return found | {"__call__": _call, "__await__": awaited}


FORWARDERS = forwarders()


class Form(NamedTuple):
    """How a class of the other side is: the plain type or exception that it derives from, or object; the operators that
    it defines over that, and the attributes; and the library's classes that it derives from."""

    base: type
    specials: list[str]
    names: list[str]
    library: tuple[type, ...] = ()


class Twin(Forwarder):
    """An attribute that this side's class of the name has, too: the object's own, unless only that class has it."""

    def __init__(self, name: str, own: Any) -> None:
        def get(value: Any) -> Any:
            try:
                return ask(value, "get", name)
            except AttributeError:
                return own.__get__(value, type(value)) if hasattr(type(own), "__get__") else own

        property.__init__(self, get)


def _forwarder(name: str, base: type) -> Forwarder:
    is_sealed = (base in CONSTANT and hasattr(base, name)) or name in SHOWN.get(name_of(base), ())
    if name in HELD_BY_NAME and name_of(base) in HOLDING and hasattr(base, name):
        return Contents(name, base)
    return Sealed(name, base) if is_sealed else Forwarder(name)


def mirror(place: Place, name: str, bases: tuple[type, ...], form: Form, twin: type | None = None) -> type:
    """The class here of a class there; `twin` is one of this side's for which its objects are to be taken: on the
    solution's side they have what that has, too, while the judge's runs none of its own methods on them."""
    base, space = form.base, _space(place, form)
    if twin is not None:
        space["__class__"] = property(lambda self: twin)
        if not place[0].is_guarded or issubclass(base, BaseException):  # `except` asks for the type itself
            shared: dict[str, Any] = {each: Twin(each, own) for each, own in vars(twin).items() if each[:2] != "__"}
            rest = [each for each in bases if not issubclass(twin, each)]
            with contextlib.suppress(TypeError):
                return type.__new__(Mirror, name, (*rest, twin), shared | space)
    plain = (Remote, base) if base is not object else (Remote,)
    abstract = tuple(filter(is_abstract, form.library))
    for wanted, library in ((bases, form.library), (bases, abstract), (bases, ()), (plain, ())):
        try:
            return type.__new__(Mirror, name, wanted, space | {"_fastgrpo_library_": library})
        except TypeError:
            continue
    raise TypeError(f"no class can stand for {name}")


def _space(place: Place, form: Form) -> dict[str, Any]:
    """What a mirror holds itself: operators and attributes that ask the other side."""
    base = form.base
    inherited = [each for kind in form.library for each in dir(kind) if not each.startswith(("__", "_fastgrpo_"))]
    if issubclass(base, BaseException):
        inherited = [each for each in inherited if not hasattr(base, each)]
        inherited += [each for each in MEMBERS if hasattr(base, each)]
    defined = {each for kind in form.library for each, value in vars(kind).items() if value is not None}
    specials = {
        *form.specials,
        *(each for each in SPECIALS if each in defined),
    }  # none of the library's own is run here
    specials |= set(ORDER) if base is Counter else set()
    space: dict[str, Any] = {special: FORWARDERS[special] for special in specials}
    if name_of(base) in HOLDING:
        space |= {each: _held(each, base) for each in HELD if each in specials}
    space |= {each: _forwarder(each, base) for each in (*form.names, *inherited)}
    space["__doc__"] = property(lambda self: ask(self, "get", "__doc__"))
    space |= {"_fastgrpo_class_": place, "_fastgrpo_base_": base, "__module__": "solution"}
    if "__eq__" in space and "__hash__" not in space and base is not object:
        space["__hash__"] = base.__hash__
    return space
