"""Plain data that crosses between solution and judge: how each type is taken apart and made again.

KINDS are the containers that can change, VALUES what cannot; both have types by their exact names and rebuild them by
the standard library's own constructors. codec.py brings their parts across.
"""

from __future__ import annotations

import gc
import importlib
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """How a container is taken apart and filled: its items in a row, and what its constructor needs besides."""

    items: Callable[[Any], Sequence[Any]]
    make: Callable[[Any], Any]
    fill: Callable[[Any, Sequence[Any]], None]
    extra: Callable[[Any], Any] = lambda value: None
    given: Callable[[Any], tuple[Any, ...]] = lambda extra: ()  # of what is needed besides, the constructor's arguments


def imported(name: str) -> Any:
    """What has this full name, imported if need be."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


# ---- containers: the base's own methods do it, whatever a subclass has ----


def _pairs(value: dict[Any, Any]) -> list[Any]:
    return list(chain.from_iterable(dict.items(value)))


def _fill_list(value: list[Any], items: Sequence[Any]) -> None:
    list.__setitem__(value, slice(None), items)


def _fill_dict(value: dict[Any, Any], items: Sequence[Any], base: Any = dict) -> None:
    base.clear(value)
    for key, item in zip(items[::2], items[1::2], strict=True):
        base.__setitem__(value, key, item)


def _fill_ordered(value: Any, items: Sequence[Any]) -> None:
    _fill_dict(value, items, imported("collections.OrderedDict"))


def _fill_set(value: set[Any], items: Iterable[Any]) -> None:
    set.clear(value)
    set.update(value, items)


def _fill_bytes(value: bytearray, items: Any) -> None:
    bytearray.__setitem__(value, slice(None), items)


def _fill_deque(value: Any, items: Iterable[Any]) -> None:
    base = imported("collections.deque")
    base.clear(value)
    base.extend(value, items)


def _fill_array(value: Any, items: Any) -> None:
    base = imported("array.array")
    base.__setitem__(value, slice(None), base(value.typecode, items))


def _fill_attributes(value: Any, items: Sequence[Any]) -> None:
    _fill_dict(vars(value), items)


def _fill_data(value: Any, items: Sequence[Any]) -> None:
    if isinstance(value.data, dict):
        _fill_dict(value.data, items)
    else:
        value.data[:] = items


def _make_numpy(form: Any) -> Any:
    """An array of numpy's of this dtype and shape, its items not yet filled in."""
    dtype, shape = form
    if type(dtype) is not str or imported("numpy.dtype")(dtype).kind not in ARRAYS:
        raise ValueError("no array of this type crosses")
    return imported("numpy.zeros")(shape, dtype)


def _fill_numpy(value: Any, items: Any) -> None:
    value[...] = imported("numpy.array")(list(items), value.dtype).reshape(value.shape)


KINDS: dict[str, Kind] = {
    "list": Kind(lambda value: list(list.__iter__(value)), lambda _: [], _fill_list),
    "dict": Kind(_pairs, lambda _: {}, _fill_dict),
    "set": Kind(lambda value: list(set.__iter__(value)), lambda _: set(), _fill_set),
    "bytearray": Kind(lambda value: list(bytearray.__iter__(value)), lambda _: bytearray(), _fill_bytes),
    "collections.deque": Kind(
        lambda value: list(imported("collections.deque").__iter__(value)),
        lambda most: imported("collections.deque")((), most),
        _fill_deque,
        lambda value: value.maxlen,
        lambda most: ((), most),
    ),
    "collections.defaultdict": Kind(
        _pairs,
        lambda factory: imported("collections.defaultdict")(factory, ()),
        _fill_dict,
        lambda value: value.default_factory,
        lambda factory: (factory,),
    ),
    "collections.OrderedDict": Kind(
        lambda value: list(chain.from_iterable(imported("collections.OrderedDict").items(value))),
        lambda _: imported("collections.OrderedDict")(),
        _fill_ordered,
    ),
    "collections.Counter": Kind(_pairs, lambda _: imported("collections.Counter")(), _fill_dict),
    "collections.UserDict": Kind(
        lambda value: _pairs(value.data), lambda _: imported("collections.UserDict")(), _fill_data
    ),
    "collections.UserList": Kind(
        lambda value: list(value.data), lambda _: imported("collections.UserList")(), _fill_data
    ),
    "types.SimpleNamespace": Kind(
        lambda value: _pairs(vars(value)), lambda _: types.SimpleNamespace(), _fill_attributes
    ),
    "array.array": Kind(
        lambda value: list(imported("array.array").__iter__(value)),
        lambda code: imported("array.array")(code, ()),
        _fill_array,
        lambda value: value.typecode,
        lambda code: (code,),
    ),
    "numpy.ndarray": Kind(
        lambda value: value.ravel().tolist(), _make_numpy, _fill_numpy, lambda value: (value.dtype.str, value.shape)
    ),
}
ARRAYS = "biufcUS"  # the kinds of numpy's dtypes whose items are plain
# What these hold is an attribute, for which an object of a subclass answers itself.
HOLDERS = frozenset({"collections.UserDict", "collections.UserList", "types.SimpleNamespace"})


# ---- values ----


def _viewed(view: Any, content: Any) -> tuple[Any]:
    """The dict that a view shows, so that the view on the other side changes with it; a copy if it is of another kind,
    or the space of a class."""
    shown = [each for each in gc.get_referents(view) if type(each) is dict and "__module__" not in each]
    return (shown[0] if len(shown) == 1 else dict(content),)


def _plain_dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise TypeError("a view of what is no dict")
    return value


NUMBERS = (
    *("bool", "bool_", "longlong", "ulonglong", "float16", "float32", "float64", "complex64", "complex128"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("str_", "bytes_"),
)
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
    "decimal.Decimal": (lambda value: (imported("decimal.Decimal").__str__(value),), None),
    "fractions.Fraction": (lambda value: (value.numerator, value.denominator), None),
    "datetime.date": (_DAY, None),
    "datetime.time": (
        _TIME,
        lambda *parts: imported("datetime.time")(*parts[:5], fold=parts[5]),
    ),
    "datetime.datetime": (
        lambda value: (*_DAY(value), *_TIME(value)),
        lambda *parts: imported("datetime.datetime")(*parts[:8], fold=parts[8]),
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
        lambda *parts: imported("re.compile")(*parts),  # noqa: PLW0108 - imported on use
    ),
}


def name_of(kind: type) -> str:
    """The full name of a class; a builtin's is short."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_genuine(kind: type) -> bool:
    """Whether a class is what its full name says, and not one that calls itself so."""
    module = sys.modules.get(kind.__module__)
    return kind.__qualname__.startswith(("dict_", "mappingproxy")) or getattr(module, kind.__qualname__, None) is kind
