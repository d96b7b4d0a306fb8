"""What a machine must have for running jails, each requirement with the exact fix."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fastgrpo_sandbox.bwrap import find_bwrap, native_module
from fastgrpo_sandbox.cgroup import open_base
from fastgrpo_sandbox.launch import IS_ROOT
from fastgrpo_sandbox.types import SandboxUnavailable

OLDEST_KERNEL = (5, 14)  # user namespaces' own process counts; close_range and seccomp's decision cache are older


class Check(msgspec.Struct, frozen=True):
    """One requirement: whether it holds, what was found, and the sentence that says how to fix it."""

    name: str
    fine: bool
    found: str
    fix: str = ""


def checks(proc: Path = Path("/proc")) -> list[Check]:
    """Every requirement of the jail pool on this machine, without starting a jail. `proc` is where sysctls are read."""
    return [_platform(), _kernel(), *_sysctls(proc), _seccomp(proc), _bwrap(), _native(), _compiler(), _memory(proc)]


def fixes(proc: Path = Path("/proc")) -> list[str]:
    """One sentence for each requirement that does not hold; [] when jails should work."""
    return [check.fix for check in checks(proc) if not check.fine]


def explain(said: str) -> str:
    """What to do about a jail that did not start, from what bubblewrap or the fork server said."""
    reasons = fixes()
    if reasons:
        return " ".join(reasons)
    if IS_ROOT in said:
        return (
            "start this outside of it, as root or as an ordinary user, or make the namespace with users of its own "
            "(`unshare --map-auto`, with lines for you in /etc/subuid and /etc/subgid)."
        )
    if "uid map" in said or "uid_map" in said or "setgroups" in said:
        return (
            "user namespaces are restricted here: on Ubuntu 24.04 run `sudo sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0`; in Docker add `--security-opt apparmor=unconfined`."
        )
    if "Operation not permitted" in said or "Permission denied" in said:
        return (
            "this container forbids namespaces or mounts: start it with `docker run --security-opt seccomp=unconfined "
            "--security-opt apparmor=unconfined --security-opt systempaths=unconfined` (or as a privileged pod)."
        )
    if "Too many open files" in said:
        return "this process may open no more files: raise its limit with `ulimit -n`, a cell takes three."
    if "preloaded" in said:
        return "leave out of `preload` the module that changes Python for all jobs."
    if "ModuleNotFoundError" in said:
        return "install that module beside fastgrpo_sandbox, or leave it out of `preload`."
    return "run `python -m fastgrpo_sandbox` and send its output with a bug report."


def _platform() -> Check:
    found = f"{sys.platform} on {platform.machine()}"
    fix = "jails need Linux on x86-64: use such a machine, or WSL 2 on Windows."
    return Check("platform", found == "linux on x86_64", found, fix)


def _kernel() -> Check:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    wanted = ".".join(map(str, OLDEST_KERNEL))
    return Check("kernel", numbers >= OLDEST_KERNEL, release, f"the kernel is older than {wanted}: upgrade it.")


def _sysctls(proc: Path) -> Iterator[Check]:
    """Switches that turn user namespaces off; a file that is not there is a switch that this kernel does not have."""
    for name, bad, value in (
        ("user/max_user_namespaces", "0", "63000"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ):
        path = proc / "sys" / name
        found = path.read_text().strip() if path.exists() else "not present"
        sysctl = name.replace("/", ".")
        fix = f"{sysctl} is {found}, which forbids user namespaces: run `sudo sysctl -w {sysctl}={value}`."
        yield Check(sysctl, found != bad, found, fix)


def _seccomp(proc: Path) -> Check:
    path = proc / "sys/kernel/seccomp/actions_avail"
    found = path.read_text().strip() if path.exists() else "not present"
    fix = "the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER): boot a kernel that has them."
    return Check("seccomp", "kill_process" in found, found, fix)


def _bwrap() -> Check:
    try:
        path, _ = find_bwrap()
        return Check("bubblewrap", os.access(path, os.X_OK), path, f"make {path} executable.")
    except SandboxUnavailable as error:
        return Check("bubblewrap", False, "missing", f"{error}.")


def _native() -> Check:
    try:
        return Check("fork server", True, native_module().name)
    except SandboxUnavailable as error:
        return Check("fork server", False, "not built", f"{error}.")


def _compiler() -> Check:
    """Only needed to build; a built fork server is enough."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    built = _native().fine
    fix = "install a C compiler and Python's headers (Debian and Ubuntu: `apt install gcc python3-dev`)."
    return Check("C compiler", compiler is not None or built, compiler or "none", fix)


def _memory(proc: Path) -> Check:
    """Either way holds; by cgroup the kernel counts all that a job's processes share, at every moment."""
    base = open_base(proc)
    return Check("memory", True, f"by cgroup, below {base.folder}" if base.folder else f"by polling: {base.reason}")
