"""Program that becomes bubblewrap. Started by real root it first stops being root.

bubblewrap run by uid 0 leaves root-owned files of /proc writable, and an ordinary uid cannot walk into a private home
such as /root, where the interpreter may live. So root binds what the jail needs into a tmpfs of its own mount namespace
(nothing is created on the host, nothing is left) and then takes an unused uid. The root of a user namespace that has no
other user, as `unshare -r` and some rootless containers make it, stays who it is: outside, that is an ordinary user.
Whoever is the machine's root there, under whatever name, gets no jail. Argument: a JSON object
`{"bwrap": path, "libraries": [folder], "binds": {source: destination}, "cgroup": path, "arguments": [...]}`.
bubblewrap gets the binds as --ro-bind and finds its own shared libraries in `libraries`; "cgroup" is the cell's (see
cgroup.py) or empty.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

JAIL_UID = 60987  # owns nothing; its processes count against no person's limits
STAGE = "/tmp"
CELL_TMP = "/tmp"  # modules may write here as they are preloaded; no job sees it
GROUPS = "/tmp/cgroup"  # in the jail, where every job's own /tmp lies over it
SETTINGS = "/proc/sys/kernel/core_pattern"  # which the machine's root owns, as whatever it is known here
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000

IS_ROOT = "in this user namespace there is nobody but the machine's root"

# All but a cgroup namespace: bubblewrap's would begin at `server`, and where cgroups are mounted with nsdelegate the
# kernel then refuses to clone into the groups beside it. It hides no more than names of groups, and no job has a /proc.
NAMESPACES = ("user", "ipc", "pid", "net", "uts")

libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def stage(sources: list[str]) -> dict[str, str]:
    """Binds each source under STAGE in a private mount namespace; returns where each one now is. Raises OSError."""
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


def has_users(proc: str = "/proc") -> bool:
    """Whether there is a JAIL_UID, as a user and a group, in this user namespace, that root may become."""
    if _read(f"{proc}/self/setgroups").strip() == "deny":
        return False
    maps = (_read(f"{proc}/self/{kind}_map").splitlines() for kind in ("uid", "gid"))
    return all(any(_holds(*map(int, line.split())) for line in lines) for lines in maps)


def _holds(first: int, outside: int, count: int) -> bool:
    return first <= JAIL_UID < first + count


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def drop_root() -> None:
    """Becomes JAIL_UID for good."""
    os.setgroups([])
    os.setresgid(JAIL_UID, JAIL_UID, JAIL_UID)
    os.setresuid(JAIL_UID, JAIL_UID, JAIL_UID)


def enter(cgroup: str) -> bool:
    """Moves this process, and so all that it starts, into the cell's cgroup. False where the machine refuses: then the
    cell does without, and every outcome says that memory was polled."""
    try:
        with open(f"{cgroup}/server/cgroup.procs", "w") as processes:
            processes.write("0")
        return True
    except OSError:
        return False


def main() -> None:
    """Execs bubblewrap; ends with one line on stderr when a step fails."""
    spec = json.loads(sys.argv[1])
    bwrap, libraries, binds = spec["bwrap"], spec["libraries"], spec["binds"]
    cgroup = spec["cgroup"] if spec["cgroup"] and enter(spec["cgroup"]) else ""
    arguments = ["--tmpfs", CELL_TMP]
    if os.getuid() == 0 and not has_users():
        arguments += ["--uid", "1000", "--gid", "1000", "--cap-drop", "ALL"]  # else bubblewrap keeps a root's
    elif os.getuid() == 0:
        staged = stage([bwrap, *libraries, *binds, *filter(None, [cgroup])])
        drop_root()
        bwrap, libraries = staged[bwrap], [staged[folder] for folder in libraries]
        binds = {staged[source]: destination for source, destination in binds.items()}
        cgroup = staged.get(cgroup, "")
    if os.stat(SETTINGS).st_uid == os.getuid():
        sys.exit(f"launch: {IS_ROOT}")
    arguments += [part for source, destination in binds.items() for part in ("--ro-bind", source, destination)]
    if cgroup:
        arguments += [*(f"--unshare-{name}" for name in NAMESPACES), "--bind", cgroup, GROUPS]
    else:
        arguments += ["--unshare-all"]
    environment = {"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {}
    os.execve(bwrap, ["bwrap", *arguments, *spec["arguments"]], environment)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"launch: {error}")
