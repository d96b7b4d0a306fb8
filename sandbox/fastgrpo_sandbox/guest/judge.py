"""The judged pair: the judge's process holds the tests and compares; the solution's process answers its requests.

What the judge compares is plain data or a proxy that equals no plain data (peer.py), so the solution knows neither
expected values nor which of its answers passed.
"""

from __future__ import annotations

import _socket
import builtins
import contextlib
import importlib
import marshal
import sys
import types
from typing import Any, NamedTuple

from . import around, arrays, looks
from .allowed import TESTS
from .asserts import compile_asserts, compile_setup
from .compared import Pair, read
from .mocks import asserted
from .names import MODULES, Wanted, own_name, wanted_names
from .peer import Peer
from .remote import place_of
from .skips import skipped
from .syntax import parse

# Functions that say whether numbers agree: where tests do not import one, a solution's own says nothing of its answers.
AGREEING = frozenset({"isclose", "allclose", "array_equal", "array_equiv"})
WARM_UP = "assert f([1, (2.5, 'x')]) == [1, (2.5, 'x')]\n"


class _Record:
    """Verdicts by assertion. One passed if it was run, held every time, and came to where it cannot be run again: it
    stands alone in the tests, or the statement around it, or else the tests as a whole, ran to its end. One that was
    never run passed if all of the other branch did."""

    def __init__(self, count: int) -> None:
        self.held = [False] * count
        self.broken = [False] * count
        self.ended = [False] * count
        self.unreached: tuple[int, ...] = ()
        self.branches: dict[tuple[range, range], None] = {}  # that were run, each with the one in whose place

    def passed(self, index: int, test: Any) -> None:
        """An assertion that stands alone."""
        self.checked(index, test)
        self.ended[index] = True

    def checked(self, index: int, test: Any) -> None:
        """One that may be run again."""
        self.held[index] = True
        broken, self.broken[index] = self.broken[index], True  # should its truth end the tests
        self.broken[index] = broken or not test

    def failed(self, index: int) -> None:
        self.broken[index] = True

    def over(self, *indices: int) -> None:
        """The statement around these ran to its end."""
        for index in indices:
            self.ended[index] = True

    def instead(self, start: int, stop: int, other: int, other_stop: int) -> None:
        """A branch begins, and the other does not."""
        self.branches[range(start, stop), range(other, other_stop)] = None

    def finish(self, unreached: tuple[int, ...]) -> None:
        """The tests came to their end; an `assert False` that nothing came to holds."""
        self.ended = [True] * len(self.ended)
        self.unreached = unreached
        for index in unreached:
            self.held[index] = True

    def verdicts(self) -> list[bool]:
        every = zip(self.held, self.broken, self.ended, strict=True)
        found = [held and ended and not broken for held, broken, ended in every]
        for run, other in reversed(self.branches):  # the inner ones first
            if all(found[run.start : run.stop]) and not any(map(self.was_run, other)):
                found[other.start : other.stop] = [True] * len(other)
        return found

    def was_run(self, index: int) -> bool:
        return index not in self.unreached and (self.held[index] or self.broken[index])


def verdicts(job: dict[str, Any], peer: int) -> list[bool]:
    """One bool for each assertion of a CheckTests job or line of an AssertTests job. Raises what the setup does."""
    sys.setrecursionlimit(3000)
    left_out = skipped(job["skips"])  # while the solution has answered nothing
    solution = Peer(peer)
    sys.modules["solution"] = _module_of(solution)
    if job["special"]:
        _prepare(job["special"], solution)
    given = _given(job["needed"], solution) if job["needed"] else {}
    if not given and any(hasattr(builtins, name) for name in job["needed"]):
        return [False] * len(job["lines"])  # they test nothing but what the solution does not have
    namespace: dict[str, Any] = {"__name__": TESTS, "__type__": looks.type_of, "__super__": looks.super_of, **given}
    namespace |= {"__compare__": arrays.compare, "__subtract__": arrays.subtract, "__agree__": arrays.agree}
    noted = _Noted()
    namespace |= {"__some__": arrays.some, "__noted__": noted.look, "__asserted__": asserted}
    for name in job["modules"]:
        with contextlib.suppress(ImportError):  # a package that is not there, nor asked for by each test
            namespace[name] = _module(name, solution)
    exec(marshal.loads(job["setup"]), namespace)
    solution.own_names = namespace
    if job["lines"] is None:
        return _check_verdicts(job, solution, namespace)
    defined = {name for name, value in namespace.items() if name not in given or value is not given[name]}
    setup = _Setup(namespace, defined, bool(given), noted)
    if len(left_out) == len(job["lines"]):
        return [False] * len(left_out)
    return [
        i in left_out or _line_passes(code, Wanted(*wanted), setup, solution)
        for i, (code, wanted) in enumerate(job["lines"])
    ]


def _module_of(solution: Peer) -> types.ModuleType:
    """What `import solution` gives to tests."""

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return solution.name(name)[0]

    module = types.ModuleType("solution")
    module.__dict__["__getattr__"] = find
    return module


def _prepare(words: frozenset[str], solution: Peer) -> None:
    """For tests that look at the solution with `inspect`, or change what is around it."""
    if "inspect" in words:
        looks.patch_inspect()
    if "mock" in words:
        importlib.import_module("unittest.mock")
    if words - {"inspect", "mock"}:
        tests = around.Around(solution)
        solution.before_asking = tests.look
        if words & {"environ", "getenv"}:
            solution.after_answer = tests.hear


def _given(names: tuple[str, ...], solution: Peer) -> dict[str, Any]:
    """What the solution has of these."""
    found = {}
    for name in names:
        with contextlib.suppress(AttributeError):
            found[name] = solution.name(name)[0]
    return found


def _run(code: bytes, record: _Record, namespace: dict[str, Any]) -> None:
    namespace |= {"__passed__": record.passed, "__checked__": record.checked, "__failed__": record.failed}
    namespace |= {"__over__": record.over, "__instead__": record.instead, "__Exception__": Exception}
    exec(marshal.loads(code), namespace)


def _check_verdicts(job: dict[str, Any], solution: Peer, namespace: dict[str, Any]) -> list[bool]:
    code, count, unreached = job["code"]
    record, entry, wanted = _Record(count), job["entry_point"], Wanted(*job["wanted"])
    try:
        candidate = _candidate(entry, solution)
        namespace[entry] = namespace[own_name(entry)] = candidate
        namespace |= _modules(wanted, namespace, solution) | _offered(wanted, namespace, solution)
        _run(code, record, namespace)
        namespace["check"](candidate)
        if not solution.is_gone:  # the tests may have caught even that
            record.finish(unreached)
    except BaseException:
        pass  # a statement between the assertions failed: those after it stay unanswered
    return record.verdicts()


def _candidate(entry: str, solution: Peer) -> Any:
    """What `check` is given: a function or class of the solution's, or a method as in `Solution().add`."""
    if not entry.isidentifier():
        names = {name: solution.name(name)[0] for name in read(parse(entry))}
        return eval(compile(entry, "entry_point", "eval", dont_inherit=True), names)
    return solution.name(entry)[0] if entry[:1].isupper() else solution.function(entry)


class _Noted:
    """Whether an assertion in a function of the setup has failed."""

    def __init__(self) -> None:
        self.failed = False

    def look(self, test: Any) -> bool:
        """The truth of an assertion's test."""
        before, self.failed = self.failed, True  # should it end the tests
        holds = bool(test)
        self.failed = before or not holds
        return holds


class _Setup(NamedTuple):
    """What the setup has left: the namespace, the names that are its own, whether it took some of the solution; and
    whether what its functions assert holds."""

    namespace: dict[str, Any]
    defined: set[str]
    uses_solution: bool
    noted: _Noted


def _line_passes(
    compiled: tuple[bytes, int, tuple[int, ...]],
    wanted: Wanted,
    setup: _Setup,
    solution: Peer,
) -> bool:
    """The solution must define the names that neither setup, builtins nor the standard library have. A line that wants
    no function of it tests one that is named like a builtin. What else the solution gives is no wanted value."""
    code, count, unreached = compiled
    record = _Record(count)
    setup.noted.failed = False
    try:
        names = _modules(wanted, setup.namespace, solution)
        found, others = {}, (AttributeError,) if wanted.is_open else ()
        for name in wanted.names:
            if name not in setup.defined:
                with contextlib.suppress(*others):
                    found[name] = solution.name(name)
        own = {name: value for name, (value, is_library) in found.items() if not is_library}
        if any(_agrees_alone(Pair(*pair), own, setup) for pair in wanted.compared):
            return False
        if len(own) > 1 and not AGREEING.isdisjoint(own):
            return False
        tested = wanted.called or (() if found else wanted.other)
        if tested and not setup.uses_solution and all(name[:1].isupper() for name in own):
            names |= _builtins_of(tested, solution, must=not found)
        names |= {name: value for name, (value, _) in found.items()}
        _run(code, record, setup.namespace | names)
        if not solution.is_gone:
            record.finish(unreached)
    except BaseException:
        return False
    return count > 0 and not setup.noted.failed and all(record.verdicts())


def _agrees_alone(pair: Pair, own: dict[str, Any], setup: _Setup) -> bool:
    """Whether a comparison asks the solution to agree with itself: what is the solution's stands on both sides."""
    if not any(_is_answer(name, own[name]) for name in pair.right if name in own):
        return False
    if setup.uses_solution and not setup.defined.isdisjoint(pair.left):
        return True
    return any(not pair.is_membership or _is_answer(name, own[name]) for name in pair.left if name in own)


def _is_answer(name: str, value: Any) -> bool:
    """Whether a name of the solution's stands for data or for a function, rather than for a class."""
    return place_of(value) is None or not name[:1].isupper()


def _modules(wanted: Wanted, namespace: dict[str, Any], solution: Peer) -> dict[str, Any]:
    return {name: _module(name, solution) for name in wanted.modules if name not in namespace}


def _module(name: str, solution: Peer) -> Any:
    """What tests use as a module and do not import: the library's class of the name where the solution has that, as by
    `from datetime import datetime`. Raises ImportError."""
    module = importlib.import_module(MODULES.get(name, name))
    own = getattr(module, name, None)
    if isinstance(own, type):
        with contextlib.suppress(AttributeError, ValueError):  # it has none, or the module, which does not cross
            value, is_library = solution.name(name)
            return own if is_library and value is own else module
    return module


def _offered(wanted: Wanted, namespace: dict[str, Any], solution: Peer) -> dict[str, Any]:
    """What tests of one function may take from beside it: classes, and what is the library's own."""
    found = {}
    for name in wanted.names:
        if name not in namespace:
            with contextlib.suppress(AttributeError):
                value, is_library = solution.name(name)
                if is_library or not _is_answer(name, value):
                    found[name] = value
    return found


def _builtins_of(names: tuple[str, ...], solution: Peer, must: bool) -> dict[str, Any]:
    """Those that the solution has. Raises AttributeError where it `must` have one and has none."""
    found = _given(names, solution)
    if must and not found:
        raise AttributeError(names[0])
    return found


def warm_up() -> None:
    """One assertion judged. The solution answers first, so that the judge finds its answers waiting."""
    near, far = _socket.socketpair()
    module = types.ModuleType("solution")
    module.__dict__["f"] = lambda value: value
    asking, answering = Peer(near.fileno()), Peer(far.fileno(), module)
    asking.ask("name", "f")
    asking.ask("call", 0, "", [[1, (2.5, "x")]])
    answering.serve_one()
    answering.serve_one()
    limit = sys.getrecursionlimit()
    verdicts(
        {
            "setup": compile_setup(""),
            "needed": (),
            "special": frozenset(),
            "modules": (),
            "skips": (),
            "lines": [(compile_asserts(WARM_UP), tuple(wanted_names(WARM_UP)))],
        },
        near.fileno(),
    )
    sys.setrecursionlimit(limit)
    del sys.modules["solution"]
    near.close()
    far.close()
