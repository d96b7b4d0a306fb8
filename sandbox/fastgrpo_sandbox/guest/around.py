"""What tests set around the solution: streams, arguments and environment, the seed, the recursion limit, filters of
warnings, and what mocks put in the place of the library's functions. Before each request the judge's side says what has
changed; the solution's side has the same until it changes again. After each answer it hears what the environment has
become."""

from __future__ import annotations

import importlib
import os
import random
import sys
import types
from typing import Any

from .known import is_library

Place = tuple[str, str]  # module and attribute
WATCHED: tuple[Place, ...] = (
    *(("sys", name) for name in ("stdin", "stderr", "argv")),
    ("builtins", "input"),
    *(("warnings", name) for name in ("filters", "_showwarnmsg_impl")),
)
# What tests call that counts for the solution as well.
CALLED = ((random, "seed"), (sys, "setrecursionlimit"), (sys, "set_int_max_str_digits"))
CONTEXT = ("prec", "rounding")  # of decimal numbers
_replaced: dict[Place, Any] = {}  # on the solution's side


class Around:
    """The judge's side. `request` is the peer's."""

    def __init__(self, peer: Any) -> None:
        self._peer = peer
        self._own = {place: _value(place) for place in WATCHED}
        self._told: dict[Place, Any] = dict(self._own)
        self._data = _data()
        for module, name in CALLED:
            setattr(module, name, self._called(name, getattr(module, name)))
        self._watch_mocks()

    def look(self) -> None:
        """Tells what is not as it was last told. Raises what the other side raises."""
        changed = [place for place, told in self._told.items() if _value(place) is not told]
        for place in changed:
            value = self._told[place] = _value(place)
            given = [] if value is self._own[place] else [value]
            self._tell("put", *place, *given)
        data = _data()
        for name in [name for name, value in data.items() if self._data.get(name, value) != value]:
            self._tell(name, data[name])
        self._data = data

    def hear(self) -> None:
        """Takes over what the solution has made of the environment, which tests may look at."""
        found = self._tell("environment")
        if found != self._data["environ"]:
            os.environ.clear()
            os.environ.update(found)
            self._data["environ"] = dict(os.environ)

    def _tell(self, name: str, *args: Any) -> Any:
        peer = self._peer
        hooks, (peer.before_asking, peer.after_answer) = (peer.before_asking, peer.after_answer), (None, None)
        try:
            return peer.request("around", None, name, args)
        finally:
            peer.before_asking, peer.after_answer = hooks

    def _called(self, name: str, own: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            own(*args, **named)
            self._tell(name, *args, *named.values())

        return call

    def _watch_mocks(self) -> None:
        mock = sys.modules.get("unittest.mock")
        if mock is None:
            return
        enter = mock._patch.__enter__

        def entered(patch: Any) -> Any:
            place, own = None, patch.getter()
            if isinstance(own, types.ModuleType) and is_library(own.__name__) and patch.attribute != "stdout":
                place = own.__name__, patch.attribute
                if place not in self._own:
                    self._own[place] = self._told[place] = _value(place)
            return enter(patch)

        mock._patch.__enter__ = entered


def _value(place: Place) -> Any:
    return getattr(sys.modules.get(place[0]), place[1], None)


def _data() -> dict[str, Any]:
    decimal = sys.modules.get("decimal")
    context = [getattr(decimal.getcontext(), name) for name in CONTEXT] if decimal else None
    return {"environ": dict(os.environ), "context": context}


def put(name: str, args: list[Any]) -> Any:
    """The solution's side: what was told, done; or its environment."""
    match name:
        case "environment":
            return dict(os.environ)
        case "seed":
            random.seed(*args)
        case "setrecursionlimit":
            sys.setrecursionlimit(max(sys.getrecursionlimit(), *args))  # the solution may have set a higher one since
        case "set_int_max_str_digits":
            sys.set_int_max_str_digits(*args)
        case "environ":
            os.environ.clear()
            os.environ.update(args[0])
        case "context":
            for own, value in zip(CONTEXT, args[0], strict=True):
                setattr(importlib.import_module("decimal").getcontext(), own, value)
        case "put":
            module, attribute, *given = args
            place = module, attribute
            found = importlib.import_module(module)
            if given:
                _replaced.setdefault(place, getattr(found, attribute, None))
                setattr(found, attribute, given[0])
            elif place in _replaced:
                setattr(found, attribute, _replaced.pop(place))
            if place == ("warnings", "filters"):
                found._filters_mutated()  # what was shown once may be shown again
    return None
