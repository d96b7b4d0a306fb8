"""The judged pair. The solution's process answers calls; the judge's process holds the tests and compares.

Only plain data crosses (see plain.py), so `==` in the judge is always a builtin type's own. The solution knows neither
expected values nor which of its answers passed.
"""

from __future__ import annotations

import builtins
import contextlib
import marshal
import sys
import types
from typing import Any

from .instrument import compile_asserts
from .plain import Unplain, pack, refuse, unpack
from .wire import MAX_PEER_FRAME, read_peer, send_peer

# ---- the solution's side: nothing it does is trusted ----


def serve_solution(module: types.ModuleType, peer: int) -> None:
    """Answers the judge until it closes the peer."""
    objects: list[Any] = []

    def keep(value: Any) -> Any:
        objects.append(value)
        return {"handle": len(objects) - 1}

    while True:
        try:
            request = read_peer(peer)
        except EOFError:
            return
        send_peer(peer, _answer(module, objects, keep, request))


def _answer(module: types.ModuleType, objects: list[Any], keep: Unplain, request: bytes) -> bytes:
    try:
        answer = pack(_called(module, objects, keep, request), keep)
    except BaseException as error:
        answer = pack(("raise", _named(error), None))
    _show_prints()
    return answer if len(answer) <= MAX_PEER_FRAME else pack(("raise", ("ValueError", ("too long to send",)), None))


def _called(module: types.ModuleType, objects: list[Any], keep: Unplain, request: bytes) -> tuple[Any, ...]:
    """What came of one request, and its arguments where the call changed them."""
    target, path, args, kwargs = unpack(request, objects.__getitem__)
    given = [*(args or ()), *kwargs.values()]
    before = pack(given, keep)
    try:
        found: Any = module if target is None else objects[target]
        for name in path:
            found = getattr(found, name)
        kind, value = "value", found if args is None else found(*args, **kwargs)
    except BaseException as error:
        kind, value = "raise", _named(error)
    return kind, value, None if pack(given, keep) == before else given


def _named(error: BaseException) -> tuple[str, tuple[Any, ...]]:
    """Name and arguments of an exception, or none of these where they are not plain data."""
    try:
        pack(error.args)
        return type(error).__name__, error.args
    except Exception:
        return type(error).__name__, ()


def _show_prints() -> None:
    """The judge's end is this process' end, so what was printed must be out by then."""
    with contextlib.suppress(Exception):  # the stream is the solution's: closed, or full
        sys.stdout.flush()


# ---- the judge's side ----


class CandidateError(Exception):
    """The solution raised something of its own, or its process is gone."""


class Remote:
    """A name, object or method that lives in the solution's process. Compares equal to nothing but itself."""

    def __init__(self, peer: int, target: int | None, path: tuple[str, ...]) -> None:
        self._place = (peer, target, path)

    def __getattr__(self, name: str) -> Remote:
        if name.startswith("__"):
            raise AttributeError(name)
        peer, target, path = self._place
        return _fetch(peer, target, (*path, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _request(*self._place, list(args), kwargs)

    def __len__(self) -> int:
        return self._special("__len__")

    def __getitem__(self, key: Any) -> Any:
        return self._special("__getitem__", key)

    def __iter__(self) -> Any:
        iterator = self._special("__iter__")
        while True:
            try:
                yield iterator._special("__next__")
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self._special("__next__")

    def __str__(self) -> str:
        return self._special("__str__")

    def __repr__(self) -> str:
        return self._special("__repr__")

    def __bool__(self) -> bool:
        for name in ("__bool__", "__len__"):
            with contextlib.suppress(TypeError):
                return bool(self._special(name))
        return True

    def _special(self, name: str, *args: Any) -> Any:
        peer, target, path = self._place
        try:
            return _request(peer, target, (*path, name), list(args), {})
        except AttributeError as error:
            raise TypeError(f"an object of the solution has no {name}") from error


def _fetch(peer: int, target: int | None, path: tuple[str, ...]) -> Any:
    value = _request(peer, target, path, None, {})
    return Remote(peer, target, path) if isinstance(value, Remote) else value


def _request(peer: int, target: int | None, path: tuple[str, ...], args: list[Any] | None, kwargs: Any) -> Any:
    """One call of the solution. Raises what it raised, as the builtin exception of that name, or CandidateError."""
    send_peer(peer, pack((target, path, args, kwargs), _handle_of))
    try:
        kind, value, changed = unpack(read_peer(peer), lambda number: Remote(peer, number, ()))
    except (EOFError, OSError) as error:
        raise CandidateError("the solution's process is gone") from error
    for mine, new in zip((*(args or ()), *kwargs.values()), changed or (), strict=False):
        _update(mine, new)
    if kind == "raise":
        raise _exception(*value)
    return value


def _handle_of(value: Any) -> Any:
    if isinstance(value, Remote) and not value._place[2]:
        return {"handle": value._place[1]}
    raise TypeError(f"a test passed {type(value).__name__} to the solution; only plain data can cross")


def _exception(name: Any, args: Any) -> Exception:
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return CandidateError(f"{name}: {args}")
    try:
        return kind(*args)
    except Exception:
        return CandidateError(f"{name}: {args}")


def _update(mine: Any, changed: Any) -> None:
    """An argument that the solution changed in place changes in the test, too."""
    if isinstance(mine, list | bytearray) and type(mine) is type(changed):
        mine[:] = changed
    elif isinstance(mine, dict | set) and type(mine) is type(changed):
        mine.clear()
        mine.update(changed)


def warm_up() -> None:
    """One question to a solution and its answer, and one assertion judged."""
    module = types.ModuleType("solution")
    module.__dict__["f"] = list
    unpack(_answer(module, [], refuse, pack((None, ("f",), [[1, (2.5, "x")]], {}))))
    code, count = compile_asserts("assert f(1) == 2\n")
    _run(code, _Record(count), {"f": abs})


class _Record:
    """Verdicts by assertion: passed only if it ran at least once and every time was true."""

    def __init__(self, count: int) -> None:
        self.seen = [False] * count
        self.broken = [False] * count
        self.unreached: list[int] = []

    def passed(self, index: int, test: Any) -> None:
        self.seen[index] = True
        self.broken[index] |= not test

    def failed(self, index: int) -> None:
        self.broken[index] = True

    def finish(self) -> None:
        """The tests came to their end: an `assert False` that nothing came to holds."""
        for index in self.unreached:
            self.seen[index] = True

    def verdicts(self) -> list[bool]:
        return [seen and not broken for seen, broken in zip(self.seen, self.broken, strict=True)]


def verdicts(job: dict[str, Any], peer: int) -> list[bool]:
    """One bool for each assertion of a CheckTests job or each line of an AssertTests job."""
    sys.setrecursionlimit(3000)
    if job["lines"] is None:
        return _check_verdicts(job, peer)
    namespace = _namespace(job["setup"])
    lines: list[tuple[bytes, int, tuple[str, ...], tuple[str, ...]]] = job["lines"]
    return [_line_passes(*line, namespace, peer) for line in lines]


def _namespace(setup: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), namespace)
    return namespace


def _run(code: bytes, record: _Record, namespace: dict[str, Any]) -> None:
    namespace |= {"__passed__": record.passed, "__failed__": record.failed, "__never__": record.unreached.append}
    namespace["__Exception__"] = Exception
    exec(marshal.loads(code), namespace)


def _check_verdicts(job: dict[str, Any], peer: int) -> list[bool]:
    record = _Record(job["count"])
    namespace = _namespace(job["setup"])
    candidate = namespace[job["entry_point"]] = Remote(peer, None, (job["entry_point"],))
    try:
        _run(job["code"], record, namespace)
        namespace["check"](candidate)
        record.finish()
    except Exception:
        pass  # a statement between the assertions failed: those after it stay unanswered
    return record.verdicts()


def _line_passes(
    code: bytes, count: int, read: tuple[str, ...], called: tuple[str, ...], namespace: dict[str, Any], peer: int
) -> bool:
    """The solution must define the names that neither setup nor builtins have. A line that calls only builtins tests a
    solution named like one: the first call in it."""
    record = _Record(count)
    names = [name for name in read if name not in namespace] or called
    try:
        _run(code, record, namespace | {name: _fetch(peer, None, (name,)) for name in names})
        record.finish()
    except Exception:
        return False
    return count > 0 and all(record.verdicts())
