"""Tests that the machine skips: a condition of theirs asks for a package or a platform, and the solution nothing.

Such a test passes, as for unittest itself: else no solution at all could pass it. Which they are is found in the jail
before the solution is there, so that no solution can have a test skipped; any other test that is skipped has failed.
"""

from __future__ import annotations

import ast
import builtins
import marshal
from collections.abc import Iterable, Iterator

from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.syntax import last_name, parse
from fastgrpo_sandbox.scripts import BY_ANY_NAME
from fastgrpo_sandbox.unrolling import names_read

BY_CONDITION = ("skipIf", "skipUnless")
OF_SOLUTION = ("solution", "__main__", "import_module", "__import__", "sys.modules")  # by which it is asked by no name
SET_UPS = ("setUpClass", "setUp")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_GIVING = (*_FUNCTIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.Try)
_Test = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@memo
def skip_probes(source: str, names: tuple[str, ...]) -> tuple[tuple[str, bytes], ...]:
    """For each of the tests called `names` that may be skipped by a condition which can be asked without a solution, a
    program that raises unittest's SkipTest where it is skipped, marshalled. Raises SyntaxError."""
    if "skip" not in source.lower():
        return ()
    tree = parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = []
    for name in names:
        asked = [line for node in _parts(name, classes) for line in _asked(node, tree)]
        program = _with_given(asked, tree)
        if asked and _asks_no_solution(program):
            code = compile(ast.unparse(program), "tests.py", "exec", dont_inherit=True)
            found.append((name, marshal.dumps(code)))
    return tuple(found)


def _parts(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[_Test]:
    """A test's class, what sets it up, and itself."""
    class_name, _, method = name.partition(".")
    cls = classes[class_name]
    yield cls
    functions = {node.name: node for node in cls.body if isinstance(node, _FUNCTIONS)}
    yield from (functions[each] for each in (*SET_UPS, method) if each in functions)


def _asked(node: _Test, tree: ast.Module) -> Iterator[str]:
    """What is asked by a test's decorators and by the statements that it begins with."""
    given = {last_name(each.targets[0]): each.value for each in tree.body if isinstance(each, ast.Assign)}
    for decorator in node.decorator_list:
        call = given.get(last_name(decorator), decorator)
        if isinstance(call, ast.Call) and last_name(call.func) in BY_CONDITION:
            yield f"@{ast.unparse(decorator)}\ndef __asked__(): pass\n__asked__()"
    if isinstance(node, _FUNCTIONS):
        first = list(_first(node.body))
        if any(not isinstance(each, ast.Import | ast.ImportFrom) for each in first):
            yield "\n".join(map(ast.unparse, first))


def _first(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that a function begins with, as far as they only import and skip."""
    for node in body:
        match node:
            case ast.Expr(value=ast.Constant()):
                continue
            case ast.If(body=[skip], orelse=[]) if _is_skip(skip):
                yield ast.If(node.test, [_RAISED], [])
            case ast.Try(body=[*tried], handlers=[ast.ExceptHandler(body=[skip]) as handler]) if all(
                isinstance(each, ast.Import | ast.ImportFrom) for each in tried
            ) and _is_skip(skip):
                yield ast.Try(tried, [ast.ExceptHandler(handler.type, None, [_RAISED])], [], [])
            case ast.Import() | ast.ImportFrom():
                yield node
            case _:
                return


_RAISED = ast.parse("raise __skip__").body[0]


def _is_skip(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else node.exc if isinstance(node, ast.Raise) else None
    return isinstance(call, ast.Call) and last_name(call.func) in ("skipTest", "SkipTest")


def _with_given(lines: Iterable[str], tree: ast.Module) -> ast.Module:
    """The lines as a program, after what of the tests' own statements gives the names that they read."""
    body = [node for line in lines for node in parse(line).body]
    given: list[ast.stmt] = []
    names = names_read(ast.Module(body, []))
    while more := [each for each in tree.body if each not in given and names & _bound(each)]:
        given += more
        names |= names_read(ast.Module(more, []))
    return ast.Module([each for each in tree.body if each in given] + body, [])


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement gives at the top of the tests."""
    if not isinstance(node, _GIVING):
        return set()
    if isinstance(node, _FUNCTIONS):
        return {node.name}
    parts = list(ast.walk(node))
    names = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    aliases = (alias for part in parts if isinstance(part, ast.Import | ast.ImportFrom) for alias in part.names)
    return names | {(alias.asname or alias.name).partition(".")[0] for alias in aliases}


def _asks_no_solution(program: ast.Module) -> bool:
    """Whether nothing in it may be the solution's, whose absence would then skip a test that asks for it."""
    parts = list(ast.walk(program))
    known = {part.arg for part in parts if isinstance(part, ast.arg)}
    known = known.union(*(_bound(part) for part in parts if isinstance(part, ast.stmt)))
    read, text = names_read(program), ast.unparse(program)
    if read & BY_ANY_NAME or any(word in text for word in OF_SOLUTION):
        return False
    return all(name in known or hasattr(builtins, name) for name in read - {"__skip__"})
