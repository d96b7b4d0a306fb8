"""One end of the line between solution and judge: requests about objects, answered by the process that owns them.

Either side may ask while it answers, so a function of the tests can be an argument. What cannot cross as plain data
stays where it is, under a number, and the other side gets a proxy (remote.py). The judge's end is guarded: it lends the
solution's process only what tests pass to it, whose names without a leading underscore can be read and whose operators
and calls work; modules, frames, code and tracebacks never leave, since the wanted values lie behind them. A class comes
by name only if it is one that a value may have (see `_known`), never by the word of the solution alone.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import types
from _thread import RLock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import remote
from .plain import KINDS, SCALARS, Codec, name_of
from .wire import MAX_PEER_FRAME, read_peer, send_peer

KEPT_BACK = (types.ModuleType, types.FrameType, types.CodeType, types.TracebackType)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType)
VALUE_MODULES = frozenset({"builtins", "collections", "datetime", "decimal", "fractions", "uuid", "pathlib", "array"})
PLAIN_BASES: dict[type, Callable[[Any], Sequence[Any]]] = {  # what cannot change, and its constructor's arguments
    int: lambda value: (int.__int__(value),),
    str: lambda value: (str.__str__(value),),
    float: lambda value: (float.__float__(value),),
    bytes: lambda value: (bytes.__getitem__(value, slice(None)),),
    complex: lambda value: (value.real, value.imag),
    tuple: lambda value: list(tuple.__iter__(value)),
    frozenset: lambda value: list(frozenset.__iter__(value)),
}
NAMES = frozenset(("get", name) for name in ("__name__", "__qualname__", "__doc__"))
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError, ImportError)


class Gone(BaseException):
    """The other process is gone, or spoke nonsense. No `except Exception` of a test takes it for an answer."""


class Peer:
    """One end. `module` is where names are found that the other side asks for; the guarded end has none."""

    def __init__(self, fd: int, module: types.ModuleType | None = None) -> None:
        self._fd = fd
        self._module = module
        self.is_open = module is not None  # proxies here may be asked about anything: there is nothing to hide
        self.is_gone = False
        self._codec = Codec(self._give, self._take)
        self._lent: list[Any] = []
        self._numbers: dict[int, int] = {}  # of lent objects, by id()
        self._told: set[int] = set()  # numbers that the other side has heard of
        self._telling: list[int] = []
        self._proxies: dict[Any, Any] = {}
        self._turn = RLock()

    # ---- asking ----

    def request(self, operation: str, target: Any, *parts: Any) -> Any:
        """What the other side answers. Raises what it raised, and Gone."""
        with self._turn:
            self.ask(operation, target, *parts)
            return self.result(operation, *parts)

    def ask(self, operation: str, target: Any, *parts: Any) -> None:
        """The first half of a request."""
        if self.is_gone:
            raise Gone
        self._send(["ask", operation, target, _is_redirected(), *parts])

    def result(self, operation: str, *parts: Any) -> Any:
        """The second half; answers what is asked meanwhile."""
        kind, *answer = self._receive()
        while kind == "ask":
            self._answer(answer)
            kind, *answer = self._receive()
        self._codec.shared.forget()
        value, printed = answer
        if printed:
            sys.stdout.write(printed)
        if kind == "raise":
            raise value if _may_end_a_loop(operation, *parts) else _not_ending_loops(value)
        return value

    def name(self, name: str) -> tuple[Any, bool]:
        """The solution's value of a name, and whether it is the standard library's of that name, which is then taken
        from there and not by the solution's word. Raises AttributeError for a name that the solution does not have."""
        place, value = self.request("name", name)
        module, _, own = (place or "").rpartition(".")
        is_library = own == name and _is_library(module)
        return (getattr(importlib.import_module(module), name) if is_library else value), is_library

    def function(self, name: str) -> Any:
        """A function of the solution, by name, without asking whether there is one."""
        return remote.proxy(remote.Function, (self, name))

    def _send(self, message: list[Any]) -> None:
        first, known = self._codec.shared.count, len(self._lent)
        self._telling = []
        try:
            data = self._codec.pack(message)
        except BaseException:
            self._take_back(known)
            raise
        if self._module is not None and len(data) > MAX_PEER_FRAME:
            self._codec.take_back(first)
            self._take_back(known)
            raise ValueError("too long to send")
        self._told.update(self._telling)
        try:
            send_peer(self._fd, data)
        except OSError:
            self._lose()

    def _take_back(self, known: int) -> None:
        for value in self._lent[known:]:
            del self._numbers[id(value)]
        del self._lent[known:]

    def _receive(self) -> Any:
        try:
            return self._codec.unpack(read_peer(self._fd, None if self._module else MAX_PEER_FRAME))
        except (EOFError, OSError, *MALFORMED):
            self._lose()

    def _lose(self) -> None:
        self.is_gone = True
        raise Gone

    # ---- answering ----

    def serve(self) -> None:
        """Answers until the other side closes."""
        with contextlib.suppress(EOFError):
            while True:
                self.serve_one()

    def serve_one(self) -> None:
        """Waits for a request and answers it. Raises EOFError when the other side has closed."""
        _, *request = self._codec.unpack(read_peer(self._fd, None))
        self._answer(request)
        self._codec.shared.forget()

    def _answer(self, request: list[Any]) -> None:
        operation, target, is_redirected, *parts = request
        kind, value, printed = "value", None, ""
        with _capture(is_redirected) as output:
            try:
                found = self._lent[target] if isinstance(target, int) else self._named(target)
                value = (
                    [_library_place(found), found] if operation == "name" else self._perform(operation, found, *parts)
                )
            except Gone:
                raise
            except BaseException as error:
                kind, value = "raise", error
        printed = output.getvalue() if output else ""
        if self._module is not None:
            _show_prints()
        try:
            self._send([kind, value, printed])
        except Gone:
            raise
        except BaseException as error:
            self._send(["raise", ValueError(f"the answer cannot be sent: {error}"), printed])

    def _named(self, name: str) -> Any:
        if self._module is None:
            raise AttributeError("the names of the tests are their own")
        return getattr(self._module, name)

    def _perform(self, operation: str, found: Any, *parts: Any) -> Any:
        if self._module is None and not _is_allowed(operation, *parts):
            raise AttributeError(f"{parts[0] if parts else operation!r} of what the tests lent is not for the solution")
        match operation:
            case "get":
                return getattr(found, parts[0])
            case "set":
                return setattr(found, parts[0], parts[1])
            case "del":
                return delattr(found, parts[0])
            case "call":
                return found(*parts[0], **parts[1])
            case "await":
                return _run(found)
        return _special(found, parts[0], parts[1])

    # ---- what is not plain ----

    def _give(self, value: Any, codec: Codec) -> Any:
        place = remote.place_of(value)
        if place is not None:
            return {"yours": place[1]}
        if isinstance(value, type):
            known = _known_name(value)
            return {"type": known} if known else {"class": self._class(value)}
        if isinstance(value, BaseException) and _known_name(type(value)):
            return {"error": [_known_name(type(value)), codec.tag(value.args), codec.tag(_plain_state(value))]}
        if isinstance(value, KEPT_BACK):
            raise TypeError(f"a {type(value).__name__} stays in its own process")
        if self._module is None and isinstance(value, types.BuiltinFunctionType | types.FunctionType):
            library = _library_place(value)
            if library:
                return {"function": library}
        number = self._lend(value)
        if number in self._told or number in self._telling:
            return {"mine": [number]}
        self._telling.append(number)
        return {"mine": [number, *self._described(value, codec)]}

    def _lend(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._lent))
        if number == len(self._lent):
            self._lent.append(value)
        return number

    def _described(self, value: Any, codec: Codec) -> list[Any]:
        """A kind of proxy; or a class, and the plain value that the object also is."""
        kind = type(value)
        if isinstance(value, FUNCTIONS):
            return ["function"]
        if isinstance(value, types.GeneratorType):
            return ["generator"]
        if isinstance(value, types.CoroutineType) or (kind.__module__ == "builtins" and hasattr(kind, "__await__")):
            return ["coroutine"]
        if hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
            return ["iterator"]
        base = _plain_base(kind)
        described = self._class(kind)
        if base is object:
            return [described]
        if issubclass(base, BaseException):
            return [described, [codec.tag(each) for each in value.args]]
        name = name_of(base)
        if name in KINDS:
            content = codec.container(value, name)
            codec.shared.kept.add(codec.shared.numbers[id(value)])
            return [described, content]
        return [described, [codec.tag(each) for each in PLAIN_BASES[base](value)]]

    def _class(self, kind: type) -> list[Any]:
        """The number of a class, and the first time what makes a mirror of it."""
        number = self._lend(kind)
        if number in self._told or number in self._telling:
            return [number]
        self._telling.append(number)
        base = _plain_base(kind)
        bases = [self._class(each) for each in kind.__bases__ if _known_name(each) is None and each is not object]
        names = [] if base is object else sorted(_overridden(kind, base))
        specials = [each for each in remote.SPECIALS if _differs(kind, base, each)]
        if kind.__hash__ is None and "__hash__" in specials:
            specials.remove("__hash__")
        return [number, kind.__name__, bases, None if base is object else _known_name(base), specials, names]

    def _take(self, name: str, body: Any, codec: Codec) -> Any:
        match name:
            case "yours":
                return self._module.__dict__[body] if isinstance(body, str) and self._module else self._lent[body]
            case "type":
                return _known(body)
            case "error":
                return _error(*map(codec.untag, body))
            case "class":
                return self._mirror(*body)
            case "function" if self._module is not None:
                module, _, own = body.rpartition(".")
                return getattr(importlib.import_module(module), own)
            case "mine":
                return self._proxy(codec, *body)
        raise ValueError(f"no value is named {name!r}")

    def _proxy(self, codec: Codec, number: int, kind: Any = None, content: Any = ()) -> Any:
        if number in self._proxies:
            return self._proxies[number]
        if isinstance(kind, str):
            made = remote.proxy(remote.KINDS[kind], (self, number))
        else:
            made = self._instance(codec, self._mirror(*kind), number, content)
        self._proxies[number] = made
        return made

    def _instance(self, codec: Codec, kind: Any, number: int, content: Any) -> Any:
        base = kind._fastgrpo_base_
        if name_of(base) not in KINDS or base is object:
            args = tuple(codec.untag(each) for each in content)
            return remote.proxy(kind, (self, number), (args,) if base in (tuple, frozenset) else args)
        shared, container = codec.shared, KINDS[name_of(base)]
        made = remote.proxy(kind, (self, number))
        items = content if isinstance(content, list) else next(iter(content.values()))[1:]
        shared.kept.add(shared.add(made, container))
        container.fill(made, [codec.untag(each) for each in items])
        return made

    def _mirror(self, number: int, *description: Any) -> type:
        if number in self._proxies:
            return self._proxies[number]
        name, bases, base_name, specials, names = description
        if any(each.startswith("_") for each in names):
            raise ValueError("a class cannot say how it is looked at")
        base = object if base_name is None else _known(base_name)
        if base is not object and _plain_base(base) is not base:
            raise ValueError(f"{base_name} is no plain type")
        parents = tuple(self._mirror(*each) for each in bases)
        kinds = tuple(each for each in (base,) if base is not object and not any(issubclass(p, base) for p in parents))
        made = remote.mirror((self, number), str(name), (*(parents or (remote.Remote,)), *kinds), base, specials, names)
        self._proxies[number] = made
        return made


# ---- classes and names that both sides know ----


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _library_place(value: Any) -> str | None:
    """The full name of a function or class that is the standard library's own."""
    module, own = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(own, str) and _is_library(module)):
        return None
    return f"{module}.{own}" if getattr(sys.modules.get(module), own, None) is value else None


def _known_name(kind: type) -> str | None:
    """The name by which a class crosses: one of a value's modules, or the library's own exceptions."""
    if kind.__module__ not in VALUE_MODULES and not issubclass(kind, BaseException):
        return None
    return _library_place(kind)


def _known(name: Any) -> type:
    """The class of a name that crossed. Raises ValueError for what is no class of the kinds of `_known_name`."""
    module, _, own = name.rpartition(".")
    found = getattr(importlib.import_module(module), own) if _is_library(module) else None
    if not isinstance(found, type) or _known_name(found) is None:
        raise ValueError(f"{name} is not a class that may cross")
    return found


def _plain_base(kind: type) -> type:
    """The plain type or library's exception from which a class derives, or object."""
    for each in kind.__mro__:
        if each in PLAIN_BASES or (name_of(each) in KINDS and _known_name(each)):
            return each
        if issubclass(each, BaseException) and _known_name(each):
            return each
    return object


def _attribute(kind: type, name: str) -> Any:
    return next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), None)


def _differs(kind: type, base: type, name: str) -> bool:
    return _attribute(kind, name) is not _attribute(base, name)


def _overridden(kind: type, base: type) -> set[str]:
    """Attributes of `base` that a subclass has in a form of its own."""
    own = (name for each in kind.__mro__[: kind.__mro__.index(base)] for name in vars(each))
    return {name for name in own if not name.startswith("__") and hasattr(base, name)}


def _plain_state(error: BaseException) -> dict[str, Any]:
    return {name: value for name, value in vars(error).items() if type(value) in SCALARS or type(value) is int}


def _error(name: str, args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    kind = _known(name)
    made = kind.__new__(kind, *args)
    if not isinstance(made, BaseException):
        raise ValueError(f"{name} is no exception")
    if kind.__module__ == "builtins":
        with contextlib.suppress(TypeError):
            kind.__init__(made, *args)  # type: ignore[misc]
    made.args = args
    vars(made).update(state)
    return made


def _may_end_a_loop(operation: str, *parts: Any) -> bool:
    return operation == "await" or (operation == "special" and parts[0] in ("__next__", "send", "__anext__"))


def _not_ending_loops(error: Any) -> BaseException:
    """A StopIteration that comes out of a function would end the loop of the tests that called it, as if all was well."""
    if isinstance(error, StopIteration | StopAsyncIteration):
        return RuntimeError(f"the solution raised {type(error).__name__}")
    return error if isinstance(error, BaseException) else RuntimeError("the solution raised what is no exception")


# ---- doing what was asked ----


def _is_allowed(operation: str, *parts: Any) -> bool:
    """Whether the solution's process may do this to an object of the tests."""
    if operation in ("get", "set", "del"):
        return isinstance(parts[0], str) and (not parts[0].startswith("_") or (operation, parts[0]) in NAMES)
    return operation == "call" or (operation == "special" and parts[0] in (*remote.SPECIALS, "send"))


def _special(found: Any, name: str, args: list[Any]) -> Any:
    if name == "__getitem__" and isinstance(found, type):
        return found[args[0]]  # type: ignore[index]
    if name == "__iter__":
        return iter(found)
    return getattr(type(found), name)(found, *args)


_loops: list[Any] = []


def _run(awaitable: Any) -> Any:
    """What an awaitable gives, on the one event loop of this process."""
    import asyncio  # 20 ms that most jobs need not pay for

    async def wait() -> Any:
        return await awaitable

    if not _loops:
        _loops.append(asyncio.new_event_loop())
    return _loops[0].run_until_complete(wait())


def _is_redirected() -> bool:
    return sys.stdout is not sys.__stdout__


@contextlib.contextmanager
def _capture(is_wanted: bool) -> Iterator[io.StringIO | None]:
    """What is printed meanwhile, for the side whose own output goes elsewhere."""
    if not is_wanted:
        yield None
        return
    with contextlib.redirect_stdout(io.StringIO()) as output:
        yield output


def _show_prints() -> None:
    """The judge's end is this process' end, so what was printed must be out by then."""
    with contextlib.suppress(Exception):  # the stream is the solution's: closed, or full
        sys.stdout.flush()
