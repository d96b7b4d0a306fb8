"""A problem made of its tests: they are split, and its solution must define its entry point."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection

from fastgrpo.flow.problems.splitting import describe_tests, part
from fastgrpo.flow.types import Problem
from fastgrpo_sandbox import StdioTests, Tests
from fastgrpo_sandbox.guest.syntax import parse


def made(
    id: str, prompt: str, entry_point: str, solution: str, tests: Tests, public: Collection[int] | None = None
) -> Problem:
    """A problem whose tests are split; `public` are the indices of its public tests, None = every third.

    A single test is public and hidden. Raises ValueError where nothing is tested, or the solution does not define its
    entry point.
    """
    if not isinstance(tests, StdioTests):
        _check_entry_point(entry_point, solution)
    elif solution:
        parse(solution)
    count = len(describe_tests(tests))
    if not count:
        raise ValueError("has no tests: give it at least one assertion")
    public = tuple(range(0, count, 3) if public is None else public)
    hidden = set(range(count)).difference(public) or public
    return Problem(
        id=id,
        prompt=prompt,
        entry_point=entry_point,
        solution=solution or None,
        public_tests=part(tests, public),
        hidden_tests=part(tests, hidden),
        tests=part(tests, range(count)),
        public=public,
    )


def _check_entry_point(entry_point: str, solution: str) -> None:
    root = re.match(r"[^\W\d]\w*", entry_point)
    if root is None:
        raise ValueError(f"has entry_point {entry_point!r}: name what its solution is to define")
    if solution and root[0] not in bound(parse(solution)):
        raise ValueError(f"has entry_point {entry_point!r}, which its solution does not define")


def bound(tree: ast.Module) -> dict[str, None]:
    """Names that a program gives a value, its functions' and classes' own left out, in their order."""
    found: dict[str, None] = {}
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop(0)
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = None
            case ast.Lambda():
                pass
            case ast.alias(name=name, asname=alias):
                found[alias or name.partition(".")[0]] = None
            case _:
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found[node.id] = None
                nodes += ast.iter_child_nodes(node)
    return found
