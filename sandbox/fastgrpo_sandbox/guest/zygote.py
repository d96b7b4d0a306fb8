"""Program of the fork server: a warm, small interpreter that forks jailed children for as long as the host lives.

Started inside bubblewrap as `python -S zygote.py KIND ARMED MODULE...`, with the host's socket as descriptor 0. KIND is
"run" or "session": two programs, because every module and page of the interpreter makes every fork dearer.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

# What solutions import most; loaded once, shared by every child.
WARM = (
    *("ast", "bisect", "collections", "copy", "functools", "heapq", "itertools", "json", "linecache", "math"),
    *("operator", "random", "re", "string", "traceback", "typing"),
)
PROC = "/tmp/proc"  # every job's own /tmp lies over it
GROUPS = "/tmp/cgroup"  # likewise; only where the machine lets us make cgroups
CPUS = 4
count_all = os.cpu_count


def main(kind: str, armed: str, *preload: str) -> None:
    """Serves until the host's socket closes."""
    sys.path[:0] = ["/jail", "/jail/native", "/jail/lib"]
    for name in WARM:
        importlib.import_module(name)
    import _signal  # type: ignore[import-not-found]  # the interpreter has it already, and not `signal`

    import _jail

    _jail.seal()
    from guest import runtime

    if kind == "session":
        _without_ssl("guest.session")
    for name in ("cpu_count", "process_cpu_count"):  # the latter since Python 3.13, whose pools ask it
        if hasattr(os, name):
            setattr(os, name, cpu_count)
    sys.path.extend(["/jail/site"])
    # The fork server hears by this signal that a job ended; a thread of a module's own would take it, and drop it.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGCHLD,))
    for name in preload:
        importlib.import_module(name)
    sys.argv[:] = ["solution.py"]
    proc = os.open(PROC, os.O_RDONLY | os.O_DIRECTORY)
    groups = os.open(GROUPS, os.O_RDONLY | os.O_DIRECTORY) if os.path.isdir(GROUPS) else -1
    runtime.warm_up()
    os.register_at_fork(after_in_child=runtime.silence_forked_child)
    gc.collect()
    gc.freeze()

    script = runtime.FILE, runtime.fresh_module("__main__"), runtime.FINE, runtime.end_script
    _jail.serve(0, proc, groups, int(armed), kind == "session", *script, runtime.run_child)


def cpu_count() -> int:
    """os.cpu_count, as a job hears it: a `Pool()` for each core of a large host would not fit the job's limits, and so
    the host would decide about its verdict."""
    return min(count_all() or 1, CPUS)


def _without_ssl(module: str) -> None:
    """There is no network in here, so asyncio does without 4 MB of libraries."""
    sys.modules["ssl"] = None  # type: ignore[assignment]
    importlib.import_module(module)
    del sys.modules["ssl"]


if __name__ == "__main__":
    main(*sys.argv[1:])
