"""Program of the fork server: a warm, small interpreter that forks jailed children for as long as the host lives.

Started inside bubblewrap as `python -S zygote.py ARMED MODULE...`, with the host's socket as descriptor 0.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

# What solutions import most; loaded once, shared by every child. Each module makes every fork dearer.
WARM = (
    *("ast", "asyncio", "bisect", "collections", "copy", "dataclasses", "datetime", "enum", "functools", "heapq", "io"),
    *("itertools", "json", "linecache", "math", "operator", "random", "re", "string", "struct", "traceback", "typing"),
)
PROC = "/tmp/proc"  # every job's own /tmp lies over it


def main() -> None:
    """Serves until the host's socket closes."""
    sys.path[:0] = ["/jail", "/jail/native", "/jail/lib"]
    sys.modules["ssl"] = None  # type: ignore[assignment]  # no network in here: asyncio does without
    for name in WARM:
        importlib.import_module(name)
    import _jail

    from guest import runtime

    del sys.modules["ssl"]
    sys.path.extend(["/jail/site"])
    for name in sys.argv[2:]:
        importlib.import_module(name)
    sys.argv[:] = ["solution.py"]
    proc = os.open(PROC, os.O_RDONLY | os.O_DIRECTORY)
    runtime.warm_up()
    gc.collect()
    gc.freeze()
    _jail.serve(0, proc, int(ARMED))
    runtime.run_child(*_jail.receive())


ARMED = sys.argv[1]
if __name__ == "__main__":
    main()
