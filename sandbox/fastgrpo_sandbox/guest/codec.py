"""Values between solution and judge: tagged JSON, so that nothing received can carry code.

Lists, strings, floats, booleans, None and 64-bit integers are themselves; every other value is an object with one key,
the name of its exact type (plain.py). Containers that can change are numbered alike on both sides in the order in which
they cross, so that the same object comes back as the same object (`{"seen": n}`), also within itself, and a change on
one side can be told to the other. What is no plain data, such as a function or an object, is left to the caller
(objects.py).
"""

from __future__ import annotations

import json
import marshal
import math
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

from .plain import ARRAYS, KINDS, VALUES, Kind, imported, is_genuine, name_of

SMALL = 1 << 63
LIVE = 64  # containers that stay shared after the exchange that brought them
LARGE = 4096  # items of the largest of these
SCALARS = frozenset({type(None), bool, str, float})
CONSTANTS = {"NotImplemented": NotImplemented, "Ellipsis": Ellipsis}
LIBRARY_CONSTANTS = ("MISSING", "_FIELD", "_FIELD_CLASSVAR", "_FIELD_INITVAR")  # of dataclasses, which asks by identity
# Not as ASCII: two surrogates side by side would come back from their escapes as one character.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_decode = json.JSONDecoder(parse_constant={"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get).decode


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
        if name == "list":
            return self._items(content)
        # First, as it is read: an item may have the same, as a tree of defaultdicts.
        extra = self.tag(kind.extra(value))
        return {name: [extra, *self._items(content)]}

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
                if value is imported(f"dataclasses.{constant}"):
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
            return imported(f"dataclasses.{body}") if body in LIBRARY_CONSTANTS else CONSTANTS[body]
        if name in KINDS:
            return self._untag_container(KINDS[name], body)
        if name in VALUES:
            build = VALUES[name][1] or imported(name)
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
