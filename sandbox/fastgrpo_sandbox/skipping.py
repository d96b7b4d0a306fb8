"""Tests that the machine skips: a condition of theirs asks for a package or a platform, and the solution nothing.

Such a test passes, as for unittest and pytest: else no solution at all could pass it. Which they are is found in the
jail before the solution is there or was asked anything, so that no solution can have a test skipped; any other test
that is skipped has failed. Where all are, none passes: any program would.
"""

from __future__ import annotations

import ast
import marshal
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.names import bound_name, wanted_names
from fastgrpo_sandbox.guest.syntax import last_name, parse, parse_expression
from fastgrpo_sandbox.members import CHANGING, FIRST, SELF, SET_UPS, as_names, given_in, stored_in
from fastgrpo_sandbox.source_text import BY_ANY_NAME, OF_SOLUTION, SKIPPED, names_read
from fastgrpo_sandbox.types import AssertTests, NoTestError, Tests, UnittestTests
from fastgrpo_sandbox.unittest_source import unittest_names

BY_CONDITION = ("skipIf", "skipUnless")
SKIPS = ("skipTest", "SkipTest", "skip")
MOST_CALLS = 30  # of the tests' own functions, within one another too, that are read for one test
UNDECIDED = "a test may be skipped, and whether it is cannot be told before a solution is there: {}"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_GIVING = (*_FUNCTIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Try, ast.If)
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Test = ast.ClassDef | _Function
_RAISED, _STOPPED = ast.parse("raise __skip__\nraise __stop__").body
_OWN = frozenset({"__skip__", "__stop__"})
_SKIPPED = ast.dump(parse_expression(SKIPPED))
_OPEN = frozenset({""})  # the name of what may be anything of the solution's, which no tests give


@memo
def skip_probes(source: str, names: tuple[str, ...]) -> tuple[tuple[int, bytes], ...]:
    """The unittest tests of these names that may be skipped by a condition which can be asked without a solution: the
    number of each, and a program that raises `__skip__` where it is skipped, marshalled. Raises SyntaxError, and
    NoTestError where one may be skipped by what asks no solution and stands where it cannot be asked before one is."""
    if "skip" not in source.lower():
        return ()
    text = _Text(parse(source).body)
    return _programs(text.of(name.partition(".")[0]).asked_in(name) for name in names)


@memo
def line_probes(setup: str, lines: tuple[str, ...]) -> tuple[tuple[int, bytes], ...]:
    """The same of lines that call tests as pytest finds them, which `setup` defines. Raises likewise."""
    if "skip" not in setup.lower() and not any("SkipTest" in line for line in lines):
        return ()
    text = _Text(parse(setup).body)
    trees = map(parse, lines)
    return _programs(text.of(*sorted(names_read(tree) & text.classes)).asked_by(tree) for tree in trees)


def check_skips(tests: Tests) -> None:
    """Raises NoTestError where a test may be skipped and nobody can tell whether (`skip_probes`), and SyntaxError."""
    if isinstance(tests, AssertTests):
        line_probes(tests.setup, tests.asserts)
    elif isinstance(tests, UnittestTests):
        skip_probes(f"{tests.setup}\n{tests.source}", unittest_names(tests.source))


def _programs(texts: Iterable[str]) -> tuple[tuple[int, bytes], ...]:
    coded = ((i, compile(text, "tests.py", "exec", dont_inherit=True)) for i, text in enumerate(texts) if text)
    return tuple((i, marshal.dumps(code)) for i, code in coded)


class _Text:
    """The classes of tests, and what can be asked of each without a solution."""

    def __init__(self, body: list[ast.stmt]) -> None:
        self._body = body
        self._classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        self._stored, self._changed = stored_in(body), _changed(body)
        self._known: dict[str, _Tests] = {}

    @property
    def classes(self) -> set[str]:
        """Their names."""
        return set(self._classes)

    def of(self, *names: str) -> _Tests:
        """The tests with what the class of that name has; of the last of several."""
        name = names[-1] if names else ""
        if name not in self._known:
            classes = list(dict.fromkeys(self._bases(name)))
            given, methods = as_names(self._stored, classes) if classes else ([], {})
            changed = self._changed | _changed(given)
            self._known[name] = _Tests([*self._body, *given], classes, methods, changed)
        return self._known[name]

    def _bases(self, name: str, depth: int = 8) -> Iterator[ast.ClassDef]:
        if depth and name in self._classes:
            yield self._classes[name]
            for base in self._classes[name].bases:
                yield from self._bases(last_name(base), depth - 1)


class _Tests:
    """The text of tests, of which statements are taken that ask no solution anything: their names are all the tests'
    own, given by such statements, or builtins."""

    def __init__(
        self, body: list[ast.stmt], classes: Sequence[ast.ClassDef], methods: dict[str, _Function], changed: set[str]
    ) -> None:
        self._body, self._classes, self._methods = body, classes, methods
        self._functions = {node.name: node for node in body if isinstance(node, _FUNCTIONS)}
        given = [node for node in body if isinstance(node, ast.Assign)]
        self._values = {node.targets[0].id: node.value for node in given if isinstance(node.targets[0], ast.Name)}
        self._givers: dict[str, set[int]] = defaultdict(set)
        for number, node in enumerate(body):
            for name in _bound(node) - changed:
                self._givers[name].add(number)
        self._wanted: dict[int, frozenset[str]] = {}
        self._sets = [*given_in(self._functions.values())]
        self._calls_left = MOST_CALLS

    def asked_in(self, name: str) -> str:
        """What is asked where unittest runs the test of that name; empty where that is nothing."""
        wanted = (*FIRST, name.partition(".")[2])
        parts = [self._methods[each] for each in wanted if each in self._methods]
        return self._program(self._asked_of([*self._classes, *parts]))

    def asked_by(self, line: ast.Module) -> str:
        """What is asked where a line has conditions of marks and calls functions, or methods of a class."""
        asked: list[ast.stmt] = [
            ast.If(node.test, [_RAISED], [])
            for node in ast.walk(line)
            if isinstance(node, ast.IfExp) and ast.dump(node.body) == _SKIPPED and self._asks_none(node.test)
        ]
        called = {last_name(node.func): None for node in ast.walk(line) if isinstance(node, ast.Call)}
        functions = {**self._functions, **self._methods}
        parts = [functions[name] for name in sorted(called, key=lambda name: name not in SET_UPS) if name in functions]
        return self._program([*asked, *self._asked_of([*self._classes, *parts])])

    def _asked_of(self, parts: Iterable[_Test]) -> list[ast.stmt]:
        """What is asked by decorators, and by functions up to a skip; of what sets up, also what this reads."""
        self._calls_left = MOST_CALLS
        asked: list[ast.stmt] = []
        bodies: list[list[ast.stmt]] = []
        made: frozenset[str] = frozenset()
        for node in parts:
            asked += [each for decorator in node.decorator_list for each in self._condition(decorator)]
            if isinstance(node, _FUNCTIONS):
                bodies.append(self._first(node.body, _locals(node) | made))
                made |= self._made_by([part for body in bodies for part in body])
        wanted: set[str] = set()
        called: list[ast.stmt] = []
        for body in reversed(bodies):
            while body and not (_raises(body[-1], _RAISED) or wanted & _bound_within(body[-1])):
                body.pop()
            wanted |= names_read(ast.Module(body, []))
            called = [*(_called(body) if body else ()), *called]
        return [*asked, *called]

    def _made_by(self, body: list[ast.stmt]) -> frozenset[str]:
        """What the test has by statements that set it up, if these are all that may give it."""
        told = set(map(id, given_in(body)))
        others = {node.id for node in self._sets if id(node) not in told}
        return frozenset(node.id for node in given_in(body)) - others

    def _condition(self, decorator: ast.expr) -> Iterator[ast.stmt]:
        """That of unittest's decorators, also by a name of the tests', or made by a function of theirs."""
        decorator = self._values.get(last_name(decorator), decorator)
        name = last_name(decorator.func if isinstance(decorator, ast.Call) else decorator)
        test: ast.expr = ast.Constant(False)
        match decorator:
            case ast.Call(args=[condition, *_]) if name in BY_CONDITION:
                test = condition if name == "skipIf" else ast.UnaryOp(ast.Not(), condition)
            case _ if name in self._functions and self._asks_none(decorator):
                own = list(ast.walk(self._functions[name]))
                if any(isinstance(each, ast.Raise | ast.Expr) and _is_skip(each) for each in own):
                    raise NoTestError(UNDECIDED.format(f"@{ast.unparse(decorator):.80}"))
                if not {*BY_CONDITION, "skip"}.isdisjoint(map(last_name, own)):
                    test = parse_expression(f"hasattr(({ast.unparse(decorator)})(lambda: 0), '__unittest_skip__')")
        if not isinstance(test, ast.Constant) and self._asks_none(test):
            yield ast.If(test, [_RAISED], [])

    def _first(self, body: list[ast.stmt], own: frozenset[str]) -> list[ast.stmt]:
        """The statements of a function that only import, look and skip; it stops where one does more.

        Raises NoTestError where one that asks no solution does, and a skip that asks none either is in it or behind it.
        """
        found: list[ast.stmt] = []
        reached, skipping = -1, -1  # up to where it is known, and the last statement that may skip
        for number, node in enumerate(body):
            made = self._one(node, own)
            if made is None and _is_unittests(node) and self._asks_none(node, own):
                continue
            if made is None and number > reached:
                reached, skipping = self._last_skip(body, number, own)
            if made is None and number <= skipping:
                if self._may_skip(node) or not _is_apart(node, body[number + 1 : skipping + 1]):
                    raise NoTestError(UNDECIDED.format(_shown(node)))
                continue
            found.append(made or _STOPPED)
            if isinstance(found[-1], ast.Return | ast.Raise):
                break
        return found

    def _last_skip(self, body: list[ast.stmt], number: int, own: frozenset[str]) -> tuple[int, int]:
        """Of the statements from this number on: the first that asks the solution, and before it the last that may
        skip, or -1."""
        found = -1
        for place, node in enumerate(body[number:], number):
            if not self._asks_none(node, own):
                return place, found
            found = place if self._may_skip(node) else found
        return len(body), found

    def _may_skip(self, node: ast.stmt) -> bool:
        """Whether a statement, or a function of the tests' that it calls, may skip."""
        called = [last_name(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)]
        within = [node, *(self._functions[name] for name in called if name in self._functions)]
        return any(_is_skip(part) for each in within for part in ast.walk(each) if isinstance(part, ast.stmt))

    def _one(self, node: ast.stmt, own: frozenset[str]) -> ast.stmt | None:
        """A statement, if it only imports, looks and skips, with a stop in the place of what does more within it."""
        match node:
            case _ if _is_skip(node):
                return _RAISED
            case ast.If(test=test) if self._asks_none(test, own):
                return ast.If(test, self._first(node.body, own) or [ast.Pass()], self._first(node.orelse, own))
            case ast.For(orelse=[]) if self._asks_none(node.iter, own):
                return ast.For(node.target, node.iter, self._first(node.body, own) or [ast.Pass()], [])
            case ast.Expr(value=ast.Call(func=ast.Name(id=name))) if (
                name in self._functions
                and self._calls_left
                and f"{name}()" not in own
                and self._asks_none(_arguments(node), own)
            ):
                return self._inlined(self._functions[name], node, own)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=[]):
                tried, otherwise = self._first(body, own), self._first(orelse, own)
                caught = [self._handler(each, own) for each in handlers]
                known = all(each.type is None or self._asks_none(each.type) for each in handlers)
                known = known and not any(_raises(each, _STOPPED) for each in tried)
                return ast.Try(tried, caught, otherwise, []) if known else None
            case ast.Assign(value=ast.Call(func=function, args=[ast.Constant(str(name))])) if (
                last_name(function) == "importorskip"
            ):
                return _import_or_skip(name)
            case ast.Expr(value=ast.Constant()) | ast.Pass() | ast.Break() | ast.Continue() | ast.Global():
                return node
            case (
                ast.Import()
                | ast.ImportFrom()
                | ast.Return()
                | ast.Assign(targets=[ast.Name() | ast.Tuple()])
                | ast.AnnAssign(target=ast.Name())
                | ast.AugAssign(target=ast.Name())
                | ast.Expr(value=ast.Call(func=ast.Name("print" | "import_module" | "__import__")))
                | ast.Expr(value=ast.Call(func=ast.Attribute(attr="import_module")))
            ) if self._asks_none(node, own):
                return node
        return None

    def _inlined(self, function: _Function, call: ast.Expr, own: frozenset[str]) -> ast.stmt:
        """A call of the tests' own function, which may skip."""
        self._calls_left -= 1
        arguments = {each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)}
        own |= {*_locals(function), *arguments, f"{function.name}()"}
        body = self._first(function.body, own) or [ast.Pass()]
        made = ast.FunctionDef(function.name, function.args, body, [])
        return ast.If(ast.Constant(True), [made, call], [])

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

    def _program(self, asked: list[ast.stmt]) -> str:
        """What is asked, after what it reads; empty where that is nothing."""
        body = ast.Module(asked, [])
        given = self._given(_wants(body) - _OWN) if asked else None
        return "" if given is None else ast.unparse(ast.fix_missing_locations(ast.Module([*given, *asked], [])))


def _called(body: list[ast.stmt]) -> list[ast.stmt]:
    lines = parse("def __asked__(): pass\ntry: __asked__()\nexcept __stop__: pass").body
    lines[0].body = body  # type: ignore[attr-defined]
    return lines


def _import_or_skip(name: str) -> ast.Try:
    """pytest.importorskip; a condition that looks at what it gave finds no such name, and is left to the run."""
    handler = ast.ExceptHandler(ast.Name("ImportError", ast.Load()), None, [_RAISED])
    return ast.Try([ast.Import([ast.alias(name)])], [handler], [], [])


def _wants(node: ast.AST) -> frozenset[str]:
    """The names that a statement or expression needs from elsewhere."""
    text = ast.unparse(ast.fix_missing_locations(node))
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


def _shown(node: ast.stmt) -> str:
    """The first line of a statement as the tests have it, or nearly."""
    line = ast.unparse(node).partition("\n")[0]
    return re.sub(rf"{SELF}\d*(?=\w)", "self.", line).replace(SELF, "self")[:80]


def _raises(node: ast.stmt, what: ast.stmt) -> bool:
    return any(part is what for part in ast.walk(node))


def _bound_within(node: ast.stmt) -> set[str]:
    return set(map(bound_name, ast.walk(node)))


def _arguments(node: ast.Expr) -> ast.Tuple:
    """What the call that a statement is is given."""
    call = node.value
    assert isinstance(call, ast.Call)
    return ast.Tuple([*call.args, *(each.value for each in call.keywords)], ast.Load())


def _is_unittests(node: ast.stmt) -> bool:
    """Whether a statement is a call of what unittest has to set up any test, which skips none."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr))) if name == SELF:
            return attr in (*FIRST, "addCleanup", "addClassCleanup")
    return False


def _is_apart(node: ast.stmt, rest: list[ast.stmt]) -> bool:
    """Whether a statement is a call of something that nothing behind it reads, as `random.seed(0)` is."""
    others = ast.Module([each for each in rest if not _is_unittests(each)], [])
    return isinstance(node, ast.Expr) and not (names_read(node) & names_read(others) - {SELF})


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
