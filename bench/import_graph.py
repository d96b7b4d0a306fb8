"""Who imports whom in both packages: circles, floors and arrows, between files and between folders.

    python bench/import_graph.py

Floors are the names of the longest chain in which each file (or folder) imports the next; arrows are the pairs. A file
beside the folders, such as types.py, counts as a folder. `tests/test_imports.py` holds the rules.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import fastgrpo
import fastgrpo_sandbox

# Name of a file or folder to the names that it imports.
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package in (fastgrpo, fastgrpo_sandbox):
        folder = Path(str(package.__file__)).parent
        for path in folder.rglob("*.py"):
            parts = (package.__name__, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, names: set[str]) -> set[str]:
    """The modules among `names` that a file imports anywhere but for type checkers alone."""
    found = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in names else node.module for name in inside}
    return found & names


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _nodes(child)


def files() -> Graph:
    """Each module's imports of other modules of the two packages."""
    found = modules()
    return {name: imported(path, set(found)) - {name} for name, path in found.items()}


def folder_of(module: str) -> str:
    """`fastgrpo.training.loss` -> `training`; `fastgrpo.types` -> `types`; the jails are one folder."""
    package, *rest = module.split(".")
    return package if package != "fastgrpo" or not rest else rest[0]


def folders(graph: Graph) -> Graph:
    """The imports of `files` between folders; a file beside them counts as one."""
    found: Graph = {}
    for module, targets in graph.items():
        here = folder_of(module)
        found.setdefault(here, set()).update({folder_of(target) for target in targets} - {here, "fastgrpo"})
    return found


def circle(graph: Graph) -> list[str]:
    """Names along one circle, none where there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def tower(graph: Graph) -> list[str]:
    """The longest chain of names in which each imports the next; the graph has no circle."""
    chains: dict[str, list[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        chains[name] = [name, *max((chains[target] for target in sorted(graph.get(name, ()))), key=len, default=[])]
    return max(chains.values(), key=len)


def arrows(graph: Graph) -> int:
    """How many imports there are, one for each pair of names."""
    return sum(map(len, graph.values()))


def described(name: str, graph: Graph) -> str:
    """One line on `graph`."""
    size = f"{name}: {len(graph)}, {arrows(graph)} arrows"
    if found := circle(graph):
        return f"{size}, a circle: {' -> '.join(found)}"
    chain = tower(graph)
    return f"{size}, 0 circles, {len(chain)} floors: {' -> '.join(chain)}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    everything = files()
    for package in ("fastgrpo", "fastgrpo_sandbox"):
        inside = {name: targets for name, targets in everything.items() if name.split(".")[0] == package}
        kept = {name: targets & inside.keys() for name, targets in inside.items()}
        print(described(f"files of {package}", kept))
    print(described("files of both", everything))
    print(described("folders of both", folders(everything)))


if __name__ == "__main__":
    main()
