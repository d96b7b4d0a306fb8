"""One end of the line between solution and judge: requests about objects, answered by the process that owns them.

A request is ["ask", operation, target, name, redirected, names of arguments...] with the arguments as values, its
answer ["value" or "raise", what was printed, links] with the value, or the exception and its reasons (raised.py).
Either side may ask while it answers, so a function of the tests can be an argument. The judge's end is guarded: of what
tests pass to the solution, the names without a leading underscore can be read, and operators and calls work.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import types
import typing
from _thread import RLock
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import inherit, kinds, remote
from .allowed import Allowed, public
from .annotations import signature_parts
from .around import put
from .codec import Codec
from .compared import OF_SOLUTION
from .known import is_library, library_place
from .looks import inspected
from .objects import Held, Objects
from .raised import chained, link
from .tasks import Tasks
from .wire import MAX_PEER_FRAME, read_peer, send_peer

NOTHING: Mapping[str, Any] = types.MappingProxyType({})
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError, ImportError)


class Gone(BaseException):
    """The other process is gone, or spoke nonsense. No `except Exception` of a test takes it for an answer."""


class Peer:
    """One end. `module` is where names are found that the other side asks for; the guarded end has none."""

    def __init__(self, fd: int, module: types.ModuleType | None = None) -> None:
        self._fd = fd
        self._module = module
        self.own_names: Mapping[str, Any] = vars(module) if module else NOTHING  # where this side's classes are found
        self.is_guarded = module is None  # the judge's end: what is wanted is not for the other side
        self.is_gone = False
        self.before_asking: Callable[[], None] | None = None
        self.after_answer: Callable[[], None] | None = None
        self._objects = Objects(self, self._named if module else None)
        self._codec = Codec(self._objects.give, self._objects.take)
        self._turn = RLock()
        self._answering = 0
        self._allowed = Allowed()
        self._tasks = Tasks()

    # ---- asking ----

    def request(
        self, operation: str, target: Any, name: str = "", args: Sequence[Any] = (), named: Mapping[str, Any] = NOTHING
    ) -> Any:
        """What the other side answers. Raises what it raised, and Gone."""
        with self._turn:
            self.ask(operation, target, name, args, named)
            try:
                return self.result(operation, name)
            finally:
                if self.after_answer is not None and not self.is_gone:
                    self.after_answer()

    def ask(
        self, operation: str, target: Any, name: str = "", args: Sequence[Any] = (), named: Mapping[str, Any] = NOTHING
    ) -> None:
        """The first half of a request."""
        if self.is_gone:
            raise Gone
        if self.before_asking is not None:
            self.before_asking()
        if self.is_guarded:
            self._allowed.hand((*args, *named.values()))
        self._send(["ask", operation, target, name, _is_redirected(), *named], [*args, *named.values()])

    def result(self, operation: str, name: str = "") -> Any:
        """The second half; answers what is asked meanwhile."""
        (kind, *head), values = self._receive()
        while kind == "ask":
            self._objects.name_classes()
            self._answer(head, values)
            (kind, *head), values = self._receive()
        if not _tells_of_classes(operation, name):
            is_named = kind == "value" and operation in ("name", "get") and name[:1].isupper()
            self._objects.name_classes(values[0][1] if is_named and operation == "name" else is_named and values[0])
        if not self._answering:
            self._codec.shared.forget()
        if head[0]:
            sys.stdout.write(head[0])
        if kind == "raise":
            error = values[0] if _may_end_a_loop(operation, name) else _not_ending_loops(values[0])
            if head[1]:
                self._link([error, *values[1:]], head[1])
            raise error
        return values[0]

    def name(self, name: str) -> tuple[Any, bool]:
        """The solution's value of a name, and whether it is the standard library's of that name, which is then taken
        from there and not by the solution's word. Raises AttributeError for a name that the solution does not have."""
        name = name.removeprefix(OF_SOLUTION)
        place, value = self.request("name", name, name)
        module, _, own = (place or "").rpartition(".")
        is_ours = own == name and is_library(module)
        return (getattr(importlib.import_module(module), name) if is_ours else value), is_ours

    def function(self, name: str) -> Any:
        """A function of the solution, by name, without asking whether there is one."""
        return remote.proxy(kinds.Function, (self, name))

    def derive(self, name: str, bases: tuple[type, ...], space: dict[str, Any], named: Mapping[str, Any]) -> type:
        """A class of this side over one of the other's."""
        known = [inherit.theirs(bases), named, inherit.told(bases, space)]
        made, names = self.request("subclass", None, name, known)
        derived = inherit.derived(made, names, bases, space)
        self._objects.replace(remote.place_of(made), derived)
        self._codec.shared.exchange(made, derived)
        return derived

    def _send(self, head: list[Any], values: Sequence[Any]) -> None:
        first, known = self._codec.shared.count, len(self._objects.lent)
        try:
            data = self._codec.pack(head, values)
        except BaseException:
            self._objects.take_back(known)
            raise
        if not self.is_guarded and len(data) > MAX_PEER_FRAME:
            self._codec.take_back(first)
            self._objects.take_back(known)
            raise ValueError("too long to send")
        self._objects.sent()
        try:
            send_peer(self._fd, data)
        except OSError:
            self._lose()

    def _receive(self) -> Any:
        try:
            return self._codec.unpack(read_peer(self._fd, MAX_PEER_FRAME if self.is_guarded else None))
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
        (_, *head), values = self._codec.unpack(read_peer(self._fd, None))
        self._answer(head, values)
        self._codec.shared.forget()

    def _answer(self, head: list[Any], values: list[Any]) -> None:
        operation, target, name, is_redirected, *named = head
        kind, output = "value", io.StringIO() if is_redirected else None
        links: list[Any] = []
        self._answering += 1
        try:
            found = self._found(target)
            args, kwargs = _split(values, named) if named else (values, NOTHING)
            if output is None:
                values = [self._perform(operation, found, name, args, kwargs)]
            else:
                with contextlib.redirect_stdout(output):
                    values = [self._perform(operation, found, name, args, kwargs)]
        except Gone:
            raise
        except BaseException as error:
            kind, (values, links) = "raise", ([error], []) if self.is_guarded else chained(error)
        finally:
            self._answering -= 1
        if not self.is_guarded:
            _show_prints()
        self._send_answer([kind, output.getvalue() if output else "", links], values)

    def _link(self, errors: list[Any], links: list[Any]) -> None:
        try:
            link(errors, links)
        except MALFORMED:
            self._lose()

    def _send_answer(self, head: list[Any], values: list[Any]) -> None:
        try:
            self._send(head, values)
        except Gone:
            raise
        except BaseException as error:
            if len(values) > 1:  # without what it was raised from
                return self._send_answer([*head[:2], []], values[:1])
            self._send(["raise", head[1], []], [ValueError(f"the answer cannot be sent: {error}")])

    def _found(self, target: Any) -> Any:
        if isinstance(target, int):
            return self._objects.lent[target]
        return None if target is None else self._named(target)

    def _named(self, name: str) -> Any:
        if self.is_guarded:
            raise AttributeError("the names of the tests are their own")
        return getattr(self._module, name)

    def _perform(self, operation: str, found: Any, name: str, args: list[Any], named: Mapping[str, Any]) -> Any:
        if self.is_guarded and not self._allowed.may(operation, found, name):
            raise AttributeError(f"{name or operation!r} of what the tests lent is not for the solution")
        match operation:
            case "call":
                return found(*args, **named)
            case "get" if name == "__dict__" and self.is_guarded:
                return public(found)
            case "get":
                return getattr(found, name)
            case "set":
                is_method = isinstance(found, type) and isinstance(args[0], kinds.Function)
                return setattr(found, name, inherit.method(args[0], name) if is_method else args[0])
            case "del":
                return delattr(found, name)
            case "name":
                return library_place(found), found  # a list would be shared from now on
            case "await" | "cancel":
                return self._tasks.advance(found, operation == "cancel")
            case "copy":
                return getattr(importlib.import_module("copy"), name)(found)
            case "pickle":
                return importlib.import_module("pickle").dumps(found, *args)
            case "unpickle":
                return importlib.import_module("pickle").loads(*args)
            case "signature":
                return signature_parts(found, *([Held] if self.is_guarded else []))
            case "around":
                return put(name, args)
            case "inspect":
                return inspected(found, name, args)
            case "hints":
                return typing.get_type_hints(found, include_extras=args[0])
            case "subclass":
                made = inherit.derive(name, *args)
                return [made, inherit.inherited(made)]
            case "super":
                return getattr(super(args[0], found), name)
            case "super special":
                return getattr(super(args[0], found), name)(*args[1:])
        return _special(found, name, args)


def _tells_of_classes(operation: str, name: str) -> bool:
    """Whether the classes of an answer are there to be looked at, and not for the tests to call."""
    return operation in ("hints", "signature", "inspect") or (operation == "get" and name.startswith("__"))


def _may_end_a_loop(operation: str, name: str) -> bool:
    return operation == "await" or (operation == "special" and name in ("__next__", "send", "__anext__"))


def _not_ending_loops(error: Any) -> BaseException:
    """A StopIteration that comes out of a function would end the loop that called it, as if all was well."""
    if isinstance(error, StopIteration | StopAsyncIteration):
        return RuntimeError(f"the solution raised {type(error).__name__}")
    return error if isinstance(error, BaseException) else RuntimeError("the solution raised what is no exception")


# ---- doing what was asked ----


def _split(values: list[Any], names: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by place and by name."""
    first = len(values) - len(names)
    return values[:first], dict(zip(names, values[first:], strict=True))


def _special(found: Any, name: str, args: list[Any]) -> Any:
    if name == "__getitem__" and isinstance(found, type):
        return found[args[0]]  # type: ignore[index]
    if name == "__iter__":
        return iter(found)
    return getattr(type(found), name)(found, *args)


def _is_redirected() -> bool:
    return sys.stdout is not sys.__stdout__


def _show_prints() -> None:
    """The judge's end is this process' end, so what was printed must be out by then."""
    try:
        sys.stdout.flush()
    except Exception:
        return  # the stream is the solution's: closed, or full
