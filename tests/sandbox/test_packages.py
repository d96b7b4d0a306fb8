"""Which installed files a jail gets for the modules that it may import."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgrpo_sandbox import BlockingSandboxPool
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


@pytest.mark.jail
def test_a_module_that_writes_files_as_it_is_imported_is_preloaded_and_no_job_sees_them(tmp_path: Path, monkeypatch):
    (tmp_path / "writes_on_import.py").write_text(WRITES)
    facts = tmp_path / "writes_on_import-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: writes-on-import\nVersion: 1\n")
    (facts / "RECORD").write_text("writes_on_import.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
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
