"""Tests made of assertions, compiled so that each assertion has a verdict of its own (judge.py)."""

from __future__ import annotations

import ast
import marshal
from typing import TypeGuard

from .guarded import AskedTypes, Guarded, by_operator
from .memo import memo
from .names import bound_name, parse_tests, read_names
from .paired import Paired
from .syntax import Transformer, call, hoisted, load, walk

# Words of tests that look at the solution's code or change what is around it (looks.py, around.py).
SPECIAL = (
    *("inspect", "mock", "stdin", "stderr", "argv", "input", "environ", "getenv", "seed", "patch", "warnings"),
    *("context", "setrecursionlimit", "set_int_max_str_digits"),
)


@memo
def special_words(*sources: str) -> frozenset[str]:
    """Those of SPECIAL that are in the tests, in whatever sense."""
    return frozenset(word for word in SPECIAL if any(word in source for source in sources))


@memo
def compile_asserts(source: str) -> tuple[bytes, int, tuple[int, ...]]:
    """`split_asserts(source)` compiled and marshalled for the judge, which is this same interpreter, the number of
    asserts, and those that nothing may come to. Raises SyntaxError."""
    tree, count, never = split_asserts(source)
    return _compiled(tree, "tests.py"), count, never


@memo
def compile_setup(source: str) -> bytes:
    """What tests need before them, marshalled likewise. Raises SyntaxError."""
    return _compiled(_Noted().visit(hoisted(parse_tests(source))), "setup.py")


def _compiled(tree: ast.Module, file: str) -> bytes:
    if all(bound_name(node) not in ("type", "super") for node in walk(tree)):
        tree = AskedTypes().visit(tree)
    tree = ast.fix_missing_locations(Guarded().visit(Paired(loops=False).visit(tree)))
    return marshal.dumps(compile(tree, file, "exec", dont_inherit=True))


def split_asserts(source: str) -> tuple[ast.Module, int, tuple[int, ...]]:
    """`source` with every assert replaced by a call of `__passed__(index, test)`, or `__checked__` where it may be run
    again, guarded by `__failed__(index)`; the number of asserts; and those that are `assert False`. Indices follow the
    order of the text. `__over__(*indices)` follows a statement around some, `__instead__(start, stop, start, stop)`
    begins a branch: the indices in it, and those of the other. Raises SyntaxError."""
    tree = hoisted(parse_tests(source))
    splitter = _Split("" if _calls_itself(tree) else "check")
    return splitter.visit(tree), splitter.count, tuple(splitter.never)


def _calls_itself(tree: ast.Module) -> bool:
    """Whether `check` may be run more than once: it is decorated, a generator, or its name is read."""
    checks = [node for node in walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "check"]
    read = any(isinstance(node, ast.Name) and node.id == "check" for node in walk(tree))
    return read or len(checks) != 1 or bool(checks[0].decorator_list)


class _Noted(Transformer):
    """An assertion in a function of the setup says so where it fails, whoever catches its error: `except
    AssertionError: print("failed")` would end the tests as if all had held. One may fail where the function itself
    decides what that means: it counts failures and asserts how many, tries again, or says that it must fail."""

    def __init__(self) -> None:
        self._function: ast.AST = ast.Module([], [])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before, self._function = self._function, node
        self.generic_visit(node)
        self._function = before
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Try(self, node: ast.Try) -> ast.AST:
        body = node.body
        node.body = [] if _may_fail(node, self._function) else body
        self.generic_visit(node)
        node.body = node.body or body
        return node

    def visit_With(self, node: ast.With) -> ast.AST:
        expected = (part for item in node.items for part in walk(item.context_expr))
        return node if "AssertionError" in read_names(expected) else self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.test = call("__noted__", by_operator(_meant(node)), at=node.test)
        return node


def _may_fail(node: ast.Try, function: ast.AST) -> bool:
    """Whether the function that catches failures within `node` raises by itself where it comes to another end, or
    decides by what its handlers noted down."""
    handlers = [part for handler in node.handlers for part in walk(handler)]
    loops = [part for part in walk(function) if isinstance(part, ast.For | ast.While)]
    ends = [*node.orelse, *getattr(function, "body", ()), *(each for loop in loops for each in loop.orelse)]
    if any(map(_raises, handlers)) or any(_is_end(each) for each in ends):
        return True
    noted = {bound_name(part) for part in handlers if not isinstance(part, ast.ExceptHandler)}
    calls = [part.func for part in handlers if isinstance(part, ast.Call)]
    noted |= read_names(each.value for each in calls if isinstance(each, ast.Attribute)) - {"self"}
    inner = {id(part) for part in walk(node)}
    outside = [part for part in walk(function) if id(part) not in inner]
    tests = [part.test for part in outside if isinstance(part, ast.Assert) or _raises(part)]
    return any(not noted.isdisjoint(read_names(walk(test))) for test in tests)


def _raises(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and any(isinstance(part, ast.Raise) for part in walk(node))


def _is_end(node: ast.stmt) -> bool:
    """Whether a statement says that nothing may come to it."""
    is_never = isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant) and not node.test.value
    return is_never or isinstance(node, ast.Raise)


class _Split(Transformer):
    """`assert test, message` becomes a try that records its own verdict under its index and goes on; `assert False`,
    which says that nothing may come here, records that something did. What stands alone in the module or in `check` is
    run once; of other statements there the end is recorded for the assertions within."""

    def __init__(self, check: str) -> None:
        self.count = 0
        self.never: list[int] = []
        self.check = check
        self.inner: list[int] = []  # assertions of the statement under way, but for those in functions

    def visit_Module(self, node: ast.Module) -> ast.AST:
        node.body = self.statements(node.body)
        return node

    def statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in body:
            first = self.count
            if isinstance(statement, ast.FunctionDef) and statement.name == self.check:
                statement.body = self.statements(statement.body)
                found.append(statement)
            elif isinstance(statement, ast.Assert):
                found.append(self.split(statement, "__passed__"))
            else:
                self.inner = []
                found.append(self.visit(statement))
                if self.count > first and self.inner:
                    found.append(_note("__over__", *self.inner, at=statement))
        return found

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before, self.inner = self.inner, []
        self.generic_visit(node)
        self.inner = before
        return node

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_If(self, node: ast.If) -> ast.AST:
        """Where both branches assert, each begins with `__instead__(...)`: it is run in the place of the other."""
        first = self.count
        node.body = [self.visit(each) for each in node.body]
        middle = self.count
        node.orelse = [self.visit(each) for each in node.orelse]
        if first < middle < self.count:
            node.body.insert(0, _note("__instead__", first, middle, middle, self.count, at=node))
            node.orelse.insert(0, _note("__instead__", middle, self.count, first, middle, at=node))
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.inner.append(self.count)
        return self.split(node, "__checked__")

    def split(self, node: ast.Assert, holds: str) -> ast.stmt:
        index = self.count
        self.count += 1
        failed = _note("__failed__", index, at=node)
        if isinstance(node.test, ast.Constant) and not node.test.value:
            self.never.append(index)
            return failed
        body = _note(holds, index, by_operator(_meant(node)), at=node)
        fails = ast.ExceptHandler(type=load("__Exception__", at=node), name=None, body=[failed])
        ends = ast.ExceptHandler(type=None, name=None, body=[failed, ast.Raise()])
        return ast.fix_missing_locations(ast.copy_location(ast.Try([body], [fails, ends], [], []), node))


def _meant(node: ast.Assert) -> ast.expr:
    """What an assertion tests: `assert (f(1) == 2, "why")` is a pair, which is true whatever is in it."""
    match node.test:
        case ast.Tuple(elts=[test, ast.JoinedStr() | ast.Constant(value=str())]):
            return test
    return node.test


def _note(function: str, *arguments: int | ast.expr, at: ast.stmt) -> ast.stmt:
    """A statement that tells the judge's record something."""
    args = [ast.Constant(each) if isinstance(each, int) else each for each in arguments]
    return ast.fix_missing_locations(ast.copy_location(ast.Expr(call(function, *args, at=at)), at))
