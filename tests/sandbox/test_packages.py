"""Which installed files a jail gets for the modules that it may import."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgrpo_sandbox import BlockingSandboxPool, Limits, SandboxUnavailable
from fastgrpo_sandbox.packages import files_of


def test_a_module_brings_what_its_distribution_requires_and_nothing_else():
    names = set(files_of(("pytest",)).values())
    assert {"pytest", "_pytest", "pluggy"} <= names
    assert "msgspec" not in names


def test_modules_that_are_not_installed_bring_nothing():
    assert files_of(("json", "no_such_module")) == {}
    assert files_of(()) == {}


WRITES = """
import pathlib, tempfile
cache = pathlib.Path.home() / ".cache" / "fonts"
cache.parent.mkdir(parents=True)
cache.write_text("found")
made, temporary = cache.read_text(), tempfile.mkdtemp()
"""
PLOT = """
import os
import matplotlib.pyplot as plt
from mpl_toolkits.mplot3d import Axes3D
figure, axes = plt.subplots()
axes.plot([1, 2], [3, 4])
figure.savefig("plot.png")
print(plt.get_backend(), os.path.getsize("plot.png") > 1000, [line.get_ydata().tolist() for line in axes.lines])
"""


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    """A package of one module, as pip would leave it."""
    (folder / f"{name}.py").write_text(source)
    facts = folder / f"{name}-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (facts / "RECORD").write_text(f"{name}.py,,\n")
    monkeypatch.syspath_prepend(folder)


CHANGES = {
    "shallow": ("import sys\nsys.setrecursionlimit(60)", "UnittestTests are judged wrongly here{}: .*RecursionError.*"),
    "blind": ("import unittest\nunittest.TestCase.assertEqual = lambda *_: None", r"Unit.*{}: \(True, True\) came .*"),
    "halting": ("import sys\nsys.modules['unittest'] = None", "UnittestTests .*{}: ModuleNotFoundError: .*"),
    "silent": ("import builtins\nbuiltins.print = lambda *_: None", r"does not work here{}: print\(6 \* 7\) wrote ''"),
}


@pytest.mark.jail
@pytest.mark.parametrize("name", CHANGES)
def test_a_module_that_changes_all_verdicts_is_not_preloaded(tmp_path: Path, monkeypatch, name: str) -> None:
    """Else every solution would be wrong, or right."""
    source, why = CHANGES[name]
    installed(tmp_path, monkeypatch, name, source)
    said = why.format(f" with {name} preloaded") + "; leave out of `preload` the module"
    with pytest.raises(SandboxUnavailable, match=said), BlockingSandboxPool(cells=1, preload=(name,)):
        pass


@pytest.mark.jail
def test_a_preloaded_module_may_leave_a_thread_running(tmp_path: Path, monkeypatch) -> None:
    """Such a thread took the signal that a job has ended, and the job was waited for in vain."""
    source = "import queue, threading\nthreading.Thread(target=queue.Queue().get, daemon=True).start()\n"
    installed(tmp_path, monkeypatch, "waits_on", source)
    few = Limits(wall_s=0.5)
    with BlockingSandboxPool(cells=1, preload=("waits_on",)) as pool:
        assert [pool.run("print(1)", limits=few).stdout for _ in range(3)] == 3 * ["1\n"]


@pytest.mark.jail
def test_jobs_before_a_pool_opens_have_limits_of_their_own_and_are_not_counted() -> None:
    with BlockingSandboxPool(cells=1, limits=Limits(output_bytes=0)) as pool:
        assert not any(value for name, value in pool.pool.stats().items() if name != "cells")


@pytest.mark.jail
def test_a_module_that_writes_files_as_it_is_imported_is_preloaded_and_no_job_sees_them(tmp_path: Path, monkeypatch):
    installed(tmp_path, monkeypatch, "writes_on_import", WRITES)
    with BlockingSandboxPool(cells=1, preload=("writes_on_import",)) as pool:
        outcome = pool.run(
            "import os, writes_on_import as w\nprint(w.made, os.listdir('/tmp'), os.path.exists(w.temporary))"
        )
    assert outcome.stdout == "found [] False\n", outcome


@pytest.mark.jail
def test_matplotlib_is_preloaded():
    pytest.importorskip("matplotlib")
    with BlockingSandboxPool(cells=1, preload=("matplotlib.pyplot",)) as pool:
        outcome = pool.run(PLOT)
    assert outcome.stdout == "agg True [[3, 4]]\n", outcome
    assert outcome.cpu_s < 1, outcome  # what takes long has been done before
