"""Comparisons of unittest tests that share a process with the solution: an object whose class answers for its own
equality or order in code that is neither the library's nor the tests' is not compared with what has none such.

`Y() == 2`, where Y equals everything, is the cheapest of forged passes. Two objects of that sort are compared as they
wish: the tests mean the class that they construct. This module cannot hold against code that sets out to deceive it.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from . import arrays

FROZEN = "<frozen "  # begins the file of what the interpreter brings along
LIBRARY = (os.path.dirname(os.__file__) + "/", "/jail/")
DECIDING = (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__sub__", "__rsub__", "__abs__", "__round__"),
    *("__array_function__", "__array_ufunc__"),  # which numpy asks
)
# Of unittest.TestCase, after "assert".
COMPARING = (
    *("Equal", "Equals", "AlmostEqual", "AlmostEquals", "CountEqual", "ListEqual", "TupleEqual", "DictEqual"),
    *("SetEqual", "SequenceEqual", "MultiLineEqual", "Greater", "GreaterEqual", "Less", "LessEqual", "In", "NotIn"),
    "DictContainsSubset",
)
HOLDING = ("__contains__", "__iter__", "__getitem__", "__len__")
# What a class of numpy's or pandas' may have of its own without a word about what its objects equal.
NEUTRAL = frozenset({"__module__", "__doc__", "__init__", "__new__", "__repr__", "__str__", "__hash__", "__slots__"})
NEUTRAL |= {"__annotations__", "__orig_bases__", "__parameters__", "__abstractmethods__", "_abc_impl", "__weakref__"}
ASKED_FIRST = ("__getattr__", "__getattribute__", "__missing__", "__dict__", "__class__")
FUNCTION = types.FunctionType
NO_WORD = (FUNCTION, types.GetSetDescriptorType, types.MemberDescriptorType)  # of which the last are looked into
LOOKED_THROUGH = ("CountEqual", "SequenceEqual", "SetEqual")
CONTAINERS = (list, tuple, dict, set, frozenset)
# What leads from a value to the rest of the program.
APART = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(types.CodeType, types.FrameType, types.TracebackType, types.CoroutineType),
)
# What may be put into a class of the library's and is none of its methods.
PUT = (
    *(functools.partial, functools.partialmethod, staticmethod, classmethod),
    *(types.BuiltinFunctionType, types.MethodType),
)
PLAIN = frozenset(map(id, (int, float, complex, bool, str, bytes, types.NoneType)))  # a metaclass has == and hash()
MOST_PARTS = 20_000  # of the library's objects that are looked into for one value
_named: frozenset[str] = frozenset()
_codes: frozenset[types.CodeType] = frozenset()


def guard(case: type, classes: frozenset[str], tests: types.CodeType) -> None:
    """Makes the comparing assertions of unittest.TestCase fail on such objects, and unittest's own `_ShouldStop`, which
    passes the test that raises it, an exception like any other. `classes` are those of the solution's that the tests
    name, and so mean as they are."""
    global _named, _codes  # set once a job, and watched like what else is here
    _named, _codes = classes, frozenset(_codes_in(tests))
    sys.modules[case.__module__]._ShouldStop = ()  # type: ignore[attr-defined]  # `except ()` catches nothing
    for name in COMPARING:
        method = getattr(case, f"assert{name}", None)
        if method is not None:
            setattr(case, f"assert{name}", _guarded(method, name))


def _codes_in(code: types.CodeType) -> Iterable[types.CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _codes_in(each)


def _guarded(method: Callable[..., None], name: str) -> Callable[..., None]:
    @functools.wraps(method)
    def assertion(self: Any, *args: Any, **named: Any) -> None:
        if len(args) > 1 and name in ("In", "NotIn"):
            args = (args[0], among(args[0], args[1]), *args[2:])
        elif name in LOOKED_THROUGH:
            look = _LOOKS.get(name, _looked_through)
            args = (*map(look, args[:2]), *args[2:])
        if len(args) > 1 and name != "NotIn" and lies(args[0], args[1], name == "In"):
            self.fail(
                f"{type(args[0]).__name__} and {type(args[1]).__name__}: an object cannot answer for its equality"
            )
        method(self, *args, **named)

    return assertion


def compare(names: str, left: Any, *rights: Any, selects: bool = False) -> Any:
    """`arrays.compare`, where one side that decides alone lies."""
    if names in ("In", "NotIn"):
        rights = (among(left, *rights),)
    return arrays.compare(names, left, *rights, selects=selects, lies=lies)


def subtract(left: Any, right: Any, *, sized: bool = False, made: tuple[bool, bool] = (False, False)) -> Any:
    """`arrays.subtract`. Raises TypeError where an object of one side's would make a number of the wanted one, at once
    or where the difference is `sized`, by `abs` or the like. One of a class that the tests name may make another
    object, and where the tests have `made` it, left or right, by calling a class, whatever it likes."""
    own = [_has_own(kind, ("__sub__", "__rsub__")) for kind in map(type, (left, right))]
    if own[0] == own[1]:
        return arrays.subtract(left, right)
    is_made = made[own.index(True)]
    if (is_made or not sized) and _is_named(type(left if own[0] else right)):
        found = arrays.subtract(left, right)
        if is_made or not (id(type(found)) in PLAIN or _is_number(type(found))):
            return found
    raise TypeError(f"{type(left).__name__} - {type(right).__name__}: an object cannot answer for its difference")


def _is_number(kind: type) -> bool:
    """Whether a class is, or is derived from, one of the library's that is worth a number."""
    return any(
        name in vars(each) and _is_of_library(each) for each in kind.__mro__ for name in ("__float__", "__complex__")
    )


def agree(function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    """`arrays.agree`, likewise."""
    return arrays.agree(function, *args, lies=lies, **named)


def among(item: Any, container: Any) -> Any:
    """What `item` is looked for in: of a container that answers for itself, or holds what does, the items with which
    it may be compared."""
    looked = _looked_through(container)
    if hasattr(type(looked), "__next__"):
        return (each for each in looked if not lies(item, each))
    if id(type(looked)) in PLAIN or not _holds(looked) or not hasattr(type(looked), "__iter__"):
        return looked
    return [each for each in looked if not lies(item, each)]


def _looked_through(container: Any) -> Any:
    """The items of a container of the solution's, or its text, whatever it says that it holds. Raises TypeError for one
    that cannot be iterated over."""
    kind = type(container)
    if not _has_own(kind, HOLDING) or _is_named(kind):
        return container
    if isinstance(container, str):
        return str.__str__(container)
    base = next((each for each in (*CONTAINERS, bytes) if isinstance(container, each)), None)
    return list(container if base is None else base.__iter__(container))


def _items(container: Any) -> Any:
    """As `_looked_through`; of an iterator, what it gives."""
    return list(container) if hasattr(type(container), "__next__") else _looked_through(container)


def _set(container: Any) -> Any:
    """As `_looked_through`; of what has a difference of its own, a set of that."""
    kind = type(container)
    if not _has_own(kind, (*HOLDING, "difference")) or _is_named(kind):
        return container
    return set(set.__iter__(container) if isinstance(container, set) else container)


_LOOKS = {"CountEqual": _items, "SetEqual": _set}


def _is_named(kind: type) -> bool:
    return any(each.__name__ in _named for each in kind.__mro__)


def lies(left: Any, right: Any, membership: bool = False) -> bool:
    """Whether one side alone has, or holds, an object that answers for itself; of a membership, the member alone."""
    if left is right:
        return False
    return (_answers(left) and not _answers(right)) or (not membership and _answers(right) and not _answers(left))


def _answers(value: Any) -> bool:
    """Whether a value, or what it is compared by, is an object that answers for itself."""
    return id(type(value)) not in PLAIN and (
        _is_own(type(value)) or (not _is_by_identity(type(value)) and _holds(value))
    )


def is_lie(given: Any, wanted: Any) -> bool:
    """Whether an argument of a mock's call answers for itself where what is wanted there does not, nor is an object of
    a class of the tests' whose `==` says that it is this."""
    if not lies(given, wanted, True):
        return False
    equal: Any = getattr(type(wanted), "__eq__", None)
    try:
        return getattr(equal, "__code__", None) not in _codes or equal(wanted, given) is not True
    except Exception:  # as of what is no such object
        return True


def _holds(value: Any) -> bool:
    """Whether a value holds an object that answers for itself: any part of an object of the library's may be compared,
    but of what is in a list only what is not compared by identity."""
    known: dict[int, tuple[bool, bool]] = {}  # of each class, by id()
    waiting, seen, room = [(value, not isinstance(value, CONTAINERS))], {id(value)}, MOST_PARTS
    while waiting and room:
        item, is_within = waiting.pop()
        parts = _parts(item)
        if PLAIN.issuperset(map(id, map(type, parts))):
            continue
        for part in parts:
            kind = type(part)
            if id(kind) in PLAIN or id(part) in seen:
                continue
            if id(kind) not in known:
                known[id(kind)] = _is_own(kind), _is_by_identity(kind)
            is_own, is_by_identity = known[id(kind)]
            if is_own:  # a class, too, may have a metaclass that answers for it
                return True
            if isinstance(part, APART):
                continue
            if is_within or not is_by_identity:
                seen.add(id(part))
                waiting.append((part, is_within or not isinstance(part, CONTAINERS)))
        room -= is_within
    return False


def _parts(value: Any) -> list[Any]:
    """What a value refers to, whatever its class says of it."""
    kind = type(value)
    if kind is weakref.ProxyType or kind is weakref.CallableProxyType:
        return [_referent(value)]
    array: Any = getattr(sys.modules.get("numpy"), "ndarray", None)
    if array is not None and isinstance(value, array):
        return array.tolist(array.ravel(value)) if array.dtype.__get__(value).hasobject else []
    found = gc.get_referents(value)
    if not isinstance(value, CONTAINERS) and not _is_of_library(kind):  # the library's == of it asks for these
        if isinstance(value, Mapping):
            found += [part for pair in value.items() for part in pair]
        elif isinstance(value, Set):
            found += [*value]
    return found


def _referent(proxy: Any) -> Any:
    """The object behind a weak proxy, which is asked for one of its methods."""
    try:
        return proxy.__reduce_ex__.__self__
    except AttributeError:
        return None


def _is_by_identity(kind: type) -> bool:
    return _defined(kind, "__eq__")[0][0] is object


def _is_own(kind: type) -> bool:
    return _is_mock(kind) or _has_own(kind, DECIDING) or _directs(kind)


def _directs(kind: type) -> bool:
    """Whether a class of the solution's tells a comparison of the library's what it finds: one in Python, which looks
    at its objects by names that the class may have put in its own words, or numpy's and pandas', which ask by many."""
    if _is_of_library(kind) or _is_named(kind):
        return False
    owner = next((each for each in kind.__mro__ if _is_of_library(each)), object)
    if owner.__module__ == "collections.abc":  # whose items are looked through
        return False
    by = {each.__module__ for name in DECIDING for each, found in _defined(owner, name) if type(found) is FUNCTION}
    is_package = owner.__module__.partition(".")[0] in arrays.PACKAGES
    if not (by or is_package):
        return False
    asked = (_asked_by(owner) if not is_package else {*dir(owner)}).union(ASKED_FIRST) - NEUTRAL
    parts = [item for each in kind.__mro__[: kind.__mro__.index(owner)] for item in vars(each).items()]
    own = [value for name, value in parts if name in asked and id(type(value)) not in PLAIN]
    if any(type(value) not in NO_WORD for value in own):
        return True
    functions = [value for value in own if type(value) is FUNCTION and value.__code__ not in _codes]
    return by != {"collections.abc"} and bool(functions)


def _asked_by(kind: type) -> set[str]:
    """The names by which the comparisons of a class of the library's, in Python, ask its objects: those that its
    methods read, and the methods of these names in turn."""
    found, waiting = set[str](), [*DECIDING, *HOLDING]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            methods = [getattr(each, "fget", each) for _, each in _defined(kind, name)]
            codes = [code for each in methods if type(each) is FUNCTION for code in _codes_in(each.__code__)]
            waiting += [read for code in codes for read in code.co_names]
    return found


def _has_own(kind: Any, names: tuple[str, ...]) -> bool:
    """Whether a class has some of these methods from the solution, now: a class may be given them at any time."""
    return not all(_is_library(owner, name, each) for name in names for owner, each in _defined(kind, name) if each)


def _is_mock(kind: type) -> bool:
    """Whether a class can be told what its objects equal; ANY equals everything."""
    return any(each.__module__ == "unittest.mock" for each in kind.__mro__) and kind.__name__ not in (
        "_Call",
        "_CallList",
    )


def _defined(kind: type, name: str) -> list[tuple[type, Any]]:
    """What a class has by this name, if anything, and the class that it has it of."""
    return [(each, vars(each)[name]) for each in kind.__mro__ if name in vars(each)][:1]


def _is_library(owner: type, name: str, function: Any) -> bool:
    if type(function) in (types.WrapperDescriptorType, types.MethodDescriptorType):
        return function.__name__ == name
    if isinstance(function, types.FunctionType):
        code = function.__code__
        return code in _codes or (code.co_filename.startswith((*LIBRARY, FROZEN)) and _is_of_library(owner))
    return _is_of_library(owner) and not isinstance(function, PUT)  # what a package has in C


def _is_of_library(kind: type) -> bool:
    """Whether a class is the library's, and not one of the solution's that was given one of its functions."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None) or ""
    if not (file.startswith(LIBRARY) or kind.__module__ in sys.builtin_module_names):
        return False
    found: Any = module
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind or "<locals>" in kind.__qualname__
