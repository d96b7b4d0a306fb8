"""Comparisons of the tests, where an array that is empty agrees with no array, list or number that is not, nor one that
masks items with what does not.

Broadcasting over an empty axis leaves nothing to compare, and so does a mask: `np.zeros((0, 1))` and `np.ma.masked`
would equal, and be close to, everything.
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "In": lambda item, among: item in among,
    "NotIn": lambda item, among: item not in among,
}
ORDERS = ("Lt", "LtE", "Gt", "GtE")
ORDERING = frozenset({"less", "less_equal", "greater", "greater_equal", "assert_array_less"})  # functions of numpy
PACKAGES = ("numpy", "pandas")
Lies = Callable[[Any, Any, bool], bool]


def no_lies(left: Any, right: Any, membership: bool) -> bool:
    """What the judge's own process need not ask."""
    return False


def compare(names: str, left: Any, *rights: Any, selects: bool = False, lies: Lies = no_lies) -> Any:
    """`left == right`, or other operators by the names of their syntax nodes; where one side `lies` the two are not
    equal, nor one in the other. What `selects` items, as in `a[a > 0]`, may find none. Raises TypeError for the order
    of two of which one lies: neither `a < b` nor `not a < b` is to hold."""
    found: Any = None
    for name, right in zip(names.split(), rights, strict=True):
        if found is not None and not found:  # as Python does, which asks the last for no truth: it may be an array
            break
        differs = name.startswith("Not")
        is_lie = lies(left, right, name in ("In", "NotIn"))
        if is_lie and name in ORDERS:
            raise TypeError(f"{type(left).__name__} and {type(right).__name__}: an object cannot answer for its order")
        found = differs if is_lie else OPERATORS[name](left, right)
        if not selects and _package(type(found)) and _is_vain(left, right) and not _is_bound(name, left, right):
            found = _each(differs, left, right)
        left = right
    return found


def subtract(left: Any, right: Any, **said: Any) -> Any:
    """`left - right`; honest.py needs what is `said` of it. Raises ValueError where one of two arrays alone is empty,
    as for other shapes that do not fit, or one of two arrays or numbers is masked."""
    found = left - right
    if _package(type(found)) and _is_vain(left, right) and not _is_bound("Sub", left, right):
        raise ValueError("operands could not be broadcast together: one is empty or masked, the other is not")
    return found


def agree(function: Callable[..., Any], /, *args: Any, lies: Lies = no_lies, **named: Any) -> Any:
    """`function(*args, **named)`, of which numpy's `allclose`, `equal` or `assert_allclose` say that two agree."""
    sides = [*args, *named.values()][:2]
    is_numpys = _package(type(function)) or (type(function) is types.FunctionType and _package(function))
    # In the judge's own process a stand-in of a few functions may be all of numpy; beside a solution nothing is.
    has_arrays = lies is not no_lies or hasattr(sys.modules.get("numpy"), "ndarray")
    if not (is_numpys and has_arrays) or len(sides) < 2:
        return function(*args, **named)
    if not lies(sides[0], sides[1], False):
        found = function(*args, **named)
        if not _is_vain(*sides) or (function.__name__ in ORDERING and _is_bound("Lt", *sides)):
            return found
    if function.__name__.startswith("assert"):
        raise AssertionError("an array that is empty, or masks items, agrees with none that is not, or does not")
    return sys.modules["numpy"].False_  # of which one may ask all()


def some(items: Iterable[Any]) -> Iterator[Any]:
    """The items, which are to be compared with some that are wanted. Raises AssertionError where there are none."""
    found = iter(items)
    for first in found:
        return chain((first,), found)
    raise AssertionError("there is nothing where the tests want something")


def _package(named: Any) -> bool:
    """Whether a class or a function is of one of PACKAGES."""
    return named.__module__.partition(".")[0] in PACKAGES if isinstance(named.__module__, str) else False


def _is_bound(name: str, left: Any, right: Any) -> bool:
    """Whether one number bounds whatever there is, as in `(result >= 0).all()`: right of a result rightly empty."""
    if name in ("Eq", "NotEq") or (_has_axes(left) and _has_axes(right)):
        return False
    return not any(_is_masked(side) and not _has_axes(side) for side in (left, right))


def _is_vain(left: Any, right: Any) -> bool:
    sizes = [_plain(side).size for side in (left, right)]
    return (0 in sizes and any(sizes)) or _masks_differ(left, right)


def _masks_differ(left: Any, right: Any) -> bool:
    """Whether one side masks an item that the other has."""
    if not (_is_masked(left) or _is_masked(right)):
        return False
    return bool(sys.modules["numpy"].any(_lacking(left) != _lacking(right)))


def _lacking(value: Any) -> Any:
    """Where a value has no item: one that is masked, or no number, which matplotlib masks in what it is given."""
    plain = _plain(value)
    nans = plain != plain if plain.dtype.kind in "fc" else False
    return sys.modules["numpy.ma"].getmaskarray(value) | nans if _is_masked(value) else nans


def _is_masked(value: Any) -> bool:
    return isinstance(value, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ()))


def _has_axes(value: Any) -> bool:
    return _plain(value).ndim > 0


def _plain(value: Any) -> Any:
    """A value as an array without what its class says of itself."""
    numpy = sys.modules["numpy"]
    try:
        return numpy.asarray(value)
    except Exception:
        return numpy.asarray(0)  # lists of several lengths, say: there is something


def _each(verdict: bool, left: Any, right: Any) -> Any:
    """The verdict, in the shape of the side that is not empty."""
    shape = next(side.shape for side in map(_plain, (left, right)) if side.size)
    return sys.modules["numpy"].full(shape, verdict)
