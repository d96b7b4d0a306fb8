"""What a child does with its job: a script, a session, or one side of a judged pair."""

from __future__ import annotations

import builtins
import linecache
import marshal
import os
import random
import sys
import traceback
import types
from typing import Any

import _jail

from . import judge, unit
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
_source: list[str] = []


def run_child(main: types.ModuleType) -> None:
    """Waits for a job, runs it and ends the process. `main` is where a script runs."""
    status = 1
    try:
        payload, peer = _jail.receive(FILE, main, FINE)
    except SystemExit as stop:
        status = _stopped(stop)
    except BaseException as error:
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
        judge.warm_up()
        if "guest.session" in sys.modules:
            sys.modules["guest.session"].warm_up(load(WARM_SESSION, "warm"))
    _flush()
    sys.modules.pop("warm", None)
    _source.clear()
    linecache.cache.clear()
    random.seed(0)  # the same program gives the same output in every cell and run


def silence_forked_child() -> None:
    """A process that a job forks may come to the job's end, too, and must not report it a second time."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, CHANNEL, inheritable=False)
    os.close(null)


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
        return "".join(traceback.format_exception(type(error), error, trace or error.__traceback__, limit=-20))
    except BaseException:
        return type(error).__name__


def fresh_module(name: str) -> types.ModuleType:
    """An empty module in the place of any of that name."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module


def load(code: str, name: str) -> types.ModuleType:
    """Executes `code` as a fresh module. Raises whatever the code raises."""
    module = fresh_module(name)
    _source.append(code)
    exec(compile(code, FILE, "exec", dont_inherit=True), module.__dict__)
    return module


def _place_files(files: dict[str, bytes]) -> None:
    for path, content in files.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    if files:
        sys.path.insert(0, os.getcwd())  # modules beside a script can be imported


def _script(job: dict[str, Any], peer: int) -> int:
    _place_files(job["files"])
    try:
        load(job["code"], "__main__")
    except SystemExit as stop:
        return _stopped(stop)
    _flush()
    send_result()
    return 0


def _stopped(stop: SystemExit) -> int:
    if stop.code not in (None, 0):
        report(stop)
        return stop.code if isinstance(stop.code, int) else 1
    _flush()
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
        os.close(peer)
        report(error)
        return 1
    judge.serve_solution(module, peer)
    return 0


def _judge(job: dict[str, Any], peer: int) -> int:
    send_result(tests=judge.verdicts(job, peer))
    return 0


def _unittest(job: dict[str, Any], peer: int) -> int:
    _place_files(job["files"])
    unit.run(job, load)
    return 0


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _leave(status: int) -> None:
    try:
        _flush()
    finally:
        os._exit(status & 0xFF)  # no atexit, no finalizers, no waiting for threads


_ROLES = {"script": _script, "session": _session, "solution": _solution, "judge": _judge, "unittest": _unittest}
