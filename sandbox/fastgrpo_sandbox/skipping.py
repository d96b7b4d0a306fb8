"""Tests that the machine skips: a condition of theirs asks for a package or a platform, and the solution nothing.

Such a test passes, as for unittest and pytest: else no solution at all could pass it. Which they are is found in the
jail before the solution is there or was asked anything, so that no solution can have a test skipped; any other test
that is skipped has failed. Where all are, none passes: any program would.
"""

from __future__ import annotations

import ast
import marshal
from collections import defaultdict
from collections.abc import Iterable, Iterator

from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.names import bound_name, wanted_names
from fastgrpo_sandbox.guest.syntax import last_name, parse, parse_expression
from fastgrpo_sandbox.scripts import BY_ANY_NAME, SKIPPED
from fastgrpo_sandbox.unrolling import names_read

BY_CONDITION = ("skipIf", "skipUnless")
SKIPS = ("skipTest", "SkipTest", "skip")
OF_SOLUTION = ("solution", "__main__", "import_module", "__import__", "sys.modules")  # by which it is asked by no name
# Methods by which lists, dictionaries and sets are changed.
CHANGING = frozenset(name for kind in (list, dict, set) for name in vars(kind) if not name.startswith("__"))
CHANGING -= {"copy", "count", "fromkeys", "get", "index", "items", "keys", "values", "isdisjoint", "issubset"}
CHANGING -= {"difference", "intersection", "issuperset", "symmetric_difference", "union"}
SET_UPS = ("setUpClass", "setUp")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_GIVING = (*_FUNCTIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Try, ast.If)
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Test = ast.ClassDef | _Function
_RAISED = ast.parse("raise __skip__").body[0]
_SKIPPED = ast.dump(parse_expression(SKIPPED))
_OPEN = frozenset({""})  # the name of what may be anything of the solution's, which no tests give


@memo
def skip_probes(source: str, names: tuple[str, ...]) -> tuple[tuple[int, bytes], ...]:
    """The unittest tests of these names that may be skipped by a condition which can be asked without a solution: the
    number of each, and a program that raises `__skip__` where it is skipped, marshalled. Raises SyntaxError."""
    if "skip" not in source.lower():
        return ()
    tests = _Tests(source)
    return _programs(tests.program(list(tests.asked_of(tests.parts(name)))) for name in names)


@memo
def line_probes(setup: str, lines: tuple[str, ...]) -> tuple[tuple[int, bytes], ...]:
    """The same of lines that call tests as pytest finds them, which `setup` defines. Raises SyntaxError."""
    if "skip" not in setup.lower() and not any("SkipTest" in line for line in lines):
        return ()
    tests = _Tests(setup)
    return _programs(tests.program(list(tests.asked_by(parse(line)))) for line in lines)


def _programs(texts: Iterable[str]) -> tuple[tuple[int, bytes], ...]:
    coded = ((i, compile(text, "tests.py", "exec", dont_inherit=True)) for i, text in enumerate(texts) if text)
    return tuple((i, marshal.dumps(code)) for i, code in coded)


class _Tests:
    """The text of tests, of which statements are taken that ask no solution anything: their names are all the tests'
    own, given by such statements, or builtins."""

    def __init__(self, source: str) -> None:
        self._body = parse(source).body
        self._classes = {node.name: node for node in self._body if isinstance(node, ast.ClassDef)}
        self._functions = {node.name: node for node in self._body if isinstance(node, _FUNCTIONS)}
        given = [node for node in self._body if isinstance(node, ast.Assign)]
        self._values = {node.targets[0].id: node.value for node in given if isinstance(node.targets[0], ast.Name)}
        self._givers: dict[str, set[int]] = defaultdict(set)
        changed = _changed(self._body)
        for number, node in enumerate(self._body):
            for name in _bound(node) - changed:
                self._givers[name].add(number)
        self._wanted: dict[int, frozenset[str]] = {}

    def parts(self, name: str) -> Iterator[_Test]:
        """The classes of a test, what sets it up, and itself."""
        class_name, _, method = name.partition(".")
        classes = list(dict.fromkeys(self._bases(class_name)))
        yield from classes
        for wanted in (*SET_UPS, method):
            own = (each for cls in classes for each in cls.body if isinstance(each, _FUNCTIONS) and each.name == wanted)
            yield from [*own][:1]

    def _bases(self, name: str, depth: int = 8) -> Iterator[ast.ClassDef]:
        if depth and name in self._classes:
            yield self._classes[name]
            for base in self._classes[name].bases:
                yield from self._bases(last_name(base), depth - 1)

    def asked_by(self, line: ast.Module) -> Iterator[ast.stmt]:
        """What is asked where a line has conditions of marks and calls functions, or methods of classes in it."""
        classes = [self._classes[name] for name in names_read(line) & self._classes.keys()]
        methods = {each.name: each for cls in classes for each in cls.body if isinstance(each, _FUNCTIONS)}
        for node in ast.walk(line):
            if isinstance(node, ast.IfExp) and ast.dump(node.body) == _SKIPPED and self._asks_none(node.test):
                yield ast.If(node.test, [_RAISED], [])
        called = [last_name(node.func) for node in ast.walk(line) if isinstance(node, ast.Call)]
        functions = {**methods, **self._functions}
        yield from self.asked_of([*classes, *(functions[name] for name in called if name in functions)])

    def asked_of(self, parts: Iterable[_Test]) -> Iterator[ast.stmt]:
        """What is asked by decorators, and by functions up to a skip."""
        for node in parts:
            yield from (each for decorator in node.decorator_list for each in self._condition(decorator))
            if isinstance(node, _FUNCTIONS):
                body = self._until_skip(node.body, _locals(node))
                if body:
                    yield from _called(body)

    def _condition(self, decorator: ast.expr) -> Iterator[ast.stmt]:
        """That of unittest's decorators, also by a name of the tests'."""
        match self._values.get(last_name(decorator), decorator):
            case ast.Call(func=function, args=[test, *_]) if last_name(function) in BY_CONDITION:
                test = test if last_name(function) == "skipIf" else ast.UnaryOp(ast.Not(), test)
                if self._asks_none(test):
                    yield ast.If(test, [_RAISED], [])

    def _until_skip(self, body: list[ast.stmt], own: frozenset[str]) -> list[ast.stmt]:
        """The statements of a function up to the last that may skip; it returns where the solution may be asked."""
        found = self._first(body, own)
        while found and not _has(found[-1], ast.Raise):
            found.pop()
        return found

    def _first(self, body: list[ast.stmt], own: frozenset[str]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for node in body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            found.append(self._one(node, own))
            if isinstance(found[-1], ast.Return | ast.Raise):
                break
        return found

    def _one(self, node: ast.stmt, own: frozenset[str]) -> ast.stmt:
        """A statement, if it only imports, looks and skips, with a `return` in the place of what does more."""
        match node:
            case _ if _is_skip(node):
                return _RAISED
            case ast.If(test=test) if self._asks_none(test, own):
                return ast.If(test, self._first(node.body, own) or [ast.Pass()], self._first(node.orelse, own))
            case ast.Expr(value=ast.Call(func=ast.Name(id=name), args=[], keywords=[])) if (
                name in self._functions and f"{name}()" not in own
            ):
                called = self._functions[name]
                own |= {*_locals(called), f"{name}()"}
                return ast.If(ast.Constant(True), self._first(called.body, own) or [ast.Pass()], [])
            case ast.Try(body=body, handlers=handlers, orelse=[], finalbody=[]):
                tried = self._first(body, own)
                caught = [self._handler(each, own) for each in handlers]
                known = all(each.type is None or self._asks_none(each.type) for each in handlers)
                return (
                    ast.Try(tried, caught, [], [])
                    if known and not any(_has(each, ast.Return) for each in tried)
                    else ast.Return()
                )
            case ast.Assign(value=ast.Call(func=function, args=[ast.Constant(str(name))])) if (
                last_name(function) == "importorskip"
            ):
                return _import_or_skip(name)
            case (
                ast.Import()
                | ast.ImportFrom()
                | ast.Assign(targets=[ast.Name()])
                | ast.Expr(value=ast.Call(func=ast.Name("print")))
            ) if self._asks_none(node, own):
                return node
        return ast.Return()

    def _handler(self, node: ast.ExceptHandler, own: frozenset[str]) -> ast.ExceptHandler:
        return ast.ExceptHandler(node.type, node.name, self._first(node.body, own) or [ast.Pass()])

    def _asks_none(self, node: ast.AST, own: frozenset[str] = frozenset()) -> bool:
        return self._given(_wants(node) - own) is not None

    def _given(self, names: Iterable[str]) -> list[ast.stmt] | None:
        """The statements that give these names, and those that they read; None where the solution may give some."""
        found: set[int] = set()
        waiting = list(names)
        while waiting:
            givers = self._givers.get(waiting.pop())
            if not givers:
                return None
            for number in givers - found:
                if number not in self._wanted:
                    self._wanted[number] = _wants(self._body[number])
                waiting += self._wanted[number]
            found |= givers
        return [self._body[number] for number in sorted(found)]

    def program(self, asked: list[ast.stmt]) -> str:
        """What is asked, after what it reads; empty where that is nothing."""
        body = ast.Module(asked, [])
        given = self._given(_wants(body) - {"__skip__"}) if asked else None
        return "" if given is None else ast.unparse(ast.fix_missing_locations(ast.Module([*given, *asked], [])))


def _called(body: list[ast.stmt]) -> list[ast.stmt]:
    lines = parse("def __asked__(): pass\n__asked__()").body
    lines[0].body = body  # type: ignore[attr-defined]
    return lines


def _import_or_skip(name: str) -> ast.Try:
    """pytest.importorskip; a condition that looks at what it gave finds no such name, and is left to the run."""
    handler = ast.ExceptHandler(ast.Name("ImportError", ast.Load()), None, [_RAISED])
    return ast.Try([ast.Import([ast.alias(name)])], [handler], [], [])


def _wants(node: ast.AST) -> frozenset[str]:
    """The names that a statement or expression needs from elsewhere."""
    text = ast.unparse(node)
    if names_read(node) & BY_ANY_NAME or any(word in text for word in OF_SOLUTION):
        return _OPEN
    wanted = wanted_names(text)
    return frozenset((*wanted.names, *wanted.modules))


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement gives at the top of the tests, or of modules in which it changes something: what is in
    `os.environ`, as by `os.environ["CI"] = ""` or `os.environ.update(CI="")`."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return {name}
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Attribute(value=ast.Name(id=name))))):
            return {name}
        case ast.Assign(targets=[ast.Subscript(value=ast.Attribute(value=ast.Name(id=name)))]):
            return {name}
    return set(map(bound_name, ast.walk(node))) - {""} if isinstance(node, _GIVING) else set()


def _changed(body: list[ast.stmt]) -> set[str]:
    """The names of what tests change while they run, where an answer may decide of it."""
    parts = [part for node in body for part in ast.walk(node)]
    found = {name for part in parts if isinstance(part, ast.Global) for name in part.names}
    for part in parts:
        match part:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr)) if attr in CHANGING:
                found.add(name)
            case ast.Subscript(value=ast.Name(id=name)) | ast.Attribute(value=ast.Name(id=name)) if not isinstance(
                part.ctx, ast.Load
            ):
                found.add(name)
    return found


def _locals(function: _Function) -> frozenset[str]:
    """The names that a function gives itself; what it is called with may be the solution's."""
    inner = (part for node in function.body for part in ast.walk(node))
    return frozenset(map(bound_name, inner)) - {
        each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)
    }


def _has(node: ast.AST, kind: type[ast.AST]) -> bool:
    return any(isinstance(part, kind) for part in ast.walk(node))


def _is_skip(node: ast.stmt) -> bool:
    """Whether a statement is `self.skipTest()`, `pytest.skip()`, `raise SkipTest` or `return` of the like."""
    value = node.exc if isinstance(node, ast.Raise) else getattr(node, "value", None)
    if isinstance(node, ast.Raise) and value is not None and last_name(value) == "SkipTest":
        return True
    return (
        isinstance(node, ast.Raise | ast.Expr | ast.Return)
        and isinstance(value, ast.Call)
        and last_name(value.func) in SKIPS
    )
