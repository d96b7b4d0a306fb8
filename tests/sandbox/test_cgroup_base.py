"""Which cgroup cells' groups may be made below, over a tree of plain files in the place of the kernel's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrpo_sandbox import cgroup, launch, requirements

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Makes a /proc whose process is in `own` of a hierarchy mounted at tmp_path/cg, and that hierarchy's groups."""

    def make(own: str, *, kind: str = "cgroup2", root: str = "/", **files: str) -> Path:
        mount, proc = tmp_path / "cg", tmp_path / "proc"
        (proc / "self").mkdir(parents=True)
        (proc / "self/cgroup").write_text(f"4:memory:/elsewhere\n0::{own}\n")
        mounts = (
            f"22 1 0:20 / /proc rw - proc proc rw\n30 22 0:26 {root} {mount} rw,nosuid shared:9 - {kind} cgroup rw\n"
        )
        (proc / "self/mountinfo").write_text(mounts)
        group(mount, "memory pids", root=True)
        return proc

    return make


def group(path: Path, handed_on: str = "", *, controllers: str = "cpu memory pids", root: bool = False) -> Path:
    path.mkdir(parents=True)
    (path / "cgroup.controllers").write_text(controllers + "\n")
    (path / "cgroup.subtree_control").write_text(handed_on + "\n")
    (path / "cgroup.procs").write_text("")
    if not root:
        (path / "cgroup.type").write_text("domain\n")
        (path / "memory.max").write_text("max\n")
    return path


def test_the_root_of_the_hierarchy_is_its_own_base(tree, tmp_path):
    assert cgroup.find_base(tree("/")) == cgroup.Base(tmp_path / "cg")


def test_a_delegated_parent_is_the_base_and_the_process_stays(tree, tmp_path):
    proc = tree("/user/app/job.scope")
    group(tmp_path / "cg/user", "memory pids")
    app = group(tmp_path / "cg/user/app", "cpu memory pids")
    group(app / "job.scope")
    assert cgroup.find_base(proc) == cgroup.Base(app)
    assert (app / "cgroup.procs").read_text() == ""


def test_a_parent_that_does_not_hand_memory_on_yet_is_asked_to(tree, tmp_path, monkeypatch):
    proc = tree("/unit/main")
    unit = group(tmp_path / "cg/unit")
    group(unit / "main")
    assert cgroup.find_base(proc).folder == unit
    monkeypatch.setattr(cgroup, "make_cell", lambda base: base / "cell")  # plain files would not do for one
    assert cgroup.open_base(proc).folder == unit
    assert (unit / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_a_bind_of_a_part_of_the_hierarchy(tree, tmp_path):
    proc = tree("/docker/c1/app", root="/docker/c1")
    group(tmp_path / "cg/app")
    assert cgroup.find_base(proc).folder == tmp_path / "cg"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: (own / "memory.max").write_text("8589934592\n"), "has a memory limit"),
        (lambda own: (own.parent / "cgroup.controllers").write_text("cpu pids\n"), "no controller for memory"),
        (lambda own: (own.parent / "cgroup.controllers").write_text("hugetlb\n"), "memory and pids"),
        (lambda own: (own.parent / "cgroup.procs").unlink(), "cgroup.procs may not be written"),
        (lambda own: (own.parent / "cgroup.subtree_control").unlink(), "cgroup.subtree_control may not be written"),
    ],
)
def test_each_missing_piece_is_named(tree, tmp_path, change, said):
    proc = tree("/unit/main")
    own = group(group(tmp_path / "cg/unit", "memory pids") / "main")
    change(own)
    base = cgroup.find_base(proc)
    assert base.folder is None
    assert said in base.reason


def test_a_container_whose_only_visible_group_holds_it(tree, tmp_path):
    proc = tree("/")
    (tmp_path / "cg/cgroup.type").write_text("domain\n")
    assert "out of sight" in cgroup.find_base(proc).reason


@pytest.mark.parametrize(("own", "kind"), [("/", "cgroup"), ("/../../host", "cgroup2")])
def test_version_1_or_a_group_beyond_the_mount(tree, own, kind):
    assert "no cgroup v2" in cgroup.find_base(tree(own, kind=kind)).reason


def test_no_proc_at_all(tmp_path):
    assert cgroup.find_base(tmp_path).folder is None


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everything")
def test_a_group_of_somebody_elses(tree, tmp_path):
    proc = tree("/unit/main")
    unit = group(tmp_path / "cg/unit", "memory pids")
    group(unit / "main")
    unit.chmod(0o555)
    assert "may not be written" in cgroup.find_base(proc).reason


def test_what_cannot_be_made_after_all_is_a_reason_not_an_error(tree, tmp_path, monkeypatch):
    def full(base: Path) -> Path:
        raise OSError(28, "No space left on device", str(base / "x"))

    monkeypatch.setattr(cgroup, "make_cell", full)
    base = cgroup.open_base(tree("/"))
    assert base.folder is None
    assert base.reason == f"{tmp_path}/cg/x: No space left on device"


def test_a_cell_whose_group_refuses_it_does_without(tmp_path):
    assert not launch.enter(str(tmp_path / "removed"))
    (tmp_path / "server").mkdir()
    assert launch.enter(str(tmp_path))
    assert (tmp_path / "server/cgroup.procs").read_text() == "0"


def test_the_doctor_says_which_and_why(tree, monkeypatch):
    proc = tree("/", kind="cgroup")
    (check,) = [check for check in requirements.checks(proc) if check.name == "memory"]
    assert check.fine
    assert check.found.startswith("by polling: no cgroup v2")
    monkeypatch.setattr(requirements, "open_base", lambda proc: cgroup.Base(Path("/cg")))
    assert [check.found for check in requirements.checks(proc) if check.name == "memory"] == ["by cgroup, below /cg"]


def test_only_empty_groups_of_dead_hosts_are_swept(tmp_path, monkeypatch):
    dead, alive, removed = 2**22 + 1, os.getpid(), []  # the former is beyond every pid
    for name, populated in ((f"{dead}-1", 0), (f"{dead}-2", 1), (f"{alive}-1", 0), ("x-1", 0)):
        (tmp_path / f"fastgrpo-{name}").mkdir()
        (tmp_path / f"fastgrpo-{name}/cgroup.events").write_text(f"populated {populated}\nfrozen 0\n")
    monkeypatch.setattr(cgroup, "remove", removed.append)
    cgroup._sweep(tmp_path)
    assert removed == [tmp_path / f"fastgrpo-{dead}-1"]
