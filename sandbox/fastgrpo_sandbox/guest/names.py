"""The names that tests read, define and take from elsewhere, found in their text."""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeGuard

from .arrays import PACKAGES
from .compared import OF_SOLUTION, pairs, plainly_called, tested_builtins
from .memo import memo
from .syntax import Transformer, load, parse, walk

MODULES = {"np": "numpy", "pd": "pandas"}  # names by which tests know packages that they do not import
MODULES |= {package: package for package in PACKAGES}


class Wanted(NamedTuple):
    """What tests read and do not define."""

    names: tuple[str, ...]
    modules: tuple[str, ...]  # which are left out of `names`
    called: tuple[str, ...]  # builtin functions one of which the solution may stand for
    compared: tuple[tuple[Any, ...], ...]  # what is compared with what (compared.py)
    other: tuple[str, ...] = ()  # builtins of which the solution stands for one where none of the names is its own
    is_open: bool = False  # whether an `import *` gives some of the names: only the text, run, tells which


class _OfSolution(Transformer):
    """`from solution import f as g`, as tests of a program in a file say, becomes `g = f`: in another process there is
    no such module, and what tests do not define is taken from the solution anyway. `from solution import sum` becomes
    `sum = __solution__sum`, since what is named like a builtin is not. So `s.f` after `import solution as s` becomes
    `f`, where the tests have no `f` of their own: what is compared with what is told by names."""

    def __init__(self, nodes: list[ast.AST]) -> None:
        asked = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
        changed = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in asked}
        self._modules = _solution_modules(nodes) - changed
        same = [each for node in nodes if _is_of_solution(node) for each in node.names if each.asname is None]
        self._bound = {bound_name(node) for node in nodes if node not in same}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        if not _is_of_solution(node):
            return node
        pairs = [(each.asname or each.name, own_name(each.name)) for each in node.names]
        given: list[ast.stmt] = [
            ast.Assign([ast.Name(to, ast.Store())], load(name, at=node)) for to, name in pairs if to != name
        ]
        return [ast.copy_location(each, node) for each in given or [ast.Pass()]]

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        is_module = isinstance(node.value, ast.Name) and node.value.id in self._modules
        if not is_module or node.attr in self._bound or node.attr.startswith("__"):
            return node
        return load(own_name(node.attr), at=node)


def _is_of_solution(node: ast.AST) -> TypeGuard[ast.ImportFrom]:
    return isinstance(node, ast.ImportFrom) and node.module == "solution" and not node.level


def own_name(name: str) -> str:
    """By which tests have what they import from the solution."""
    return OF_SOLUTION + name if hasattr(builtins, name) else name


def _solution_modules(nodes: list[ast.AST]) -> set[str]:
    """The names that are the solution as a module, and nothing else."""
    imported = [
        each for node in nodes if isinstance(node, ast.Import) for each in node.names if each.name == "solution"
    ]
    if not imported:
        return set()
    return set(map(bound_name, imported)) - {bound_name(node) for node in nodes if node not in imported}


@memo
def solution_imports(source: str) -> str:
    """The imports, as text, by which what follows `source` has the solution as a module, too. Raises SyntaxError."""
    modules = _solution_modules(list(walk(parse(source)))) if "solution" in source else ()
    return "".join(f"import solution as {name}\n" for name in sorted(modules))


def parse_tests(source: str) -> ast.Module:
    """Tests of a judged solution, without what they import of it. Raises SyntaxError."""
    tree = parse(source)
    return ast.fix_missing_locations(_OfSolution(list(walk(tree))).visit(tree)) if "solution" in source else tree


@memo
def wanted_names(source: str) -> Wanted:
    """What `source` needs from elsewhere. Raises SyntaxError."""
    nodes = list(walk(parse_tests(source)))
    members, within = _members(nodes)
    read = read_names(nodes) - within
    read -= {bound_name(node) for node in nodes if id(node) not in members}
    modules = {name for name in read & _used_as_modules(nodes) if name in sys.stdlib_module_names or name in MODULES}
    names = tuple(sorted(name for name in read - modules if not hasattr(builtins, name)))
    # Texts that import the solution as a module say there which builtins are its own.
    other, called = ((), ()) if _solution_modules(nodes) else tested_builtins(nodes)
    compared = tuple(map(tuple, pairs(nodes, names, modules)))
    is_open = any(isinstance(node, ast.alias) and node.name == "*" for node in nodes)
    return Wanted(names, tuple(sorted(modules)), called if names else other, compared, other, is_open)


def unimported_modules(source: str) -> dict[str, str]:
    """The names that `source` uses as modules and does not import, each with the module's full name."""
    return {name: MODULES.get(name, name) for name in wanted_names(source).modules}


def lent_name(module: str) -> str:
    """By which unittest tests have a module that they do not import."""
    return f"__lent_{module}__"


def read_names(nodes: Iterable[ast.AST]) -> set[str]:
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def bound_name(node: ast.AST) -> str:
    """The name that `node` gives a value: a variable's, also of a comprehension, an argument's, an import's; or ""."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.ClassDef(name=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return name
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return name
        case ast.alias(name=name, asname=alias):
            return alias or name.partition(".")[0]
    return ""


def _members(nodes: list[ast.AST]) -> tuple[set[int], set[str]]:
    """The id() of each node that names a method or an attribute of a class, which is no name outside of it; and those
    of these names that are read within a class, as by `@size.setter`."""
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    body = [each for node in classes for each in node.body]
    named: list[ast.AST] = [each for each in body if isinstance(each, ast.FunctionDef)]
    named += [part for each in body if isinstance(each, ast.Assign | ast.AnnAssign) for part in walk(each)]
    within = read_names(part for node in classes for part in walk(node))
    return set(map(id, named)), set(map(bound_name, named)) & within


def _used_as_modules(nodes: list[ast.AST]) -> set[str]:
    used = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    return used.difference(plainly_called(nodes))
