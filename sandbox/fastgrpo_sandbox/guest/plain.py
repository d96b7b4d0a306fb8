"""Values between solution and judge: tagged JSON, so that nothing received can carry code.

Lists, strings, floats, booleans, None and 64-bit integers are themselves; every other value is an object with one key,
the name of its exact type. Values of the standard library (VALUES) are rebuilt by their own constructors. Lists, dicts
and other containers that can change (KINDS) are numbered alike on both sides in the order in which they cross, so that
the same object comes back as the same object (`{"seen": n}`), also within itself, and a change on one side can be told
to the other. What is neither, such as a function or an object, is left to the caller (peer.py).
"""

from __future__ import annotations

import gc
import importlib
import json
import marshal
import math
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

SMALL = 1 << 63
LIVE = 64  # containers that stay shared after the exchange that brought them
LARGE = 4096  # items of the largest of these
SCALARS = frozenset({type(None), bool, str, float})
CONSTANTS = {"NotImplemented": NotImplemented, "Ellipsis": Ellipsis}
LIBRARY_CONSTANTS = ("MISSING", "_FIELD", "_FIELD_CLASSVAR", "_FIELD_INITVAR")  # of dataclasses, which asks by identity
# Not as ASCII: two surrogates side by side would come back from their escapes as one character.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_decode = json.JSONDecoder(parse_constant={"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get).decode


class Kind(NamedTuple):
    """How a container is taken apart and filled: its items in a row, and what its constructor needs besides."""

    items: Callable[[Any], Sequence[Any]]
    make: Callable[[Any], Any]
    fill: Callable[[Any, Sequence[Any]], None]
    extra: Callable[[Any], Any] = lambda value: None
    given: Callable[[Any], tuple[Any, ...]] = lambda extra: ()  # of what is needed besides, the constructor's arguments


def _list_fill(value: list[Any], items: Sequence[Any]) -> None:
    list.__setitem__(value, slice(None), items)


def _pairs(value: dict[Any, Any]) -> list[Any]:
    return list(chain.from_iterable(dict.items(value)))


def _dict_fill(value: dict[Any, Any], items: Sequence[Any]) -> None:
    dict.clear(value)
    for key, item in zip(items[::2], items[1::2], strict=True):
        dict.__setitem__(value, key, item)


def _ordered_fill(value: Any, items: Sequence[Any]) -> None:
    base = _of("collections.OrderedDict")
    base.clear(value)
    for key, item in zip(items[::2], items[1::2], strict=True):
        base.__setitem__(value, key, item)


def _set_fill(value: set[Any], items: Iterable[Any]) -> None:
    set.clear(value)
    set.update(value, items)


def _bytes_fill(value: bytearray, items: Any) -> None:
    bytearray.__setitem__(value, slice(None), items)


def _array_fill(value: Any, items: Any) -> None:
    base = _of("array.array")
    base.__setitem__(value, slice(None), base(value.typecode, items))


def _array_of(form: Any) -> Any:
    """An array of numpy's of this dtype and shape, its items not yet filled in."""
    dtype, shape = form
    if type(dtype) is not str or _of("numpy.dtype")(dtype).kind not in ARRAYS:
        raise ValueError("no array of this type crosses")
    return _of("numpy.zeros")(shape, dtype)


def _numpy_fill(value: Any, items: Any) -> None:
    value[...] = _of("numpy.array")(list(items), value.dtype).reshape(value.shape)


def _attributes_fill(value: Any, items: Sequence[Any]) -> None:
    _dict_fill(vars(value), items)


def _data_fill(value: Any, items: Sequence[Any]) -> None:
    if isinstance(value.data, dict):
        _dict_fill(value.data, items)
    else:
        value.data[:] = items


def _deque_fill(value: Any, items: Iterable[Any]) -> None:
    base = _of("collections.deque")
    base.clear(value)
    base.extend(value, items)


def _of(name: str) -> Any:
    """The class of a full name, imported if need be."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _viewed(view: Any, content: Any) -> tuple[Any]:
    """The dict that a view shows, so that the view on the other side changes with it; a copy if it is of another kind,
    or the space of a class."""
    shown = [each for each in gc.get_referents(view) if type(each) is dict and "__module__" not in each]
    return (shown[0] if len(shown) == 1 else dict(content),)


def _plain_dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise TypeError("a view of what is no dict")
    return value


KINDS: dict[str, Kind] = {
    "list": Kind(lambda value: list(list.__iter__(value)), lambda _: [], _list_fill),
    "dict": Kind(_pairs, lambda _: {}, _dict_fill),
    "set": Kind(lambda value: list(set.__iter__(value)), lambda _: set(), _set_fill),
    "bytearray": Kind(lambda value: list(bytearray.__iter__(value)), lambda _: bytearray(), _bytes_fill),
    "collections.deque": Kind(
        lambda value: list(_of("collections.deque").__iter__(value)),
        lambda most: _of("collections.deque")((), most),
        _deque_fill,
        lambda value: value.maxlen,
        lambda most: ((), most),
    ),
    "collections.defaultdict": Kind(
        _pairs,
        lambda factory: _of("collections.defaultdict")(factory, ()),
        _dict_fill,
        lambda value: value.default_factory,
        lambda factory: (factory,),
    ),
    "collections.OrderedDict": Kind(
        lambda value: list(chain.from_iterable(_of("collections.OrderedDict").items(value))),
        lambda _: _of("collections.OrderedDict")(),
        _ordered_fill,
    ),
    "collections.Counter": Kind(_pairs, lambda _: _of("collections.Counter")(), _dict_fill),
    "collections.UserDict": Kind(lambda value: _pairs(value.data), lambda _: _of("collections.UserDict")(), _data_fill),
    "collections.UserList": Kind(lambda value: list(value.data), lambda _: _of("collections.UserList")(), _data_fill),
    "types.SimpleNamespace": Kind(
        lambda value: _pairs(vars(value)), lambda _: _of("types.SimpleNamespace")(), _attributes_fill
    ),
    "array.array": Kind(
        lambda value: list(_of("array.array").__iter__(value)),
        lambda code: _of("array.array")(code, ()),
        _array_fill,
        lambda value: value.typecode,
        lambda code: (code,),
    ),
    "numpy.ndarray": Kind(
        lambda value: value.ravel().tolist(), _array_of, _numpy_fill, lambda value: (value.dtype.str, value.shape)
    ),
}
ARRAYS = "biufcUS"  # the kinds of numpy's dtypes whose items are plain
NUMBERS = (
    *("bool", "bool_", "longlong", "ulonglong", "float16", "float32", "float64", "complex64", "complex128"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("str_", "bytes_"),
)
# What these hold is an attribute, for which an object of a subclass answers itself.
HOLDERS = frozenset({"collections.UserDict", "collections.UserList", "types.SimpleNamespace"})
Parts = Callable[[Any], Sequence[Any]]
_DAY = attrgetter("year", "month", "day")
_TIME = attrgetter("hour", "minute", "second", "microsecond", "tzinfo", "fold")
VALUES: dict[str, tuple[Parts, Callable[..., Any] | None]] = {  # None: the class itself
    "tuple": (lambda value: list(tuple.__iter__(value)), lambda *items: items),
    "frozenset": (lambda value: list(frozenset.__iter__(value)), lambda *items: frozenset(items)),
    "bytes": (lambda value: (bytes.hex(value),), bytes.fromhex),
    "complex": (lambda value: (value.real, value.imag), complex),
    "range": (lambda value: (value.start, value.stop, value.step), range),
    "slice": (lambda value: (value.start, value.stop, value.step), slice),
    "dict_keys": (lambda value: _viewed(value, value.mapping), dict.keys),
    "dict_values": (lambda value: _viewed(value, value.mapping), dict.values),
    "dict_items": (lambda value: _viewed(value, value.mapping), dict.items),
    "decimal.Decimal": (lambda value: (_of("decimal.Decimal").__str__(value),), None),
    "fractions.Fraction": (lambda value: (value.numerator, value.denominator), None),
    "datetime.date": (_DAY, None),
    "datetime.time": (
        _TIME,
        lambda *parts: _of("datetime.time")(*parts[:5], fold=parts[5]),
    ),
    "datetime.datetime": (
        lambda value: (*_DAY(value), *_TIME(value)),
        lambda *parts: _of("datetime.datetime")(*parts[:8], fold=parts[8]),
    ),
    "datetime.timedelta": (lambda value: (value.days, value.seconds, value.microseconds), None),
    "datetime.timezone": (lambda value: value.__getinitargs__(), None),
    "zoneinfo.ZoneInfo": (lambda value: (value.key,), None),
    "uuid.UUID": (lambda value: (value.hex,), None),
    "pathlib.PosixPath": (lambda value: (str(value),), None),
    "pathlib.PurePosixPath": (lambda value: (str(value),), None),
    "pathlib.PureWindowsPath": (lambda value: (str(value),), None),
    "collections.UserString": (lambda value: (value.data,), None),
    "mappingproxy": (lambda value: _viewed(value, value), lambda shown: types.MappingProxyType(_plain_dict(shown))),
    "memoryview": (
        lambda value: (value.tobytes(), value.format),
        lambda content, form: memoryview(content).cast(form) if content else memoryview(content),
    ),
    **{
        f"ipaddress.IPv{version}{name}": (lambda value: (str(value),), None)
        for version in (4, 6)
        for name in ("Address", "Network", "Interface")
    },
    **{f"numpy.{name}": (lambda value: (value.item(),), None) for name in NUMBERS},
    "re.Pattern": (
        lambda value: (value.pattern, value.flags),
        lambda *parts: _of("re.compile")(*parts),  # noqa: PLW0108 - imported on use
    ),
}


def name_of(kind: type) -> str:
    """The full name of a class; a builtin's is short."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_genuine(kind: type) -> bool:
    """Whether a class is what its full name says, and not one that calls itself so."""
    module = sys.modules.get(kind.__module__)
    return kind.__qualname__.startswith(("dict_", "mappingproxy")) or getattr(module, kind.__qualname__, None) is kind


class Shared:
    """The containers that both sides hold, and their items when the two last agreed."""

    def __init__(self) -> None:
        self.objects: dict[int, tuple[Any, Kind]] = {}
        self.contents: dict[int, Sequence[Any]] = {}
        self.numbers: dict[int, int] = {}  # by id()
        self.kept: set[int] = set()  # numbers of what is also an object of one side, and changes by its methods
        self.count = 0

    def add(self, value: Any, kind: Kind) -> int:
        """The next number, for `value`."""
        self.objects[self.count] = value, kind
        self.numbers[id(value)] = self.count
        self.count += 1
        return self.count - 1

    def settle(self, first: int) -> None:
        """Notes what the containers from `first` on hold now."""
        for number in range(first, self.count):
            value, kind = self.objects[number]
            self.contents[number] = kind.items(value)

    def changed(self) -> list[int]:
        """The containers whose items are others than when the two sides last agreed."""
        found = []
        for number, before in self.contents.items():
            value, kind = self.objects[number]
            now = kind.items(value)
            if len(now) != len(before) or not (all(map(is_, now, before)) or _same_numbers(now, before)):
                self.contents[number] = now
                found.append(number)
        return found

    def exchange(self, old: Any, new: Any) -> None:
        """Puts `new` in the place of `old`, which stands for the same object of the other side."""
        for number, (value, kind) in self.objects.items():
            items = kind.items(value)
            if any(each is old for each in items):
                kind.fill(value, [new if each is old else each for each in items])
                self.contents[number] = kind.items(value)

    def drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            value, _ = self.objects.pop(number)
            self.numbers.pop(id(value), None)
            self.contents.pop(number, None)

    def forget(self) -> None:
        """Drops what is old or large. Both sides do so after the same exchange."""
        oldest = self.count - LIVE
        gone = [n for n, content in self.contents.items() if n < oldest or len(content) > LARGE]
        if gone:
            self.drop(n for n in gone if n not in self.kept)


def _same_numbers(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether the items are the same floats, bit by bit: an array makes them anew each time that it is asked."""
    return set(map(type, now)) <= {float, complex} and marshal.dumps([*now], 2) == marshal.dumps([*before], 2)


Give = Callable[[Any, "Codec"], Any]
Take = Callable[[str, Any, "Codec"], Any]


def refuse(value: Any, codec: Codec) -> Any:
    raise TypeError(f"{type(value).__name__} is not plain data")


def _unknown(name: str, body: Any, codec: Codec) -> Any:
    raise ValueError(f"no value is named {name!r}")


class Codec:
    """Values to JSON and back, with what the two sides share. `give(value, codec)` makes the JSON of what is not plain,
    `take(name, body, codec)` its value."""

    def __init__(self, give: Give = refuse, take: Take = _unknown) -> None:
        self.shared = Shared()
        self._give = give
        self._take = take

    def pack(self, head: list[Any], values: Sequence[Any]) -> bytes:
        """A message: what has changed since the last one, `head`, which is JSON already, and `values`. Raises what is
        raised on the way, and then leaves what is shared as it was."""
        first = self.shared.count
        try:
            changes = self._changes() if self.shared.contents else []
            data = _encode([changes, head, [self.tag(value) for value in values]])
            return data.encode("utf-8", "surrogatepass")
        except BaseException:
            self.take_back(first)
            raise

    def _changes(self) -> list[Any]:
        shared = self.shared
        return [[number, *self._items(shared.contents[number])] for number in shared.changed()]

    def take_back(self, first: int) -> None:
        """Forgets the containers from `first` on: the message that they were in was not sent."""
        self.shared.drop(range(first, self.shared.count))
        self.shared.count = first

    def unpack(self, data: bytes) -> tuple[list[Any], list[Any]]:
        """Head and values of a message. Raises ValueError, TypeError, KeyError, AttributeError, ArithmeticError or
        RecursionError for anything malformed."""
        first = self.shared.count
        changes, head, values = _decode(data.decode("utf-8", "surrogatepass"))
        for number, *items in changes:
            value, kind = self.shared.objects[number]
            kind.fill(value, [self.untag(item) for item in items])
            self.shared.contents[number] = kind.items(value)
        found = [self.untag(value) for value in values]
        if self.shared.count > first:
            self.shared.settle(first)
        return head, found

    def tag(self, value: Any) -> Any:
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is int:
            return value if -SMALL <= value < SMALL else {"int": hex(value)}
        if kind is list:
            return self.container(value, "list")
        return self._tag_other(value, kind)

    def container(self, value: Any, name: str) -> Any:
        """The JSON of a container of one of KINDS, which a subclass' object may be, too."""
        seen = self.shared.numbers.get(id(value))
        if seen is not None:
            return {"seen": seen}
        kind = KINDS[name]
        number = self.shared.add(value, kind)
        content = self.shared.contents[number] = kind.items(value)
        items = self._items(content)
        return items if name == "list" else {name: [self.tag(kind.extra(value)), *items]}

    def _items(self, items: Sequence[Any]) -> Sequence[Any]:
        kinds = set(map(type, items))
        if kinds <= SCALARS or (kinds == {int} and min(items) >= -SMALL and max(items) < SMALL):
            return items
        return [self.tag(item) for item in items]

    def _tag_other(self, value: Any, kind: type) -> Any:
        name = name_of(kind)
        if name in KINDS and is_genuine(kind) and (name != "numpy.ndarray" or value.dtype.kind in ARRAYS):
            return self.container(value, name)
        if name in VALUES and is_genuine(kind):
            return {name: self._items(VALUES[name][0](value))}
        if value is NotImplemented or value is Ellipsis:
            return {"constant": str(value)}
        if kind.__module__ == "dataclasses":
            for constant in LIBRARY_CONSTANTS:
                if value is _of(f"dataclasses.{constant}"):
                    return {"constant": constant}
        return self._give(value, self)

    def untag(self, value: Any) -> Any:
        if type(value) is list:
            made: list[Any] = []
            self.shared.add(made, KINDS["list"])
            made += [self.untag(item) for item in value] if _nested(value) else value
            return made
        return self._untag_object(value) if type(value) is dict else value

    def _untag_object(self, value: dict[str, Any]) -> Any:
        ((name, body),) = value.items()
        if name == "int":
            return int(body, 16)
        if name == "seen":
            return self.shared.objects[body][0]
        if name == "constant":
            return _of(f"dataclasses.{body}") if body in LIBRARY_CONSTANTS else CONSTANTS[body]
        if name in KINDS:
            return self._untag_container(KINDS[name], body)
        if name in VALUES:
            build = VALUES[name][1] or _of(name)
            return build(*[self.untag(part) for part in body])
        return self._take(name, body, self)

    def _untag_container(self, kind: Kind, body: list[Any]) -> Any:
        """Numbered before its items are, as when it was taken apart."""
        made = kind.make(self.untag(body[0]))
        self.shared.add(made, kind)
        kind.fill(made, [self.untag(item) for item in body[1:]])
        return made


def _nested(items: list[Any]) -> bool:
    kinds = set(map(type, items))
    return list in kinds or dict in kinds


def pack(value: Any) -> bytes:
    """Plain data as one message of its own. Raises TypeError for anything else."""
    return Codec().pack([], [value])


def unpack(data: bytes) -> Any:
    """Inverse of pack; see Codec.unpack."""
    return Codec().unpack(data)[1][0]
