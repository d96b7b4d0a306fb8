"""What cannot cross as plain data: lent under a number by the side that owns it, a proxy (remote.py) on the other.

On the wire (codec.py) it is an object with one key, which says what its body is:

    mine                 an object of the sender's: its number, and the first time what makes a proxy of it
    yours                one of the receiver's: its number, or the solution's name for it
    class                a class of the sender's, described likewise
    type, function       a class or function of the standard library, by name
    error                an exception of the library's
    alias, slot, code    what annotations, operators and signatures are made of

The judge's side is guarded: modules, frames, code and tracebacks never leave it, since the wanted values lie behind
them, and the solution's word is not enough to name one of the library's functions here, or a class that is no value's.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import types
from collections.abc import Callable, Iterable
from typing import Any

from . import mirrors, remote
from .allowed import TESTS
from .annotations import alias, alias_parts
from .codec import Codec
from .kinds import PROXIES
from .known import (
    KEPT_BACK,
    behind,
    differs,
    known,
    known_name,
    library_bases,
    library_place,
    overridden,
    plain_base,
    plain_parts,
    plain_state,
)
from .plain import KINDS, name_of
from .raised import Errors

DESCRIBED = {  # by their exact types
    types.FunctionType: "function",
    types.MethodType: "method",
    types.BuiltinFunctionType: "builtin",
    types.MethodWrapperType: "builtin",
    types.GeneratorType: "generator",
    types.CoroutineType: "coroutine",
    property: "property",
    staticmethod: "staticmethod",
    classmethod: "classmethod",
}
CODE = ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_nlocals", "co_flags", "co_varnames", "co_name")
# What every class has of object, if it has none of its own.
SLOTS = {name: value for name, value in vars(object).items() if type(value) is types.WrapperDescriptorType}


OWN = ("solution", TESTS)  # modules of the classes that a side has defined itself


class Held:
    """A value that the solution may pass on without reading it."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value


class Objects:
    """The objects that one side has lent, and its proxies of the other side's. `named` finds the solution's names; the
    judge's side, which is guarded, has none."""

    def __init__(self, peer: Any, named: Callable[[str], Any] | None) -> None:
        self._peer = peer
        self._named = named
        self.is_guarded = named is None
        self.lent: list[Any] = []
        self._numbers: dict[Any, int] = {}  # of lent objects, by `_key`
        self._told: set[int] = set()  # numbers that the other side has heard of
        self._telling: list[int] = []
        self._proxies: dict[Any, Any] = {}
        self._came: list[type] = []  # classes of the other side's in its last message
        self._errors = Errors()
        self._functions: dict[Any, Any] = {}  # the library's that the guarded side has named: by name, there by id()

    def sent(self) -> None:
        """The message in which new objects were lent has left."""
        if self._telling:
            self._told.update(self._telling)
            self._telling.clear()

    def take_back(self, known: int) -> None:
        """The message was not sent: the objects from `known` on are as if never lent."""
        self._telling.clear()
        for value in self.lent[known:]:
            del self._numbers[_key(value)]
        del self.lent[known:]

    def give(self, value: Any, codec: Codec) -> Any:
        """The JSON of a value that is no plain data. Raises TypeError for what stays in its process."""
        place = remote.place_of(value)
        if place is not None:
            remote.hand_over(value)
            return {"yours": place[1]}
        parts = alias_parts(value)
        if parts is not None:
            return {"alias": [codec.tag(part) for part in parts]}
        if isinstance(value, type):
            name = known_name(value)
            return {"type": name} if name else {"class": self._class(value)}
        if isinstance(value, BaseException) and known_name(type(value)):
            named = known_name(type(value)), value.args, plain_state(value)
            return {"error": [*self._errors.number(value), *map(codec.tag, named)]}
        if isinstance(value, types.CodeType):
            return {"code": [codec.tag(getattr(value, name)) for name in CODE]}
        if type(value) is types.WrapperDescriptorType and value in SLOTS.values():
            return {"slot": value.__name__}
        if isinstance(value, KEPT_BACK):
            raise TypeError(f"a {type(value).__name__} stays in its own process")
        if self.is_guarded and isinstance(value, types.BuiltinFunctionType | types.FunctionType):
            library = library_place(value)
            if library:
                self._functions[library] = value
                return {"function": library}
        if id(value) in self._functions:
            return {"function": self._functions[id(value)]}
        number = self._lend(value)
        if number in self._told or number in self._telling:
            return {"mine": [number]}
        self._telling.append(number)
        member = [value.value if isinstance(value, enum.Flag) else value.name] if isinstance(value, enum.Enum) else []
        return {"mine": [number, *self._described(value, codec), *member]}

    def _lend(self, value: Any) -> int:
        number = self._numbers.setdefault(_key(value), len(self.lent))
        if number == len(self.lent):
            self.lent.append(value)
        return number

    def _described(self, value: Any, codec: Codec) -> list[Any]:
        """A kind of proxy; or a class, and the plain value that the object also is."""
        kind = type(value)
        if kind in DESCRIBED:
            return [DESCRIBED[kind]]
        if kind.__module__ == "builtins" and hasattr(kind, "__await__"):
            return ["awaitable"]
        if hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
            return ["iterator", library_place(kind) or ""]
        base = plain_base(kind)
        described = self._class(kind)
        if base is object:
            return [described, *self._posing(value, kind)]
        if issubclass(base, BaseException):
            return [described, [codec.tag(each) for each in value.args]]
        name = name_of(base)
        if name in KINDS:
            content = codec.container(value, name)
            codec.shared.kept.add(codec.shared.numbers[id(value)])
            return [described, content]
        return [described, [codec.tag(each) for each in plain_parts(value, base)]]

    def _posing(self, value: Any, kind: type) -> list[Any]:
        """The solution's class that a mock of the tests was told to be like, or the library's that the object is of."""
        place = remote.place_of(value.__class__) if self.is_guarded and value.__class__ is not kind else None
        return [library_place(kind) or ""] if place is None else [place[1]]

    def _class(self, kind: type) -> list[Any]:
        """The number of a class, and the first time what makes a mirror of it."""
        number = self._lend(kind)
        if number in self._told or number in self._telling:
            return [number]
        self._telling.append(number)
        base = plain_base(kind)
        bases = [self._class(each) for each in kind.__bases__ if known_name(each) is None and each is not object]
        names = [] if base is object else sorted(overridden(kind, base))
        specials = [each for each in remote.SPECIALS if differs(kind, base, each)]
        if kind.__hash__ is None and "__hash__" in specials:
            specials.remove("__hash__")
        plain = None if base is object else known_name(base)
        return [number, kind.__name__, bases, plain, specials, names, library_bases(kind, base)]

    def take(self, name: str, body: Any, codec: Codec) -> Any:
        """Inverse of `give`, on the other side; what it raises for anything malformed is peer.py's MALFORMED."""
        match name:
            case "yours":
                found = self._named(body) if isinstance(body, str) else self.lent[body]  # type: ignore[misc]
                return found._value if type(found) is Held else found
            case "type":
                return known(body)
            case "error":
                return self._errors.received(*map(codec.untag, body))
            case "class":
                self._came.append(self._mirror(*body))
                return self._came[-1]
            case "function" if not self.is_guarded:
                module, _, own = body.rpartition(".")
                found = getattr(importlib.import_module(module), own)
                self._functions[id(found)] = body
                return found
            case "function":
                return self._functions[body]  # none but those that this side has named itself
            case "alias":
                return alias(*map(codec.untag, body))
            case "slot":
                return SLOTS[body]
            case "code":
                return _signature_code(map(codec.untag, body))
            case "mine":
                return self._proxy(codec, *body)
        raise ValueError(f"no value is named {name!r}")

    def name_classes(self, named: Any = None) -> None:
        """Notes of the classes in the last message that the tests wrote no name for them, but for `named`. What one of
        the others makes is not trusted (remote.py): `f(1)` may be a call of a class, and `circle.area()`."""
        for each in self._came:
            is_named = each is named and remote.space_of(each).get("_fastgrpo_named_", True)
            type.__setattr__(each, "_fastgrpo_named_", is_named)
        self._came.clear()

    def replace(self, place: Any, proxy: Any) -> None:
        """Takes another proxy for the object at `place`."""
        self._proxies[place[1]] = proxy

    def _proxy(self, codec: Codec, number: int, kind: Any = None, content: Any = (), member: Any = None) -> Any:
        if number in self._proxies:
            return self._proxies[number]
        if isinstance(kind, str):
            made = remote.proxy(PROXIES[kind], (self._peer, number))
            _liken(made, content)
        else:
            mirror = self._mirror(*kind)
            own = None if member is None else self._member(mirror.__name__, member)
            made = self._instance(codec, mirror, number, content) if own is None else own
        self._proxies[number] = made
        return made

    def _member(self, name: str, member: Any) -> Any:
        """A member of this side's own enumeration of the name, as of a `Color` that both begin with, or None."""
        found = self._peer.own_names.get(name)
        if type(found) is not enum.EnumType or found.__module__ not in OWN:
            return None
        with contextlib.suppress(ValueError):
            return found.__members__.get(member) if isinstance(member, str) else found(member)
        return None

    def _instance(self, codec: Codec, kind: Any, number: int, content: Any) -> Any:
        base = kind._fastgrpo_base_
        if isinstance(content, str) or (isinstance(content, int) and not self.is_guarded):
            made = remote.proxy(kind, (self._peer, number))
            _liken(made, content if isinstance(content, str) else self.lent[content])
            return made
        if name_of(base) not in KINDS or base is object:
            args = tuple(codec.untag(each) for each in content)
            return remote.proxy(kind, (self._peer, number), (args,) if base in (tuple, frozenset) else args)
        shared, container = codec.shared, KINDS[name_of(base)]
        extra, *items = [None, *content] if isinstance(content, list) else next(iter(content.values()))
        args = container.given(codec.untag(extra))
        made = remote.proxy(kind, (self._peer, number), args)
        if base.__init__ is not object.__init__:
            base.__init__(made, *args)
        shared.kept.add(shared.add(made, container))
        container.fill(made, [codec.untag(each) for each in items])
        return made

    def _mirror(self, number: int, *description: Any) -> type:
        if number in self._proxies:
            return self._proxies[number]
        name, bases, base_name, specials, names, library = description
        if any(each.startswith("_") for each in names):
            raise ValueError("a class cannot say how it is looked at")
        base = object if base_name is None else known(base_name)
        if base is not object and plain_base(base) is not base:
            raise ValueError(f"{base_name} is no plain type")
        parents = tuple(self._mirror(*each) for each in bases)
        kinds = tuple(each for each in (base,) if base is not object and not any(issubclass(p, base) for p in parents))
        form = mirrors.Form(base, specials, names, tuple(each for each in map(behind, library) if each is not None))
        wanted = (*(parents or (remote.Remote,)), *kinds)
        made = mirrors.mirror((self._peer, number), str(name), wanted, form, self._twin(name))
        self._proxies[number] = made
        return made

    def _twin(self, name: str) -> type | None:
        """This side's own class of the name, as of a `TreeNode` that solution and tests both begin with. In one program
        the two are one: an object of either is an instance of it."""
        found = self._peer.own_names.get(name)
        is_own = isinstance(found, type) and not isinstance(found, remote.Mirror) and found.__module__ in OWN
        return found if is_own else None


def _key(value: Any) -> Any:
    """An object's id(); of a method, which is made anew each time, whose it is and which."""
    if type(value) is types.MethodType:
        return id(value.__self__), id(value.__func__)
    return (id(value.__self__), value.__name__) if type(value) is types.BuiltinFunctionType else id(value)


def _liken(proxy: Any, kind: Any) -> None:
    if kind:
        object.__setattr__(proxy, "_fastgrpo_like_", kind)


def _signature_code(values: Iterable[Any]) -> types.CodeType:
    """Code that does nothing and looks, to whoever asks for a signature, like the other side's."""
    return (lambda: None).__code__.replace(**dict(zip(CODE, values, strict=True)))
