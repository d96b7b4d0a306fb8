"""What an object of the other process is told to be, where that is not a class of its own (remote.py)."""

from __future__ import annotations

import types
from typing import Any

from .mirrors import awaited
from .remote import Remote, ask, invoke, itself, trust


class Callback(Remote):
    """A callable without more of interest."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return trust(invoke(self, args, kwargs), False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return itself(self)


class Function(Callback):
    """A function, which has a type that tests ask for."""

    __class__ = property(lambda self: types.FunctionType)

    def __get__(self, value: Any, kind: Any = None) -> Any:
        return self if value is None else types.MethodType(self, value)

    __globals__ = property(lambda self: {})  # where annotations are looked up; the other side's stay there


class Method(Callback):
    """A method of an object."""

    __class__ = property(lambda self: types.MethodType)


class Iterator(Remote):
    """A generator, or an iterator of any kind."""

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        return ask(self, "special", "__next__")


class Generator(Iterator):
    """A generator, which has a type that tests ask for."""

    __class__ = property(lambda self: types.GeneratorType)

    def send(self, value: Any) -> Any:
        return ask(self, "special", "send", value)


class Awaitable(Remote):
    """What can be awaited. It runs on a loop of its own process, a slice at a time, so that both sides' tasks go on."""

    __await__ = awaited

    def _steps(self) -> Any:
        try:
            return object.__getattribute__(self, "_fastgrpo_steps_")
        except AttributeError:
            object.__setattr__(self, "_fastgrpo_steps_", self.__await__())
            return object.__getattribute__(self, "_fastgrpo_steps_")

    def send(self, value: Any) -> Any:
        return self._steps().send(value)

    def throw(self, *error: Any) -> Any:
        return self._steps().throw(*error)

    def close(self) -> None:
        self._steps().close()


class Coroutine(Awaitable):
    """A coroutine, which has a type that tests ask for."""

    __class__ = property(lambda self: types.CoroutineType)


class Described(Remote):
    """An attribute that a class answers with, and of which tests ask the type."""

    _fastgrpo_kind_: type = property

    __class__ = property(lambda self: type(self)._fastgrpo_kind_)

    def __get__(self, value: Any, kind: Any = None) -> Any:
        return self if value is None else ask(self, "special", "__get__", value, kind)

    def __set__(self, value: Any, new: Any) -> None:
        ask(self, "special", "__set__", value, new)

    def __delete__(self, value: Any) -> None:
        ask(self, "special", "__delete__", value)


class Static(Described):
    """A static method, before it is asked of a class."""

    _fastgrpo_kind_ = staticmethod

    def __get__(self, value: Any, kind: Any = None) -> Any:
        return ask(self, "get", "__func__")


class OfClass(Described):
    """A class method, before it is asked of a class."""

    _fastgrpo_kind_ = classmethod

    def __get__(self, value: Any, kind: Any = None) -> Any:
        return types.MethodType(ask(self, "get", "__func__"), kind or type(value))


PROXIES = {"function": Function, "method": Method, "builtin": Callback, "property": Described, "staticmethod": Static}
PROXIES |= {"classmethod": OfClass, "iterator": Iterator, "generator": Generator, "coroutine": Coroutine}
PROXIES["awaitable"] = Awaitable
for _kind in (Remote, *PROXIES.values()):
    _kind.__doc__ = property(lambda self: ask(self, "get", "__doc__"))  # type: ignore[assignment]
