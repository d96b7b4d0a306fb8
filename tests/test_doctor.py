"""Each thing that can be missing on a machine has its own sentence, and training does not start without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from fastgrpo import doctor
from fastgrpo.doctor import Finding
from fastgrpo.errors import UserError
from fastgrpo_sandbox.requirements import Check


@pytest.mark.parametrize("found", ["the jail did not start", "the jail did not start; run `sysctl`"])
def test_jail_that_does_not_start_says_the_fix_once(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    async def probe() -> Check:
        return Check("a real jail", False, found, "run `sysctl`")

    monkeypatch.setattr("fastgrpo_sandbox.doctor.probe", probe)
    assert doctor.jail() == Finding("jail", False, "the jail did not start; run `sysctl`")


def test_sandbox_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastgrpo_sandbox.doctor", None)
    finding = doctor.jail()
    assert not finding.ok
    assert finding.text.endswith("run make setup")


@pytest.mark.jail
def test_jail_of_this_machine() -> None:
    finding = doctor.jail()
    assert finding.ok, finding.text


@pytest.mark.parametrize(
    ("name", "version", "ok"),
    [
        ("vllm", "0.25.1", True),
        ("vllm", "0.24.9", False),
        ("vllm", "0.33.0", False),
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.9.1", False),
        ("triton", None, False),
    ],
)
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, ok: bool) -> None:
    monkeypatch.setattr(doctor, "_version", {name: version}.get)
    assert doctor.package(name).ok is ok


def test_the_ranges_are_those_that_the_package_declares() -> None:
    """The doctor also runs before there is a package to ask."""
    project = tomllib.loads((Path(doctor.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [Requirement(text) for text in (*extras["engine"], *extras["gpu"])]
    bounds = {each.name: {bound.operator: bound.version for bound in each.specifier} for each in declared}
    for name, (low, high) in doctor.SUPPORTED.items():
        assert Version(bounds[name][">="]).release[:2] == low
        assert "<" not in bounds[name] or Version(bounds[name]["<"]).release[:2] == high
    assert Version(project["requires-python"].removeprefix(">=")).release[:2] == doctor.PYTHON[0]


def test_cuda_builds_beside_a_cpu_torch_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    finding = doctor.media_packages()
    assert not finding.ok
    assert finding.text.endswith("pip uninstall -y torchvision")
    monkeypatch.setattr(doctor, "_version", {"torch": "2.11.0+cu130", "torchvision": "0.26.0"}.get)
    assert doctor.media_packages().ok


def test_no_compiler_and_no_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    monkeypatch.setattr(doctor, "_read", lambda path: "flags: sse4_2")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "apt-get install gcc" in doctor.compiler().text
    assert "no AVX2" in doctor.processor().text
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert not doctor.python().ok


def test_a_locale_in_which_models_files_are_misread_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, ok in (("UTF-8", True), ("utf8", True), ("ISO-8859-1", False), ("ANSI_X3.4-1968", False)):
        monkeypatch.setattr(doctor.locale, "getpreferredencoding", lambda _, encoding=encoding: encoding)
        found = doctor.python()
        assert found.ok is ok
        assert ok or found.text == f"reads text files as {encoding}, and those of models are UTF-8; set PYTHONUTF8=1"


@pytest.mark.parametrize("required", [True, False])
def test_only_required_findings_stop_training(monkeypatch: pytest.MonkeyPatch, required: bool) -> None:
    broken: Callable[..., list[Finding]] = lambda **_: [Finding("jail", False, "broken", required)]  # noqa: E731
    monkeypatch.setattr(doctor, "check", broken)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == int(required)
    if required:
        with pytest.raises(UserError, match="jail: broken"):
            doctor.require_ready()
    else:
        doctor.require_ready()
    monkeypatch.setattr(sys, "argv", ["doctor", "gpu"])
    with pytest.raises(UserError, match="unexpected argument 'gpu'"):
        doctor.main()


def test_runs_on_the_standard_library_alone() -> None:
    command = [sys.executable, "-S", "-m", "fastgrpo.doctor", "--before-install"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.stderr == ""
    assert {line.split()[1] for line in done.stdout.splitlines()} == {"python", "processor", "compiler", "disk"}
