"""Who may import whom: the engine knows no task, and no folder or file stands above itself."""

from __future__ import annotations

import pytest

from bench.import_graph import circle, files, folder_of, folders, tower

GRAPH = files()
ENGINE = ("rollouts", "engine", "policy", "training", "kernels", "ranks", "record")
# What the folders of the engine may import of fastgrpo besides themselves.
FLOOR = {"types", "errors", "signals", "config", "config_files", "config_keys", "functions", "run_folder"}
ALLOWED = {
    "kernels": set(),
    "ranks": FLOOR,
    "record": FLOOR | {"ranks"},
    "policy": FLOOR | {"ranks", "kernels"},
    "engine": FLOOR | {"ranks", "kernels", "policy"},
    "rollouts": FLOOR | {"ranks", "policy", "engine"},
    "training": FLOOR | {"ranks", "kernels", "record", "policy", "engine", "rollouts"},
}


@pytest.mark.parametrize("folder", ENGINE)
def test_the_engine_imports_neither_the_task_nor_the_jails(folder: str) -> None:
    for module, targets in GRAPH.items():
        if module.startswith(f"fastgrpo.{folder}."):
            others = {folder_of(target) for target in targets} - {folder, "fastgrpo"}
            assert others <= ALLOWED[folder], f"{module} imports {sorted(others - ALLOWED[folder])}"


def test_the_jails_import_nothing_of_the_engine() -> None:
    for module, targets in GRAPH.items():
        if module.startswith("fastgrpo_sandbox"):
            assert not {target for target in targets if target.split(".")[0] == "fastgrpo"}, module


def test_only_programs_name_the_task() -> None:
    for module, targets in GRAPH.items():
        if {folder_of(target) for target in targets} & {"flow"}:
            assert folder_of(module) == "flow" or module.count(".") == 1, module


def test_no_circle_between_files() -> None:
    assert circle(GRAPH) == []


def test_no_circle_between_folders() -> None:
    assert circle(folders(GRAPH)) == []


def test_no_file_stands_higher_than_eleven_floors_within_its_package() -> None:
    for package in ("fastgrpo", "fastgrpo_sandbox"):
        own = {name for name in GRAPH if name.split(".")[0] == package}
        chain = tower({name: GRAPH[name] & own for name in own})
        assert len(chain) <= 11, " -> ".join(chain)
