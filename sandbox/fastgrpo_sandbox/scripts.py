"""Tests that are a script: what would run when it is started, and the tests that pytest would find in it and run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from typing import NamedTuple, TypeGuard

from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.names import wanted_names
from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.source_text import (
    BY_ANY_NAME,
    OF_SOLUTION,
    SET_UP,
    SKIPPED,
    TO_THE_END,
    names_read,
    starters,
    starts_tests,
    statement_text,
)
from fastgrpo_sandbox.types import AssertTests, NoTestError
from fastgrpo_sandbox.unrolling import SHARED

EXITS = ("sys.exit", "exit", "quit", "SystemExit")
SET_UP_ALL = ("setup_module", "setup_function")
UNUSED = "import pytest"  # once its marks and its start are gone
FIXTURES = ("fixture",)
LEFT_OUT = ("mark.skip", "mark.xfail", "unittest.skip")
EXIT = "__status__ = {}\nif not (__status__ is None or __status__ == 0): raise SystemExit(__status__)"

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class _Fixture(NamedTuple):
    """A function that makes an argument of tests: how it is called, and whether it is for each test that has it."""

    called: str
    function: ast.FunctionDef
    is_always: bool

    @property
    def wanted(self) -> list[str]:
        """The names of its arguments; a method's first is its object."""
        return _arguments(self.function)["." in self.called :]


_Fixtures = Mapping[str, _Fixture]


class _Around(NamedTuple):
    """What tests have beside them: functions that make arguments, lists by name, and lines to be run before each."""

    fixtures: _Fixtures
    lists: Mapping[str, ast.expr]
    before: str
    marks: tuple[ast.expr, ...]  # of all tests
    made: frozenset[str]  # the fixtures that these lines make


class Script(NamedTuple):
    """A script as it is run: `source` with all it runs, or, where that is nothing but tests that pytest would run, each
    of them as one of `tests`, with the rest as their setup."""

    source: str
    tests: AssertTests | None = None


@memo
def as_run(source: str) -> Script:
    """`source` with what stands under `if __name__ == "__main__"`, and with a call of each function `test...`, or
    method of a class `Test...`, that it only defines, as pytest calls them with what parametrize and fixtures give.

    Raises SyntaxError, and ValueError where such a test takes arguments that are not in the text, or where none of
    its assertions would be run: any solution would pass.
    """
    tree = parse(source)
    names = starters(tree)
    body = _without_exit([each for node in tree.body for each in _started(node, names)])
    run = _names_run(body)
    around = _around(body, run)
    calls = [] if run & BY_ANY_NAME else [call for node in body for call in _calls_of(node, run, around)]
    called = parse("\n".join(calls)).body
    _check_asserts([*body, *called])
    if not calls and body == tree.body:
        return Script(source)
    read = names_read(ast.Module([*body, *called], []))
    body = [node for node in body if ast.unparse(node) != UNUSED or "pytest" in read]
    if not calls or not all(isinstance(node, SHARED) for node in body):
        return Script(ast.unparse(ast.Module([*body, *called], [])))
    setup = "\n".join(map(statement_text, body))
    return Script(source, AssertTests(asserts=tuple(call + TO_THE_END for call in calls), setup=setup))


def _started(node: ast.stmt, names: Set[str]) -> list[ast.stmt]:
    """A statement of the module as a program that is started has it; one that would start the tests is none."""
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "'__main__' == __name__"):
        return [each for inner in node.body for each in _started(inner, names)]
    return [] if starts_tests(node, names) else [node]


def _without_exit(body: list[ast.stmt]) -> list[ast.stmt]:
    """A program that ends by an exit, in the last of its statements, as one that raises where its status is a failure.
    The tests' own exit is the end that they come to; of any other nobody knows whether the solution asked for it."""
    match body:
        case [*first, ast.If() as last]:
            inner, other = _without_exit(last.body), _without_exit(last.orelse)
            is_same = inner == last.body and other == last.orelse
            return body if is_same else [*first, ast.If(last.test, inner or [ast.Pass()], other)]
        case [*first, ast.Expr(value=ast.Call() as call) | ast.Raise(exc=ast.Call() as call)] if (
            ast.unparse(call.func) in EXITS and not call.keywords and len(call.args) < 2
        ):
            status = ast.unparse(call.args[0]) if call.args else "None"
            return first if status in ("0", "None", "False") else [*first, *parse(EXIT.format(status)).body]
    return body


def _names_run(body: list[ast.stmt]) -> set[str]:
    """The names that are read where the module is run, and in the functions and classes that it names there."""
    defined = {node.name: node for node in body if isinstance(node, (*_FUNCTIONS, ast.ClassDef))}
    found: set[str] = set()
    waiting = [name for node in body if node not in defined.values() for name in names_read(node)]
    waiting += [name for node in defined.values() for each in node.decorator_list for name in names_read(each)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += names_read(defined[name]) if name in defined else ()
    return found


def _around(body: list[ast.stmt], run: set[str]) -> _Around:
    given = [node for node in body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    lists = {ast.unparse(node.targets[0]): node.value for node in given}
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    first = [_set_up(name, functions[name], 0) for name in SET_UP_ALL if name in functions and name not in run]
    marks = lists.get("pytestmark", ast.Tuple([], ast.Load()))
    fixtures = _fixtures(body)
    made: set[str] = set()
    first += [_made(name, fixtures, made) for name, each in fixtures.items() if each.is_always]
    return _Around(fixtures, lists, "".join(f"{line}\n" for line in first), tuple(_items(marks)), frozenset(made))


def _set_up(called: str, function: _Function, own: int) -> str:
    """A call before a test: what it may be told of that, it is not."""
    return f"{called}({', '.join('None' for _ in _arguments(function)[own:])})"


def _calls_of(node: ast.stmt, run: set[str], around: _Around) -> Iterator[str]:
    """The calls of the tests that a statement defines and that nothing runs."""
    is_made = getattr(node, "name", "") in around.fixtures
    if isinstance(node, _FUNCTIONS) and node.name.startswith("test") and node.name not in run and not is_made:
        yield from (around.before + call for call in _calls(node, node.name, around))
    if isinstance(node, ast.ClassDef) and node.name.startswith("Test") and node.name not in run:
        own = _fixtures(node.body, "test.")
        fixtures = {**around.fixtures, **own}
        made = set(around.made - own.keys())
        methods = {each.name: each for each in node.body if isinstance(each, _FUNCTIONS) and each.name not in own}
        set_up = [_set_up(f"test.{name}", methods[name], 1) for name in SET_UP if name in methods]
        set_up += [_made(name, fixtures, made) for name, each in own.items() if each.is_always]
        marks = (*around.marks, *node.decorator_list)
        around = around._replace(marks=marks, fixtures=fixtures, made=frozenset(made))
        for method in methods.values():
            if not method.name.startswith("test"):
                continue
            if set_up or own:
                lines = "".join(f"    {line}\n" for line in set_up)
                first = f"{around.before}if True:\n    test = {node.name}()\n{lines}    "
                yield from (first + call for call in _calls(method, f"test.{method.name}", around))
            else:
                yield from (around.before + call for call in _calls(method, f"{node.name}().{method.name}", around))


def _calls(function: _Function, called: str, around: _Around) -> list[str]:
    """The calls of a test, none of one that pytest leaves out. Raises ValueError for one that wants arguments which are
    not in the text."""
    marks = [around.lists.get(ast.unparse(each), each) for each in (*around.marks, *function.decorator_list)]
    if any(_named(each) in LEFT_OUT for each in marks):
        return []
    skips = [ast.unparse(each.args[0]) for each in marks if _is_condition(each) and _named(each) == "mark.skipif"]
    rows, wanted = _parameters(function, around.lists), _arguments(function)
    computed = _computed(function, around.lists)
    for each in computed:
        rows = [row | each.values for row in rows]
    is_bound = "." in called and not any(ast.unparse(each) == "staticmethod" for each in function.decorator_list)
    missing = [name for name in wanted[1 if is_bound else 0 :] if name not in rows[0]]
    used = [each for mark in marks if _named(mark) == "mark.usefixtures" for each in _texts(mark, "args")]
    if not around.fixtures.keys() >= {*missing, *used}:
        raise ValueError(f"{function.name} takes arguments, which only pytest gives it: write a call of it with each")
    made = set(around.made)
    first = ", ".join(_made(name, around.fixtures, made) for name in used)
    given = {name: _made(name, around.fixtures, made) for name in missing}
    calls = [f"{called}({', '.join(map('='.join, (row | given).items()))})" for row in rows]
    if used:
        calls = [f"({first}, {call})[-1]" for call in calls]
    if isinstance(function, ast.AsyncFunctionDef):
        calls = [f"__import__('asyncio').run({call})" for call in calls]
    loops = "".join(f" for {each.row} in {each.table}" for each in computed)
    calls = [f"[{call}{loops}]" for call in calls] if loops else calls
    if skips:
        condition = " or ".join(f"({each})" for each in skips)
        calls = [f"({SKIPPED} if {condition} else {call})" for call in calls]
    return [f"assert {call}" for call in calls] if loops else calls  # a table may be of the solution's, and empty


def _is_condition(mark: ast.expr) -> TypeGuard[ast.Call]:
    """Whether the mark has a condition in its text, which is not itself a text."""
    return isinstance(mark, ast.Call) and bool(mark.args) and not isinstance(getattr(mark.args[0], "value", None), str)


def _arguments(function: _Function) -> list[str]:
    """Those without a default."""
    args = function.args
    wanted = [each.arg for each in (*args.posonlyargs, *args.args)]
    wanted = wanted[: len(wanted) - len(args.defaults)] if args.defaults else wanted
    return wanted + [each.arg for each, value in zip(args.kwonlyargs, args.kw_defaults, strict=True) if value is None]


def _fixtures(body: list[ast.stmt], of: str = "") -> _Fixtures:
    """The functions of a module or a class that make arguments of tests, whose decorators are taken off."""
    found = {}
    for node in body:
        marks = [each for each in getattr(node, "decorator_list", ()) if _named(each) in FIXTURES]
        if isinstance(node, ast.FunctionDef) and marks:
            node.decorator_list = [each for each in node.decorator_list if each not in marks]
            is_always = any(_is_always(each) for mark in marks for each in getattr(mark, "keywords", ()))
            found[node.name] = _Fixture(f"{of}{node.name}", node, is_always)
    return found


def _is_always(option: ast.keyword) -> bool:
    return option.arg == "autouse" and ast.unparse(option.value) != "False"


def _made(name: str, fixtures: _Fixtures, made: set[str], within: tuple[str, ...] = ()) -> str:
    """The expression for what a fixture makes, once for a test and those of its fixtures that ask for it: it lives for
    as long as the test. What is `made` has been before this expression is evaluated."""
    if name in made:
        return f"made_{name}"
    called, function, _ = fixture = fixtures[name]
    wanted = fixture.wanted
    if name in within or not fixtures.keys() >= set(wanted):
        raise ValueError(f"{name} takes arguments, which only pytest gives it: write what it is to have")
    call = f"{called}({', '.join(f'{each}={_made(each, fixtures, made, (*within, name))}' for each in wanted)})"
    made.add(name)
    yields = any(isinstance(node, ast.Yield) for node in ast.walk(function))
    return f"(made_{name} := {f'next(kept_{name} := {call})' if yields else call})"


def _items(marks: ast.expr) -> list[ast.expr]:
    return marks.elts if isinstance(marks, ast.List | ast.Tuple) else [marks]


def _named(decorator: ast.AST) -> str:
    """The name of a decorator or mark, by which it is known to those who import pytest and to those who import mark."""
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator).removeprefix("pytest.")


def _parameters(function: _Function, lists: Mapping[str, ast.expr]) -> list[dict[str, str]]:
    """The values that `pytest.mark.parametrize` gives names, for each call; it is taken off."""
    rows: list[dict[str, str]] = [{}]
    for decorator in list(function.decorator_list):
        own = _rows(decorator, lists)
        if own:
            function.decorator_list.remove(decorator)
            rows = [each | row for each in own for row in rows]
    return rows


def _rows(decorator: ast.expr, lists: Mapping[str, ast.expr]) -> list[dict[str, str]]:
    """Those of one decorator; none of what is not in the text."""
    if (found := _parametrized(decorator)) is None:
        return []
    names, is_one, table = found
    table = lists.get(table.id, table) if isinstance(table, ast.Name) else table
    rows = table.elts if isinstance(table, ast.List | ast.Tuple) else []
    cells = [_cells(row, is_one) for row in rows if not _is_left_out(row)]
    if not all(len(row) == len(names) for row in cells):
        return []
    return [dict(zip(names, map(ast.unparse, row), strict=True)) for row in cells]


def _parametrized(decorator: ast.expr) -> tuple[list[str], bool, ast.expr] | None:
    """The names of a `parametrize`, whether a row is the value of the one, and the table of rows."""
    match decorator:
        case ast.Call(func=ast.Attribute(attr="parametrize"), args=[names, table], keywords=keywords) if {
            each.arg for each in keywords
        } <= {"ids"}:
            is_text = isinstance(names, ast.Constant)
            parts = str(names.value).split(",") if isinstance(names, ast.Constant) else _texts(names)
            known = [part.strip() for part in parts if part.strip()]
            return known, is_text and len(known) == 1, table
    return None


class _Computed(NamedTuple):
    """A table that only a run makes: the name and the expression of its rows, and what each gives the arguments."""

    row: str
    table: str
    values: dict[str, str]


def _computed(function: _Function, lists: Mapping[str, ast.expr]) -> list[_Computed]:
    """The tables that are left, which are taken off; none of rows that pytest.param makes, with marks that nobody
    knows."""
    found: list[_Computed] = []
    for decorator in list(function.decorator_list):
        names, is_one, table = _parametrized(decorator) or ([], False, decorator)
        made = lists.get(table.id, table) if isinstance(table, ast.Name) else table
        if names and isinstance(made, ast.Call | ast.ListComp | ast.BinOp) and "param(" not in ast.unparse(made):
            function.decorator_list.remove(decorator)
            row = f"__row{len(found)}__"
            values = {name: row if is_one else f"{row}[{i}]" for i, name in enumerate(names)}
            found.append(_Computed(row, f"({ast.unparse(table)})", values))
    return found


def _is_param(row: ast.expr) -> TypeGuard[ast.Call]:
    return isinstance(row, ast.Call) and _named(row) == "param"


def _is_left_out(row: ast.expr) -> bool:
    """Whether a mark of the row's own says that it may not be run."""
    marks = (part for each in getattr(row, "keywords", ()) for part in ast.walk(each.value))
    return _is_param(row) and any(_named(part) in (*LEFT_OUT, "mark.skipif") for part in marks)


def _cells(row: ast.expr, is_one: bool) -> list[ast.expr]:
    if _is_param(row):
        return list(row.args)
    return [row] if is_one else list(getattr(row, "elts", ()))


def _texts(names: ast.expr, within: str = "elts") -> list[str]:
    return [str(getattr(each, "value", "")) for each in getattr(names, within, ())]


def _check_asserts(body: list[ast.stmt]) -> None:
    run = _names_run(body)
    if run & BY_ANY_NAME:
        return
    asserting = [node for node in body if any(isinstance(part, ast.Assert) for part in ast.walk(node))]
    defined = [node for node in asserting if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and node.name not in run]
    dead = [node for node in defined if all(map(_is_mark, node.decorator_list))]
    if dead and len(dead) == len(asserting):
        raise NoTestError(f"{dead[0].name} asserts, and nothing runs it: any solution would pass")


def _is_mark(decorator: ast.expr) -> bool:
    return _named(decorator).startswith(("mark.", "fixture"))


def check_asks(tree: ast.Module) -> None:
    """Raises NoTestError for a program that runs nothing of the solution's."""
    run = _names_run(tree.body)
    if run & BY_ANY_NAME:
        return
    kinds = (*_FUNCTIONS, ast.ClassDef)
    ran = [node for node in tree.body if not isinstance(node, kinds) or node.name in run or node.decorator_list]
    text = ast.unparse(ast.Module(ran, []))  # a decorator may run what it is given
    wanted = wanted_names(text)
    if not wanted.names and set(wanted.other) <= {"print"} and not any(word in text for word in OF_SOLUTION):
        raise NoTestError("the tests are a program that asks the solution nothing: any would pass")
