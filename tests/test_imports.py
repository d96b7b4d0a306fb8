"""Who may import whom: the engine knows no task, and no folder or file stands above itself."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastgrpo
import fastgrpo_sandbox

PACKAGES = {name: Path(str(module.__file__)).parent for name, module in (
    ("fastgrpo", fastgrpo), ("fastgrpo_sandbox", fastgrpo_sandbox))}  # fmt: skip
ENGINE = ("rollouts", "engine", "policy", "training", "kernels", "ranks", "record")
# What the folders of the engine may import of fastgrpo besides themselves.
FLOOR = {"types", "errors", "config"}
ALLOWED = {
    "kernels": set(),
    "ranks": FLOOR,
    "record": FLOOR | {"ranks"},
    "policy": FLOOR | {"ranks", "kernels"},
    "engine": FLOOR | {"ranks", "policy"},
    "rollouts": FLOOR | {"ranks", "policy", "engine"},
    "training": FLOOR | {"ranks", "kernels", "record", "policy", "engine", "rollouts"},
}


def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, names: set[str]) -> set[str]:
    """The modules among `names` that a file imports anywhere but for type checkers alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing_only:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in names else node.module for a in node.names
            }
    return found & names


MODULES = modules()
GRAPH = {name: imported(path, set(MODULES)) - {name} for name, path in MODULES.items()}


def folder_of(module: str) -> str:
    """`fastgrpo.training.loss` -> `training`; `fastgrpo.types` -> `types`; the jails are one folder."""
    package, *rest = module.split(".")
    return package if package != "fastgrpo" or not rest else rest[0]


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
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_circle_between_folders() -> None:
    folders: dict[str, set[str]] = {}
    for module, targets in GRAPH.items():
        if module.startswith("fastgrpo."):
            here = folder_of(module)
            folders.setdefault(here, set()).update({folder_of(target) for target in targets} - {here})
    try:
        TopologicalSorter(folders).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
