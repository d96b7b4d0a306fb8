"""Tests that assert in helpers and loop over tables, as in HumanEval+ and MBPP+, turned into tests that count each."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.syntax import Transformer, parse, parse_expression
from fastgrpo_sandbox.source_text import LONG_CHARS, TO_THE_END, SourceText, is_empty, names_read, statement_text
from fastgrpo_sandbox.types import AssertTests, CheckTests

# Of a table with hundreds of rows the first are tests of their own, which a reader of feedback understands; the rest
# are gathered into a few, since what a judge is sent is compiled test by test.
SINGLE_ROWS = 48
GATHERED = 16

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LOOSE = (ast.Compare, ast.BoolOp, ast.IfExp, ast.Lambda, ast.NamedExpr)
SHARED = (*_DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)

# One cell of a row: an expression of the source, or cells that zip or enumerate put together.
Cell = ast.expr | tuple["Cell", ...]


@memo
def check_tests(source: str, entry_point: str, setup: str) -> CheckTests | AssertTests:
    """Tests of the form `check(candidate)`; one by one where helpers assert, a loop or both branches do, or a method is
    tested. Raises SyntaxError."""
    tree = parse(source)
    as_it_is = CheckTests(source=source, entry_point=entry_point, setup=setup)
    plain = entry_point.isidentifier() and not asserts_in_helpers(tree) and not _asserts_either(tree)
    if plain and sum(isinstance(node, ast.Assert) and not is_empty(node) for node in ast.walk(tree)) > 1:
        return as_it_is
    tests = one_by_one(source, tree, entry_point)
    if plain and len(tests.asserts) == 1:
        return as_it_is
    return replace(tests, setup=f"{setup}\n{tests.setup}".strip("\n"))


@memo
def script_tests(source: str) -> AssertTests | None:
    """The tests of a script whose helpers assert, one by one; None for any other. Raises SyntaxError."""
    tree = parse(source)
    return one_by_one(source, tree, "") if asserts_in_helpers(tree) else None


def asserts_in_helpers(tree: ast.Module) -> bool:
    """True where `check(candidate)` leaves the asserting to functions outside of it."""
    outside = [node for node in tree.body if not _is_check(node)]
    return bool(_asserting(ast.Module(outside, [])))


def _asserts_either(tree: ast.Module) -> bool:
    """True where one assertion is made in the place of another."""
    both = [(node.body, node.orelse) for node in ast.walk(tree) if isinstance(node, ast.If)]
    return any(all(any(_is_test(node, set()) for node in branch) for branch in branches) for branches in both)


def one_by_one(source: str, tree: ast.Module, candidate: str) -> AssertTests:
    """The tests of `source`, each to be passed on its own, `candidate` being an expression for what is tested.

    `source` defines `check(candidate)`, or is a script that tests by itself; its `tree` is used up. A statement that
    asserts, or calls a function that does, is a test; of a loop over tables each row is one. What tests share is their
    setup. Where a test depends on what the candidate did before, the whole is one test.
    """
    check = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    body = tree.body if check is None else check.body
    parameter = check.args.args[0].arg if check is not None and check.args.args else ""
    text = SourceText(source)
    tables = {} if check is None else dict(_detached(tree.body))
    tables |= _detached(body)
    asserting = _asserting(tree)
    tests = [node for node in body if _is_test(node, asserting)]
    shared = [] if check is None else [node for node in tree.body if node is not check and not _calls(node, "check")]
    shared += [node for node in body if not _is_test(node, asserting) and not _says_nothing(node)]
    dependent = any(map(_returns, tests)) or any(
        parameter and text.names(table, parameter) for table in tables.values()
    )
    if not tests or dependent or not _is_independent(shared, parameter):
        return _as_one(parse(source), candidate if check is not None else "")
    unroller = _Unroller(text, tables, shared, {parameter: candidate} if parameter else {})
    texts = tuple(text for node in tests for text in unroller.tests(node))
    return AssertTests(asserts=texts, setup=unroller.setup())


def _as_one(tree: ast.Module, candidate: str) -> AssertTests:
    """A script, or `check` where there is a `candidate` for it, as one test that is passed by running to its end."""
    if not candidate:
        text = "\n".join(statement_text(_Raising().visit(node)) for node in tree.body)
        return AssertTests(asserts=(text + TO_THE_END,))
    shared = [node for node in tree.body if _is_check(node) or not _calls(node, "check")]
    return AssertTests(asserts=(f"check({candidate}){TO_THE_END}",), setup="\n".join(map(statement_text, shared)))


class _Raising(Transformer):
    """`assert test` as `if not test: raise AssertionError`: which branches are run is the test's own affair."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """The statement that raises."""
        error = ast.Call(ast.Name("AssertionError", ast.Load()), [node.msg] if node.msg else [], [])
        return ast.If(ast.UnaryOp(ast.Not(), node.test), [ast.Raise(error)], [])


def _plain(node: ast.stmt) -> str:
    """The text of a statement; an assertion below the surface is no test of its own."""
    return ast.unparse(node if isinstance(node, ast.Assert) else _Raising().visit(node))


def _finished(nodes: list[ast.stmt], text: str) -> str:
    """A test that asserts, or ends with `assert True`, since nothing else counts as a test."""
    return text if any(isinstance(node, ast.Assert) for node in nodes) else text + TO_THE_END


class _Unroller:
    """Turns statements into tests.

    `tables` are the lists by name that loops run over, `shared` the statements that all tests need, `given` the
    expressions to put in the place of names.
    """

    def __init__(
        self, text: SourceText, tables: dict[str, ast.expr], shared: list[ast.stmt], given: dict[str, str]
    ) -> None:
        self._source, self._tables, self._shared, self._given = text, tables, shared, given
        self._read: set[str] = set()

    def tests(self, node: ast.stmt) -> list[str]:
        """The tests of one statement: a loop over tables has one a row, until they are gathered."""
        rows = self._rows(node) if isinstance(node, ast.For) else None
        if rows is None:
            self._read |= names_read(node)
            return [_finished([node], _plain(_Rename(self._given).visit(node)))]
        per_test = -(-max(len(rows) - SINGLE_ROWS, 0) // GATHERED) or 1
        gathered = [rows[start : start + per_test] for start in range(SINGLE_ROWS, len(rows), per_test)]
        body = node.body if isinstance(node, ast.For) else []
        return [_finished(body, "\n".join(group)) for group in [[row] for row in rows[:SINGLE_ROWS]] + gathered]

    def setup(self) -> str:
        """What tests share, without the tables that none of them reads any more."""
        read = self._read.union(*(names_read(node) for node in self._shared))
        wanted = {name for name in self._tables if name in read or self._is_in_table(name)}
        return "\n".join(["import json", *(self._shared_text(node, wanted) for node in self._shared)])

    def _is_in_table(self, name: str) -> bool:
        return any(self._source.names(table, name) for other, table in self._tables.items() if other != name)

    def _shared_text(self, node: ast.stmt, wanted: set[str]) -> str:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]) if name in self._tables:
                return f"{name} = {self._source.value(self._tables[name])}" if name in wanted else "pass"
        return statement_text(node)

    def _rows(self, loop: ast.For) -> list[str] | None:
        """The loop's body for each row of its tables; None where these are not known from the text."""
        cells = None if names_read(loop.iter) & self._given.keys() else self._elements(loop.iter)
        rows = [_bound(loop.target, cell) for cell in cells or ()]
        names = set(rows[0] or ()) if rows else set()
        if not names or None in rows or loop.orelse or _names_stored(loop.body) & names or _jumps(loop):
            return None
        inline = names & _arguments(loop.body)
        read = {name for node in loop.body for name in names_read(node)}
        self._read |= read - names
        renamed = self._given | {name: _mark(name) for name in inline}
        body = "\n".join(_plain(_Rename(renamed).visit(node)) for node in loop.body)
        return [self._filled(body, inline, {n: row[n] for n in row if n in read}) for row in rows if row is not None]

    def _filled(self, body: str, inline: set[str], row: dict[str, Cell]) -> str:
        """The body with a row's cells in the place of its `inline` names, after lines that give the others."""
        first = ""
        for name, cell in row.items():
            text, mark = self._text(cell), _mark(name)
            if name not in inline:
                first += f"{name} = {text}\n"
            elif isinstance(cell, ast.List | ast.Tuple) and cell.elts and len(text) <= LONG_CHARS:
                body = body.replace(f"*{mark}", text[1:-1].strip(" ,\n"))
            body = body.replace(mark, f"({text})" if isinstance(cell, _LOOSE) else text)
        return first + body

    def _elements(self, node: ast.expr) -> list[Cell] | None:
        match node:
            case ast.List(elts=found) | ast.Tuple(elts=found):
                return None if any(isinstance(item, ast.Starred) for item in found) else list(found)
            case ast.Name(id=name) if name in self._tables:
                return self._elements(self._tables[name])
            case ast.Call(func=ast.Name(id="zip"), args=columns):
                parts = [self._elements(column) for column in columns]
                return None if not parts or None in parts else list(zip(*(part or () for part in parts), strict=False))
            case ast.Call(func=ast.Name(id="enumerate"), args=[rows]):
                inner = self._elements(rows)
                return inner and [(ast.Constant(index), cell) for index, cell in enumerate(inner)]
        return None

    def _text(self, cell: Cell) -> str:
        if isinstance(cell, tuple):
            return f"({', '.join(map(self._text, cell))},)"
        # enumerate's numbers are in no source
        return self._source.value(cell) if hasattr(cell, "lineno") else ast.unparse(cell)


def _is_test(node: ast.stmt, asserting: set[str]) -> bool:
    """True for a statement that asserts something, or calls a function that does."""
    if isinstance(node, _DEFINITIONS):
        return False
    return any(
        (isinstance(part, ast.Assert) and not is_empty(part))
        or (isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in asserting)
        for part in ast.walk(node)
    )


def _is_check(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "check"


def _calls(node: ast.stmt, name: str) -> bool:
    return any(
        isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == name
        for part in ast.walk(node)
    )


def _says_nothing(node: ast.stmt) -> bool:
    """A docstring, `pass` or `assert True`."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Pass) or (isinstance(node, ast.Assert) and is_empty(node))


def _asserting(tree: ast.Module) -> set[str]:
    """Functions that assert, or call one that does; check itself is none."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name != "check"]
    found: set[str] = set()
    while (
        more := {
            node.name
            for node in functions
            if any(isinstance(part, ast.Assert) for part in ast.walk(node)) or any(_calls(node, name) for name in found)
        }
        - found
    ):
        found |= more
    return found


def _is_independent(shared: list[ast.stmt], parameter: str) -> bool:
    """True where what is no test gives each name once and never asks the candidate."""
    names = Counter(name for node in shared for name in _assigned(node))
    return (
        all(isinstance(node, SHARED) for node in shared)
        and all(count == 1 for count in names.values())
        and not any(parameter and parameter in names_read(node) for node in shared)
    )


def _detached(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Lists and tuples that are given a name, each replaced in its place by nothing: they may be very long."""
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.List() | ast.Tuple() as table):
                node.value = ast.Constant(None)
                yield name, table


def _assigned(node: ast.stmt) -> tuple[str, ...]:
    match node:
        case ast.Assign(targets=targets):
            return tuple(name for target in targets for name in _names(target))
        case ast.AnnAssign(target=ast.Name(id=name)):
            return (name,)
    return ()


def _names(target: ast.expr) -> Iterator[str]:
    return (node.id for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


def _bound(target: ast.expr, cell: Cell) -> dict[str, Cell] | None:
    """What a loop's target gives the names in it, as (inp, exp) does; None where the row's form is not known."""
    if isinstance(target, ast.Name):
        return {target.id: cell}
    parts = cell if isinstance(cell, tuple) else getattr(cell, "elts", None)
    if not isinstance(target, ast.Tuple) or parts is None or len(parts) != len(target.elts):
        return None
    found = [_bound(one, part) for one, part in zip(target.elts, parts, strict=True)]
    return None if None in found else {name: value for one in found for name, value in (one or {}).items()}


def _names_stored(body: Iterable[ast.stmt]) -> set[str]:
    parts = (part for node in body for part in ast.walk(node))
    return {part.id for part in parts if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)}


def _arguments(body: list[ast.stmt]) -> set[str]:
    """Names that are read once, as an argument of a call or a side of a comparison: a value can stand there."""
    parts = [part for node in body for part in ast.walk(node)]
    read = Counter(part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load))
    calls = [part for part in parts if isinstance(part, ast.Call)]
    compared = [side for part in parts if isinstance(part, ast.Compare) for side in (part.left, *part.comparators)]
    given = [getattr(side, "value", side) if isinstance(side, ast.Starred) else side for c in calls for side in c.args]
    inside = {name for part in parts if isinstance(part, ast.JoinedStr) for name in names_read(part)}
    found = {side.id for side in (*given, *compared) if isinstance(side, ast.Name)}
    return {name for name in found - inside if read[name] == 1}


def _jumps(loop: ast.For) -> bool:
    return any(isinstance(part, ast.Break | ast.Continue) for part in ast.walk(loop))


def _returns(node: ast.stmt) -> bool:
    return any(isinstance(part, ast.Return | ast.Yield | ast.Nonlocal | ast.Global) for part in ast.walk(node))


def _mark(name: str) -> str:
    return f"__row_{name}__"


class _Rename(Transformer):
    """Puts expressions, as text, in the place of the names that are read."""

    def __init__(self, given: dict[str, str]) -> None:
        self._given = given

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """The expression in the name's place."""
        if node.id in self._given and isinstance(node.ctx, ast.Load):
            return parse_expression(self._given[node.id])
        return node
