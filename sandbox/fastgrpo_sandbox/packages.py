"""Which installed files a module needs: those of its distribution and of what that requires, and no others."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@lru_cache(16)
def files_of(modules: tuple[str, ...]) -> dict[str, str]:
    """Path to name of the files and folders that the importable `modules` need, by name as they lie in one folder of
    packages. A module that is not found, or the standard library's, has none."""
    found: dict[str, str] = {}
    owners = metadata.packages_distributions() if modules else {}
    for module in modules:
        top = module.partition(".")[0]
        for name in _closure(owners.get(top, [])):
            found |= _entries(metadata.distribution(name))
        if top not in found.values():
            found |= _beside(top) if top in owners else {}
    return found


def _closure(names: list[str]) -> Iterator[str]:
    """`names` and the distributions that they require, as far as they are installed."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen:
            continue
        seen.add(key)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        yield name
        waiting += [NAME.match(each)[0] for each in required if "extra ==" not in each]  # type: ignore[index]


def _entries(distribution: metadata.Distribution) -> dict[str, str]:
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "/", "__pycache__")}
    paths = {str(distribution.locate_file(top)): top for top in tops}
    return {path: top for path, top in paths.items() if Path(path).exists()}


def _beside(module: str) -> dict[str, str]:
    """Where a package lies that is installed by a link to its sources."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return {}
    path = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
    return {str(path): path.name}
