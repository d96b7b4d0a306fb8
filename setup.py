"""Builds the jail's fork server with the system's C compiler; everything else is in pyproject.toml.

On a machine where the package is only on PYTHONPATH: `python setup.py build_ext --inplace`.
"""

import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = ["arena", "image", "ending", "seccomp", "child", "spawn", "groups", "job", "watch", "server", "module"]

WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
HARDENED = ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"]
if os.environ.get("FASTGRPO_WERROR"):  # set by the Makefile: a user's compiler may warn of more than ours does
    WARNINGS.append("-Werror")


class BuildJail(build_ext):
    """build_ext that says in one sentence what is missing."""

    def run(self) -> None:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise SystemExit("fastgrpo: the jail's fork server needs Linux on x86-64; this machine has neither or one.")
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            raise SystemExit(
                f"fastgrpo: the jail's fork server could not be compiled ({error}); "
                "install a C compiler and the headers of this Python (Debian and Ubuntu: apt install gcc python3-dev)."
            ) from error


setup(
    cmdclass={"build_ext": BuildJail},
    ext_modules=[
        Extension(
            "fastgrpo_sandbox._jail",
            sources=[f"csrc/{name}.c" for name in SOURCES],
            depends=["csrc/jail.h"],
            extra_compile_args=["-std=gnu11", "-O2", *WARNINGS, *HARDENED],
            extra_link_args=["-Wl,-z,relro", "-Wl,-z,now"],
        )
    ],
)
