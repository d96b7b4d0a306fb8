"""What mocks of the tests say of their calls, where a solution beside the tests may have called them with objects that
equal everything, or put assertions of its own in the place of theirs."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterable
from typing import Any

ASSERTED = frozenset(f"assert_{each}" for each in ("any_call", "called_with", "called_once_with", "has_calls"))
ASSERTED |= {f"assert_{each}" for each in ("any_await", "awaited_with", "awaited_once_with", "has_awaits")}
ASSERTED |= {f"assert_{each}{once}" for each in ("called", "awaited") for once in ("", "_once")}
ASSERTED |= {"assert_not_called", "assert_not_awaited"}
IsLie = Callable[[Any, Any], bool]  # of an argument of a call and what the tests want there


def asserted(name: str, mock: Any, /, *args: Any, **named: Any) -> Any:
    """`mock.name(*args, **named)`, as the judge's own process may ask it."""
    return getattr(mock, name)(*args, **named)


def asserting(is_lie: IsLie) -> Callable[..., Any]:
    """`asserted`, by the library's assertions as they are now; a call with an argument that `is_lie` is no other."""
    module = importlib.import_module("unittest.mock")
    any_mock, awaited = module.NonCallableMock, module.AsyncMockMixin
    own = {name: each for kind in (any_mock, awaited) for name, each in vars(kind).items() if name in ASSERTED}
    call_args_list, mock_calls = (vars(any_mock)[name].fget for name in ("call_args_list", "mock_calls"))

    def calls(name: str, mock: Any) -> list[tuple[Any, ...]]:
        """The arguments of the calls that an assertion looks at."""
        if "await" in name:
            found = mock.await_args_list
        elif name == "assert_has_calls":
            found = [*mock_calls(mock), *call_args_list(mock)]
        else:
            found = call_args_list(mock)
        return list(map(_arguments, found[-1:] if name.endswith("_with") else found))

    def asked(name: str, mock: Any, /, *args: Any, **named: Any) -> Any:
        mock = vars(mock).get("mock", mock) if isinstance(mock, types.FunctionType) else mock  # of create_autospec
        if any_mock not in type(mock).__mro__ or name not in own:
            return asserted(name, mock, *args, **named)
        if name.endswith("_once_with"):  # which asks the mock itself for the other
            own[name.removesuffix("_with")](mock)
            name = name.replace("_once", "")
        own[name](mock, *args, **named)
        for wanted in _wanted(name, args, named):
            if _is_forged(calls(name, mock), wanted, is_lie):
                raise AssertionError(f"{name}: an object cannot answer for what a mock was called with")
        return None

    return asked


def _arguments(call: Any) -> tuple[Any, ...]:
    """Those by place and those by name of a `call`, a tuple that its name may begin, whatever its class says."""
    return tuple.__getitem__(call, slice(-2, None))


def _wanted(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Iterable[tuple[Any, ...]]:
    """The arguments, by place and by name, of each call that an assertion says there was."""
    if name.endswith(("_with", "_any_call", "_any_await")):
        return [(args, named)]
    given = [*args, *named.values()][:1] if name in ("assert_has_calls", "assert_has_awaits") else []
    parts = list(map(_arguments, given[0] if given else ()))
    return [each for each in parts if list(map(type, each)) == [tuple, dict]]  # a call may be written as another tuple


def _is_forged(calls: list[tuple[Any, ...]], wanted: tuple[Any, ...], is_lie: IsLie) -> bool:
    """Whether no call is the wanted one but by its own word; where a signature orders arguments, whether one may be."""
    same = [each for each in calls if _is_same(each, wanted)]
    if same:
        return all(_lies(each, wanted, is_lie) for each in same)
    return any(_lies(each, wanted, is_lie) for each in calls)


def _is_same(made: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    try:
        return wanted == made or made == wanted
    except Exception:  # arrays have no truth
        return False


def _lies(made: tuple[Any, ...], wanted: tuple[Any, ...], is_lie: IsLie) -> bool:
    """Whether something that a mock was called with answers for itself where the tests want what does not."""
    (args, named), (wanted_args, wanted_named) = made, wanted
    if len(args) != len(wanted_args) or named.keys() != wanted_named.keys():
        return _answering(made, is_lie) > _answering(wanted, is_lie)
    pairs = [*zip(args, wanted_args, strict=True), *((named[name], wanted_named[name]) for name in named)]
    return any(is_lie(one, other) for one, other in pairs)


def _answering(call: tuple[Any, ...], is_lie: IsLie) -> int:
    """How many of a call's arguments answer for themselves."""
    args, named = call
    return sum(is_lie(each, None) for each in (*args, *named.values()))
