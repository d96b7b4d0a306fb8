"""What a child does with its job: a script, a session, or one side of a judged pair."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import io
import linecache
import marshal
import os
import random
import sys
import traceback
import types
import typing
from _sitebuiltins import Quitter
from collections.abc import Callable
from typing import Any

import _jail

from . import judge, looks, unit
from .peer import Peer
from .syntax import compile_source
from .watched import FOLDER
from .wire import CHANNEL, RESULT, frame, result_body, send_result

FILE = "solution.py"
FINE = frame(RESULT, result_body())
WARM_UP = """
def warm(values, *, scale=1.0):
    total = {}
    for index, value in enumerate(sorted(values)):
        total[index] = [value * scale, f"{value}"] if value > 1 else (value,)
    return total
try:
    assert warm([3, 1, 2], scale=2) == {}, "no"
except AssertionError as error:
    caught = error
print("warm")
"""
WARM_SESSION = """
async def main(call, value):
    return {"value": await call("warm", value=value)}
"""
WARM_UP_ROUNDS = 20  # CPython 3.11 specialises code after 8 calls
BUFFERED = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
_source: list[str] = []
_at_exit: list[int] = []  # callbacks that are none of a script's


def run_child(receive: Callable[[], tuple[bytes, int]]) -> None:
    """Waits for a job, runs it and ends the process. `receive` runs what is only a script."""
    status = 1
    try:
        payload, peer = receive()
    except SystemExit as stop:
        status = _stopped(stop)
    except BaseException as error:
        end_script()
        report(error)
    else:
        status = _run_role(payload, peer)
    finally:
        _leave(status)


def _run_role(payload: bytes, peer: int) -> int:
    try:
        job = marshal.loads(payload)
        return _ROLES[job["role"]](job, peer)
    except BaseException as error:
        report(error)
        return 1


def warm_up() -> None:
    """Runs in the fork server what every child will run, so that nothing is built, specialised or written for the first
    time in a child: each page written there is copied, and counts against a machine with thousands of children."""
    for _ in range(WARM_UP_ROUNDS):
        _jail.run(WARM_UP, FILE, fresh_module("warm"))
        load(WARM_UP, "warm")
        describe(sys.modules.pop("warm").caught)
        marshal.loads(marshal.dumps({"code": WARM_UP, "files": {}}))
        result_body()
        end_script()
        judge.warm_up()
        if "guest.session" in sys.modules:
            sys.modules["guest.session"].warm_up(load(WARM_SESSION, "warm"))
    _flush()
    sys.modules.pop("warm", None)
    _source.clear()
    linecache.cache.clear()
    linecache.cache[FILE] = (lambda: "\n".join(_source) or _jail.source(),)
    builtins.exit, builtins.quit = Quitter("exit", "Ctrl-D"), Quitter("quit", "Ctrl-D")  # site.py is not run here
    sys.path.insert(0, FOLDER)
    _at_exit.append(atexit._ncallbacks())
    random.seed(0)  # the same program gives the same output in every cell and run


def silence_forked_child() -> None:
    """A process that a job forks may come to the job's end, too, and must not report it a second time."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, CHANNEL, inheritable=False)
    os.close(null)


def end_script() -> None:
    """What the interpreter does at a program's end and a process that is dropped does not.

    It waits for threads, calls what was registered, lets go of objects with a last act, and writes out what open files
    still hold.
    """
    threading = sys.modules.get("threading")
    if threading is not None and len(threading._active) > 1:
        threading._shutdown()
    if _at_exit and atexit._ncallbacks() > _at_exit[0]:
        atexit._run_exitfuncs()
    _drop_finalised()
    for item in gc.get_objects():
        if type(item) in BUFFERED:
            with contextlib.suppress(Exception):  # closed, or read-only
                item.flush()
    _flush()


def _drop_finalised() -> None:
    """The script's objects that do something as they go."""
    space = vars(sys.modules.get("__main__", types))
    for name in [name for name, value in space.items() if _is_finalised(value)]:
        space[name] = None


def _is_finalised(value: Any) -> bool:
    return type(value) is types.GeneratorType or hasattr(type(value), "__del__")


def report(error: BaseException) -> None:
    """Sends the failure as this process' result."""
    send_result(error=describe(error), kind=type(error).__name__)


def describe(error: BaseException) -> str:
    """The traceback from the job's own first frame on."""
    for code in _source or [_jail.source()]:
        linecache.cache[FILE] = (len(code), None, code.splitlines(keepends=True), FILE)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != FILE:
        trace = trace.tb_next
    try:
        # Code that does not compile has no frame at all.
        uncompiled = isinstance(error, SyntaxError) and error.filename == FILE
        trace = trace or (None if uncompiled else error.__traceback__)
        return "".join(traceback.format_exception(type(error), error, trace, limit=-20))
    except BaseException:
        return type(error).__name__


def fresh_module(name: str) -> types.ModuleType:
    """An empty module in the place of any of that name."""
    module = types.ModuleType(name)
    module.__dict__.update(__builtins__=builtins, __file__=FILE)
    sys.modules[name] = module
    return module


def load(code: str, name: str) -> types.ModuleType:
    """Executes `code` as a fresh module. Raises whatever the code raises."""
    module = fresh_module(name)
    _source.append(code)
    exec(compile_source(code, FILE), module.__dict__)
    return module


def _place_files(files: dict[str, bytes]) -> None:
    for path, content in files.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def _script(job: dict[str, Any], peer: int) -> int:
    _place_files(job["files"])
    try:
        load(job["code"], "__main__")
    except SystemExit as stop:
        return _stopped(stop)
    end_script()
    send_result()
    return 0


def _stopped(stop: SystemExit) -> int:
    end_script()
    if stop.code not in (None, 0):
        report(stop)
        return stop.code if isinstance(stop.code, int) else 1
    send_result()
    return 0


def _session(job: dict[str, Any], peer: int) -> int:
    value = sys.modules["guest.session"].run(load(job["code"], "workflow"), job["inputs"])
    _flush()
    send_result(value=value)
    return 0


def _solution(job: dict[str, Any], peer: int) -> int:
    _place_files(job["files"])
    try:
        module = load(job["code"], "solution")
    except BaseException as error:
        report(error)  # the peer closes with the process
        return 1
    Peer(peer, module).serve()
    return 0


def _judge(job: dict[str, Any], peer: int) -> int:
    typing.get_type_hints = looks.get_type_hints
    send_result(tests=judge.verdicts(job, peer))
    return 0


def _checker(job: dict[str, Any], peer: int) -> int:
    passed = load(job["code"], "checker").checker(*job["case"])
    _flush()
    send_result(tests=[bool(passed)])
    return 0


def _unittest(job: dict[str, Any], peer: int) -> int:
    _place_files(job["files"])
    unit.run(job, load)
    return 0


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not getattr(stream, "closed", False):  # as the interpreter does at its end
            stream.flush()
    if sys.stdout is not sys.__stdout__ and sys.__stdout__ is not None:
        with contextlib.suppress(ValueError):  # closed
            sys.__stdout__.flush()


def _leave(status: int) -> None:
    try:
        _flush()
    finally:
        os._exit(status & 0xFF)  # no atexit, no finalizers, no waiting for threads


_ROLES = {
    "script": _script,
    "session": _session,
    "solution": _solution,
    "judge": _judge,
    "unittest": _unittest,
    "checker": _checker,
}
