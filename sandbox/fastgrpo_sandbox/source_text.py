"""The text of parts of a data set's tests, as it goes into tests of their own."""

from __future__ import annotations

import ast
import json
import re
import types
from collections import Counter
from collections.abc import Set, Sized
from functools import cache
from pathlib import Path
from typing import Any

from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.names import bound_name, wanted_names
from fastgrpo_sandbox.guest.syntax import Transformer, parse, parse_expression, walk

LONG_CHARS = 300
RUNNERS = ("unittest", "pytest")
BY_ANY_NAME = frozenset({"globals", "locals", "vars", "dir", "eval", "exec"})  # whoever reads these may call all
# Texts one of which a program has that asks the solution by none of its names.
OF_SOLUTION = ("solution", "__main__", "sys.modules")
SET_UP = ("setup_class", "setup_method", "setup")  # of a class, called for each of its tests
# An expression that skips a test.
SKIPPED = "(_ for _ in ()).throw(__import__('unittest').SkipTest())"
# Methods that change a list, a set or a dict: those that their constant kinds lack.
CHANGING = {*dir(list), *dir(set), *dir(dict)} - {*dir(tuple), *dir(frozenset), *dir(types.MappingProxyType)}
# Ends a test that is passed by running to its end, as one that calls a helper with the assertions in it.
TO_THE_END = "\nassert True"


def names_read(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


def starts_tests(node: ast.stmt, names: Set[str]) -> bool:
    """Whether a statement of a program would have the tests found and run, by one of the names of `starters`."""
    value = node.value if isinstance(node, ast.Expr) else None
    calls = [each.func for each in ast.walk(value or ast.Pass()) if isinstance(each, ast.Call)]
    return not names.isdisjoint(map(ast.unparse, calls))


def starters(tree: ast.Module) -> set[str]:
    """The names by which a program has unittest's and pytest's `main`."""
    found = {f"{module}.main" for module in RUNNERS}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in RUNNERS:
            found |= {each.asname or each.name for each in node.names if each.name == "main"}
        elif isinstance(node, ast.Import):
            found |= {f"{each.asname}.main" for each in node.names if each.name in RUNNERS and each.asname}
    return found


def is_empty(node: ast.Assert) -> bool:
    """True for an assertion of a true constant, which tests nothing; `assert False` says that nothing comes there."""
    return isinstance(node.test, ast.Constant) and bool(node.test.value)


@memo
def preamble(prompt: str, entry_point: str) -> str:
    """Imports and helper functions that a prompt gives before its entry point; empty for a prompt that is prose."""
    try:
        body = parse(prompt).body
        given = [node for node in body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)]
        return ast.unparse(ast.Module(given, [])) if len(given) < len(body) else ""
    except (SyntaxError, ValueError, RecursionError):
        return ""


@memo
def constants(prompt: str, tests: str) -> str:
    """The statements by which a prompt gives names plain data, as `USERS = ["Ann"]`, that the tests read and do not
    define: a solution that has other data, or an empty list, is not to say what is wanted. Left out is what a solution
    is to fill in, as `WORDS = []`, and what the prompt itself changes. Empty for a prompt that is prose."""
    try:
        tree = parse(prompt)
        given = {name for node in tree.body for name in plain_data(node) if name in tests}
        wanted = given.intersection(wanted_names(tests).names) - _changed_names(tree) if given else given
        return "\n".join(ast.unparse(node) for node in tree.body if _gives(node, wanted))
    except (SyntaxError, ValueError, RecursionError):
        return ""


def _gives(node: ast.stmt, names: Set[str]) -> bool:
    """Whether a statement gives one of `names` plain data that is more than a blank."""
    given = {name: value for name, value in plain_data(node).items() if name in names}
    return any(not (value in (None, ...) or (isinstance(value, Sized) and not value)) for value in given.values())


def plain_data(node: ast.stmt) -> dict[str, Any]:
    """What a statement gives names, where that is plain data; else nothing."""
    match node:
        case ast.Assign(targets=targets, value=value) if all(isinstance(each, ast.Name) for each in targets):
            names = [each.id for each in targets if isinstance(each, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            names = [name]
        case _:
            return {}
    try:
        return dict.fromkeys(names, ast.literal_eval(value))
    except (ValueError, TypeError):
        return {}


def _changed_names(tree: ast.Module) -> set[str]:
    """The names that a program gives a value more than once, or whose value it may change in place."""
    nodes = list(walk(tree))
    changed = {name for name, count in Counter(map(bound_name, nodes)).items() if count > 1}
    for node in nodes:
        match node:
            case ast.Global(names=names):
                changed.update(names)
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                changed.add(name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if method in CHANGING:
                changed.add(name)
    return changed


class SourceText:
    """A source of which expressions' own texts are cut: for long tables far faster than to write them anew."""

    def __init__(self, source: str) -> None:
        self._lines = source.encode().splitlines(keepends=True)

    def of(self, node: ast.expr) -> str:
        """The expression as it is written."""
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        if first == last:
            return self._lines[first][node.col_offset : node.end_col_offset].decode()
        ends = self._lines[first][node.col_offset :], self._lines[last][: node.end_col_offset]
        return b"".join([ends[0], *self._lines[first + 1 : last], ends[1]]).decode()

    def names(self, node: ast.expr, name: str) -> bool:
        """True where the expression's text may speak of `name`."""
        return re.search(rf"\b{name}\b", self.of(node)) is not None

    def value(self, node: ast.expr) -> str:
        """The expression's text; a long one as a string that the judge evaluates, which the host need not compile."""
        text = self.of(node)
        if len(text) <= LONG_CHARS:
            return text
        return f"json.loads({text!r})" if _is_json(text) else f"eval({text!r})"


def _is_json(text: str) -> bool:
    """True for text that JSON and Python read as the same value."""
    if "\\" in text:
        return False
    try:
        return isinstance(json.loads(text, parse_constant=ast.literal_eval), list)
    except ValueError:
        return False


STAND_INS = frozenset({"numpy", "pytest"})


@cache
def _stand_in(package: str) -> str:
    return Path(__file__).with_name(f"{package}_stand_in.py").read_text(encoding="utf-8")


class _OfOneShape(Transformer):
    """`np.allclose(out, exp)` of EvalPlus' assertions asks for equal shapes, too, as its own program does: to numpy a
    list of nothing is close to any number and any number to it, and a number to any list of it."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The call, where the shapes are the same."""
        self.generic_visit(node)
        return ast.BoolOp(ast.And(), [_one_shape(node), node]) if _compares(node, "allclose") else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        """The call that raises by itself, likewise."""
        self.generic_visit(node)
        if not (isinstance(node.value, ast.Call) and _compares(node.value, "assert_allclose")):
            return node
        raised = ast.Raise(ast.Name("AssertionError", ast.Load()))
        return ast.If(_one_shape(node.value), [node], [raised])


def _compares(node: ast.Call, name: str) -> bool:
    names = [getattr(each, "id", "") for each in node.args[:2]]
    return getattr(node.func, "attr", "") == name and names == ["out", "exp"]


def _one_shape(node: ast.Call) -> ast.expr:
    numpy = ast.unparse(node.func).partition(".")[0]
    return parse_expression(f"{numpy}.shape(out) == {numpy}.shape(exp)")


def statement_text(node: ast.stmt) -> str:
    """The statement's text; `import numpy` takes the stand-in where the jail has no numpy, and so for pytest."""
    text = ast.unparse(_OfOneShape().visit(node))
    match node:
        case ast.Import(names=[_, _, *_]):
            return "\n".join(statement_text(ast.Import([alias])) for alias in node.names)
        case ast.Import(names=[ast.alias(name=package, asname=name)]) if package in STAND_INS:
            return _or_stand_in(text, package, name or package)
        case ast.ImportFrom(module=str(package), names=names, level=0) if package in STAND_INS:
            module = f"{package}_stand_in"
            given = [f"    {each.asname or each.name} = {module}.{each.name}" for each in names if each.name != "*"]
            return "\n".join(
                [_or_stand_in(text, package, module), *(given or [f"    globals().update(vars({module}))"])]
            )
    return text


def with_stand_ins(source: str, tree: ast.Module) -> str:
    """A program whose imports take stand-ins for packages that the jail has not."""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    packages = {each.name for node in imports for each in node.names} | {
        getattr(node, "module", "") for node in imports
    }
    return "\n".join(map(statement_text, tree.body)) if packages & STAND_INS else source


def _or_stand_in(text: str, package: str, name: str) -> str:
    """An import, or else the stand-in by a name, in a block that may go on."""
    made = (
        f"    import types\n    {name} = types.ModuleType({package!r})\n    exec({_stand_in(package)!r}, vars({name}))"
    )
    return f"try:\n    {text}\nexcept ImportError:\n{made}"
