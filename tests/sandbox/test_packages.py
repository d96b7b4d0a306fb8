"""Which installed files a jail gets for the modules that it may import."""

from __future__ import annotations

from fastgrpo_sandbox.packages import files_of


def test_a_module_brings_what_its_distribution_requires_and_nothing_else():
    names = set(files_of(("pytest",)).values())
    assert {"pytest", "_pytest", "pluggy"} <= names
    assert "msgspec" not in names


def test_modules_that_are_not_installed_bring_nothing():
    assert files_of(("json", "no_such_module")) == {}
    assert files_of(()) == {}
