"""Memory and processes held by cgroup v2, where this process may make cgroups and leave itself where it is.

Each cell has `<base>/fastgrpo-<pid of the host>-<number>/`; in it `server/` holds bubblewrap and the fork server, which
makes a group beside it for every child (csrc/groups.c). The base is this process' own group only if that is the root of
the hierarchy: any other cannot both hold a process and hand memory on to groups below. Else it is the group above, as
systemd delegates it to a user or to a unit with DelegateSubgroup=, unless the own group's memory is limited: a group
beside it would escape that limit. Version 1 is not supported: to move a process into a group takes it up to 15 ms.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from pathlib import Path

import msgspec

from fastgrpo_sandbox.launch import JAIL_UID, has_users

log = logging.getLogger("fastgrpo_sandbox")
WANTED = frozenset(("memory", "pids"))
PREFIX = "fastgrpo-"
REMOVE_DEADLINE_S = 5.0

_numbers = itertools.count(1)  # cells of all pools of this process


class Base(msgspec.Struct, frozen=True):
    """Where groups of cells can be made: `folder`, or None and, as a clause for the doctor, `reason`."""

    folder: Path | None
    reason: str = ""


def find_base(proc: Path = Path("/proc")) -> Base:
    """What is delegated to this process, by looking only. `proc` is where its mounts and its group are read."""
    mount, own = _own_group(proc)
    if mount is None or own is None:
        return Base(None, "no cgroup v2 hierarchy with this process in it is mounted")
    base = own
    if (own / "cgroup.type").exists():  # every group has it but the root
        if own == mount:
            return Base(None, f"{own} holds this process, and the group above it is out of sight")
        if _read(own / "memory.max") not in ("", "max"):
            return Base(None, f"{own} has a memory limit, which groups beside it would escape")
        base = own.parent
    missing = WANTED - set(_read(base / "cgroup.controllers").split())
    if missing:
        return Base(None, f"{base} has no controller for {' and '.join(sorted(missing))}")
    needed = [base, base / "cgroup.procs"]
    if not set(_read(base / "cgroup.subtree_control").split()) >= WANTED:
        needed.append(base / "cgroup.subtree_control")
    refused = next((path for path in needed if not os.access(path, os.W_OK)), None)
    return Base(None, f"{refused} may not be written") if refused else Base(base)


def open_base(proc: Path = Path("/proc")) -> Base:
    """find_base, made ready: controllers handed on, one group made and removed, and those of dead hosts removed."""
    base = find_base(proc)
    if base.folder is None:
        return base
    try:
        if not set(_read(base.folder / "cgroup.subtree_control").split()) >= WANTED:
            _hand_on(base.folder)
        remove(make_cell(base.folder))
        _sweep(base.folder)
    except OSError as error:
        return Base(None, f"{error.filename or base.folder}: {os.strerror(error.errno or 0)}")
    return base


def make_cell(base: Path) -> Path:
    """A group for one cell, which launch.py will enter. Raises OSError."""
    while True:
        cell = base / f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        with contextlib.suppress(FileExistsError):
            cell.mkdir()
            break
    try:
        _hand_on(cell)
        (cell / "server").mkdir()
        # What it takes to make groups in it and to start processes there; no limit of its own.
        if os.getuid() == 0 and has_users():
            for path in (cell, cell / "cgroup.procs"):
                os.chown(path, JAIL_UID, JAIL_UID)
    except OSError:
        remove(cell)
        raise
    return cell


def remove(cell: Path) -> None:
    """Kills what is left in a cell's group, waits at most 5 s for its end and removes it; logs where that fails."""
    deadline = time.monotonic() + REMOVE_DEADLINE_S
    with contextlib.suppress(OSError):
        (cell / "cgroup.kill").write_text("1")  # Linux 5.14; before, bubblewrap's end is the end of all
    while True:
        try:
            for entry in os.scandir(cell):
                if entry.is_dir():
                    os.rmdir(entry.path)
            return cell.rmdir()
        except FileNotFoundError:
            return None
        except OSError as error:
            if time.monotonic() > deadline:
                return log.warning("cgroup left behind: path=%s reason=%r", cell, str(error))
        time.sleep(0.01)


def _sweep(base: Path) -> None:
    """Removes groups whose host was killed before it could. One with processes in it stays, whatever its name says: the
    number may be of another pid namespace, or its jails are still ending and the next pool will see to it."""
    for cell in base.glob(f"{PREFIX}*-*"):
        if not _alive(cell.name.split("-")[1]) and "populated 0" in _read(cell / "cgroup.events"):
            remove(cell)


def _alive(pid: str) -> bool:
    return not pid.isdigit() or os.path.exists(f"/proc/{pid}")


def _hand_on(group: Path) -> None:
    (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(WANTED)))


def _own_group(proc: Path) -> tuple[Path | None, Path | None]:
    """Where cgroup v2 is mounted, and this process' group there; None for what is not visible."""
    path = next((line[3:] for line in _read(proc / "self/cgroup").splitlines() if line.startswith("0::/")), None)
    for line in _read(proc / "self/mountinfo").splitlines():
        fields, _, source = line.partition(" - ")
        _, _, _, root, mount, *_ = fields.split()
        if source.startswith("cgroup2 ") and path is not None:
            inside = os.path.relpath(path, root)
            beyond = path.startswith("/..") or inside.startswith("..")
            return Path(mount), None if beyond else Path(mount) / inside
    return None, None


def _read(path: Path) -> str:
    """The text of a kernel's file, or nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
