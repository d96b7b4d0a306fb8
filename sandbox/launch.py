"""Program that becomes bubblewrap. Started by real root it first stops being root.

bubblewrap run by uid 0 leaves root-owned files of /proc writable, and an ordinary uid cannot walk into a private home
such as /root, where the interpreter may live. So root binds what the jail needs into a tmpfs of its own mount namespace
(nothing is created on the host, nothing is left) and then takes an unused uid. Argument: a JSON object
`{"bwrap": path, "libraries": [folder], "binds": {source: destination}, "arguments": [...]}`; bubblewrap gets the binds
as --ro-bind and finds its own shared libraries in `libraries`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

JAIL_UID = 60987  # owns nothing; its processes count against no person's limits
STAGE = "/tmp"
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000

libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def stage(sources: list[str]) -> dict[str, str]:
    """Binds each source under STAGE in a private mount namespace; returns where each one now is."""
    if libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare mount namespace")
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    opened = {source: os.open(source, os.O_PATH) for source in sources}
    _mount("tmpfs", STAGE, "tmpfs", 0, "size=1m,mode=0755")
    staged = {}
    for number, (source, fd) in enumerate(opened.items()):
        place = f"{STAGE}/{number}"
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o755))
        _mount(f"/proc/self/fd/{fd}", place, "", MS_BIND | MS_REC)
        os.close(fd)
        staged[source] = place
    return staged


def drop_root() -> None:
    """Becomes JAIL_UID for good."""
    os.setgroups([])
    os.setresgid(JAIL_UID, JAIL_UID, JAIL_UID)
    os.setresuid(JAIL_UID, JAIL_UID, JAIL_UID)


def main() -> None:
    """Execs bubblewrap; ends with one line on stderr when a step fails."""
    spec = json.loads(sys.argv[1])
    bwrap, libraries, binds = spec["bwrap"], spec["libraries"], spec["binds"]
    if os.getuid() == 0:
        staged = stage([bwrap, *libraries, *binds])
        drop_root()
        bwrap, libraries = staged[bwrap], [staged[folder] for folder in libraries]
        binds = {staged[source]: destination for source, destination in binds.items()}
    arguments = [part for source, destination in binds.items() for part in ("--ro-bind", source, destination)]
    environment = {"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {}
    os.execve(bwrap, ["bwrap", *arguments, *spec["arguments"]], environment)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"launch: {error}")
