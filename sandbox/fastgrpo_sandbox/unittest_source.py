"""Unittest tests as text: their names, what they import and define, and the code that a jail runs (guest/unit.py)."""

from __future__ import annotations

import ast
import builtins
import marshal
import symtable
from collections import Counter
from collections.abc import Iterable, Iterator

from fastgrpo_sandbox.guest.guarded import Guarded
from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.names import (
    bound_name,
    lent_name,
    parse_tests,
    read_names,
    unimported_modules,
    wanted_names,
)
from fastgrpo_sandbox.guest.paired import Paired
from fastgrpo_sandbox.guest.syntax import Transformer, call, hoisted, last_name, load, parse, walk
from fastgrpo_sandbox.source_text import plain_data, starters, starts_tests

AWAITING = "IsolatedAsyncioTestCase"
TEST_BASES = ("TestCase", AWAITING)
# Decorators, by their last names, of which a coroutine is still one: unittest's, and mock's patch and its forms.
LEAVING = ("expectedFailure", "skipIf", "skipUnless", "patch", "object", "dict", "multiple")
MARSHAL = 0  # the format that writes equal data alike, but for sets
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@memo
def unittest_names(source: str) -> tuple[str, ...]:
    """`Class.method` of every unittest test in `source` that is not skipped for good, in the order of the text; `Class`
    alone for a class whose tests are made by setattr. Raises SyntaxError."""
    tree = parse(source)
    known, awaiting = _named(tree, *TEST_BASES), _named(tree, AWAITING)
    found: list[str] = []
    made = _set_classes(tree)
    mixins: dict[str, ast.ClassDef] = {}
    for cls in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        if known.isdisjoint(map(last_name, cls.bases)):
            mixins[cls.name] = cls
            continue
        known.add(cls.name)
        if not awaiting.isdisjoint(map(last_name, cls.bases)):
            awaiting.add(cls.name)
        is_awaited = cls.name in awaiting
        tests = dict.fromkeys(_tests(cls, mixins, is_awaited))
        tests = tests or dict.fromkeys(name for name in _methods(cls, is_awaited) if name == "runTest")
        if not _is_skipped(cls):
            found += [f"{cls.name}.{name}" for name in tests] or ([cls.name] if cls.name in made else [])
    return tuple(found)


def _named(tree: ast.Module, *classes: str) -> set[str]:
    """Classes of unittest's, with other names: `from unittest import TestCase as Base`, `Base = unittest.TestCase`."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "unittest"]
    found = {each.asname for node in imports for each in node.names if each.name in classes and each.asname}
    given = [node for node in tree.body if isinstance(node, ast.Assign) and last_name(node.value) in classes]
    return {*classes, *found, *(last_name(target) for node in given for target in node.targets)}


def _methods(cls: ast.ClassDef, is_awaited: bool) -> list[str]:
    """Those that are run when they are called."""
    functions = [item for item in cls.body if isinstance(item, _FUNCTIONS) and not _is_skipped(item)]
    return [item.name for item in functions if not _only_makes(item, is_awaited)]


def _only_makes(function: _Function, is_awaited: bool) -> bool:
    """Whether a call is a coroutine or generator, which unittest drops, and passes. A decorator may run either."""
    if not set(LEAVING) >= set(map(last_name, _decorators(function))):
        return False
    if any(isinstance(node, ast.Yield | ast.YieldFrom) for each in function.body for node in _own_nodes(each)):
        return True
    return isinstance(function, ast.AsyncFunctionDef) and not is_awaited


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What is run with a function that `node` is a part of."""
    if not isinstance(node, (*_FUNCTIONS, ast.Lambda, ast.ClassDef)):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from _own_nodes(child)


def _tests(cls: ast.ClassDef, mixins: dict[str, ast.ClassDef], is_awaited: bool) -> Iterator[str]:
    """The tests of a class, and those that it has from others which are no tests by themselves."""
    yield from (name for name in _methods(cls, is_awaited) if name.startswith("test"))
    for base in map(last_name, cls.bases):
        if base in mixins:
            others = {name: each for name, each in mixins.items() if name != base}
            yield from _tests(mixins[base], others, is_awaited)


def _set_classes(tree: ast.Module) -> set[str]:
    """Names of what `setattr` is called on."""
    calls = [node for node in walk(tree) if isinstance(node, ast.Call) and node.args]
    return {last_name(call.args[0]) for call in calls if last_name(call.func) == "setattr"}


def _is_skipped(node: ast.ClassDef | _Function) -> bool:
    """Whether a test is skipped for good, by a decorator or as the first that it does."""
    if "skip" in map(last_name, _decorators(node)) or any(map(_surely_skips, node.decorator_list)):
        return True
    body = [each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    match body:
        case [ast.Expr(value=ast.Call(func=function)), *_] | [ast.Raise(exc=ast.Call(func=function)), *_]:
            return last_name(function) in ("skipTest", "SkipTest")
    return False


def _surely_skips(decorator: ast.expr) -> bool:
    match decorator:
        case ast.Call(func=function, args=[ast.Constant(value=value), *_]):
            return last_name(function) == ("skipIf" if value else "skipUnless")
    return False


def _decorators(node: ast.ClassDef | _Function) -> list[ast.expr]:
    return [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]


@memo
def given_data(setup: str, source: str) -> tuple[tuple[str, bytes], ...]:
    """The names that the setup of unittest tests gives plain data, and that nothing else of setup and tests gives a
    value, each with that data, marshalled. Raises SyntaxError."""
    tree = parse(setup)
    given = list(filter(None, map(plain_data, tree.body)))
    texts = (tree, parse_tests(source)) if given else ()
    bound = Counter(bound_name(node) for text in texts for node in walk(text))
    found = [data for data in given if all(bound[name] == 1 for name in data)]
    return tuple((name, marshal.dumps(value, MARSHAL)) for data in found for name, value in data.items())


@memo
def compile_unittest(source: str, given: frozenset[str] = frozenset()) -> bytes:
    """A program of unittest tests, its comparisons guarded, marshalled for the jail's interpreter, which is this one.
    What the names `given` are, is asked of `__given__` where they are read. Raises SyntaxError."""
    tree = hoisted(parse(source))
    started = starters(tree)
    tree.body = [
        node
        for node in tree.body
        if not (_is_started(node) or starts_tests(node, started) or not given.isdisjoint(plain_data(node)))
    ]
    tree = Guarded().visit(Paired(loops=True).visit(tree))
    tree = _Meant(_meant_builtins(source), unimported_modules(source), given).visit(tree)
    return marshal.dumps(compile(ast.fix_missing_locations(tree), "tests.py", "exec", dont_inherit=True))


def _is_started(node: ast.stmt) -> bool:
    """Whether a statement of the module is run where that is started as a program."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Compare):
        return "__name__" in (last_name(node.test.left), last_name(node.test.comparators[0]))
    return False


class _Meant(Transformer):
    """`len` becomes `__builtins__.len`, and `math`, which the tests do not import, `__lent_math__`: the tests run in
    the solution's namespace, where either may be another, and where it is no import of the solution's. `USERS`, of
    the setup's data, becomes `__given__("USERS")`."""

    def __init__(self, builtin: set[str], lent: Iterable[str], given: frozenset[str]) -> None:
        self._builtin, self._lent, self._given = builtin, frozenset(lent), given

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self._given and isinstance(node.ctx, ast.Load):
            return call("__given__", ast.Constant(node.id), at=node)
        if node.id in self._lent:
            return load(lent_name(node.id), at=node)
        if node.id not in self._builtin:
            return node
        return ast.copy_location(ast.Attribute(load("__builtins__", at=node), node.id, ast.Load()), node)


def _meant_builtins(source: str) -> set[str]:
    """The builtins that tests mean by their names. Of one that is called with nothing but data a solution may have its
    own, where the tests ask no function of it beside; and it may have exceptions of any name."""
    nodes, wanted = list(walk(parse(source))), wanted_names(source)
    read = {node.id for node in nodes if isinstance(node, ast.Name)} - set(map(bound_name, nodes)) - {"super"}
    found = {name for name in read if not name.startswith("__") and _is_meant(getattr(builtins, name, None))}
    return found if any(name[:1].islower() for name in wanted.names) else found.difference(wanted.other)


def _is_meant(value: object) -> bool:
    return callable(value) and not (isinstance(value, type) and issubclass(value, BaseException))


@memo
def imported_modules(source: str) -> tuple[str, ...]:
    """What may be a module of those that `source` imports, or takes to be there, and uses, by full name: `numpy` and
    `numpy.testing`, where it has `np.testing.assert_allclose`. Raises SyntaxError."""
    nodes = list(_with_scripts(parse(source)))
    bound = unimported_modules(source)
    imported = set(bound.values())
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
            bound |= {bound_name(alias): alias.name if alias.asname else bound_name(alias) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module)
            bound |= {bound_name(alias): f"{node.module}.{alias.name}" for alias in node.names}
    used = {_place(node.value, bound) for node in nodes if isinstance(node, ast.Attribute)}
    return tuple(sorted((imported | used) - {""}))


def _with_scripts(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of tests, and of the programs that are run in them as texts (columns.py)."""
    for node in walk(tree):
        yield node
        match node:
            case ast.Call(
                func=ast.Name(id="compile"), args=[ast.Constant(value=str(text)), ast.Constant(value="tests.py"), _]
            ):
                yield from walk(parse(text))


def _place(node: ast.expr, bound: dict[str, str]) -> str:
    """The full name that a chain of attributes of something imported would have as a module, or ""."""
    if isinstance(node, ast.Attribute):
        place = _place(node.value, bound)
        return place and f"{place}.{node.attr}"
    return bound.get(node.id, "") if isinstance(node, ast.Name) else ""


@memo
def own_names(source: str) -> tuple[str, ...]:
    """The names that `source` gives a value at its top level and does not change later. Raises SyntaxError."""
    tree = hoisted(parse(source))
    nodes = list(walk(tree))
    if "globals" in read_names(nodes):
        return ()
    changed = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
    symbols = symtable.symtable(ast.unparse(tree), "tests.py", "exec").get_symbols()
    bound = {each.get_name() for each in symbols if each.is_assigned() or each.is_imported()}
    return tuple(sorted(bound - changed))
