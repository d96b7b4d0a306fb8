"""Assertions found and rewritten by AST, so that each counts on its own; used by the judge and the host."""

from __future__ import annotations

import ast
import builtins
import marshal
import symtable
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from .arrays import OPERATORS, ORDERING, PACKAGES
from .compared import OF_SOLUTION, pairs, plainly_called, tested_builtins
from .memo import memo
from .paired import Paired
from .syntax import Transformer, hoisted, parse, walk

TEST_BASES = ("TestCase", "IsolatedAsyncioTestCase")
MODULES = {"np": "numpy", "pd": "pandas"}  # names by which tests know packages that they do not import
MODULES |= {package: package for package in PACKAGES}
AGREEING = frozenset({"allclose", "isclose", "array_equal", "array_equiv", "equal"})  # functions of numpy
CLOSE = ("equal", "almost_equal", "array_equal", "array_almost_equal", "array_almost_equal_nulp", "array_max_ulp")
AGREEING |= ORDERING
AGREEING |= {f"assert_{each}" for each in ("allclose", "approx_equal", *CLOSE)}
# Words of tests that look at the solution's code or change what is around it (looks.py, around.py).
SPECIAL = (
    *(
        "inspect",
        "mock",
        "stdin",
        "stderr",
        "argv",
        "input",
        "environ",
        "getenv",
        "seed",
        "patch",
        "warnings",
        "context",
    ),
    *("setrecursionlimit", "set_int_max_str_digits"),
)


@memo
def unittest_names(source: str) -> tuple[str, ...]:
    """`Class.method` of every unittest test in `source` that is not skipped for good, in the order of the text; `Class`
    alone for a class whose tests are made by setattr. Raises SyntaxError."""
    tree = parse(source)
    known = set(TEST_BASES)
    found: list[str] = []
    made = _set_classes(tree)
    for cls in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        if known.isdisjoint(map(_last_name, cls.bases)):
            continue
        known.add(cls.name)
        functions = [item for item in cls.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
        methods = [f"{cls.name}.{item.name}" for item in functions if _is_test(item) and not _is_skipped(item)]
        if not _is_skipped(cls):
            found += methods or ([cls.name] if cls.name in made else [])
    return tuple(found)


class _Guarded(Transformer):
    """`a == b` becomes `__compare__("Eq", a, b)`, likewise order and membership (arrays.py, honest.py); of a chain,
    `a < b < c`, where what is behind the second may be looked at whatever came before. `a - b` becomes
    `__subtract__(a, b)`, and `np.allclose(a, b)` `__agree__(np.allclose, a, b)`."""

    def __init__(self) -> None:
        self._selects = False

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        node.value = self.visit(node.value)
        before, self._selects = self._selects, True
        node.slice = self.visit(node.slice)
        self._selects = before
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        operators = [type(each).__name__ for each in node.ops]
        if not OPERATORS.keys() >= set(operators):
            return node
        if not all(map(_is_at_hand, node.comparators[1:])):
            return self._parted(node)
        selects = [ast.keyword("selects", ast.Constant(True))] if self._selects else []
        args = [ast.Constant(" ".join(operators)), node.left, *node.comparators]
        return ast.copy_location(ast.Call(_name("__compare__"), args, selects), node)

    def _parted(self, node: ast.Compare) -> ast.AST:
        """A chain as its comparisons, where what stands between two may be looked at twice."""
        between = node.comparators[:-1]
        if not all(map(_is_at_hand, between)):
            return node
        sides = zip([node.left, *between], node.ops, node.comparators, strict=True)
        parts = [ast.copy_location(ast.Compare(left, [op], [right]), node) for left, op, right in sides]
        return ast.copy_location(ast.BoolOp(ast.And(), [self.visit(part) for part in parts]), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Sub):
            return node
        return ast.copy_location(ast.Call(_name("__subtract__"), [node.left, node.right], []), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if _last_name(node.func) in AGREEING:
            node.func, node.args = ast.copy_location(_name("__agree__"), node.func), [node.func, *node.args]
        return node


def _is_at_hand(node: ast.expr) -> bool:
    """Whether a value is there without any code that runs."""
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant | ast.Name)


class _Meant(Transformer):
    """`len` becomes `__builtins__.len`, and `math`, which the tests do not import, `__lent_math__`: the tests run in
    the solution's namespace, where either may be another, and where it is no import of the solution's."""

    def __init__(self, builtin: set[str], lent: Iterable[str]) -> None:
        self._builtin, self._lent = builtin, frozenset(lent)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self._lent:
            return ast.copy_location(_name(lent_name(node.id)), node)
        if node.id not in self._builtin:
            return node
        return ast.copy_location(ast.Attribute(_name("__builtins__"), node.id, ast.Load()), node)


def lent_name(module: str) -> str:
    """By which tests have a module that they do not import."""
    return f"__lent_{module}__"


def _own_builtins(source: str) -> set[str]:
    """The builtins that tests mean by their names. Of one that is called with nothing but data a solution may have its
    own, where the tests ask no function of it beside; and it may have exceptions of any name."""
    nodes, wanted = list(walk(parse(source))), wanted_names(source)
    read = {node.id for node in nodes if isinstance(node, ast.Name)} - {_bound(node) for node in nodes} - {"super"}
    found = {name for name in read if not name.startswith("__") and callable(getattr(builtins, name, None))}
    found = {name for name in found if not _is_exception(getattr(builtins, name))}
    return found if any(name[:1].islower() for name in wanted.names) else found.difference(wanted.other)


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


@memo
def compile_unittest(source: str) -> bytes:
    """A program of unittest tests, its comparisons guarded, marshalled for the jail's interpreter, which is this one.
    Raises SyntaxError."""
    tree = hoisted(parse(source))
    tree.body = [node for node in tree.body if not _starts_tests(node)]
    tree = _Guarded().visit(Paired(loops=True).visit(tree))
    meant = _Meant(_own_builtins(source), unimported_modules(source))
    tree = ast.fix_missing_locations(meant.visit(tree))
    return marshal.dumps(compile(tree, "tests.py", "exec", dont_inherit=True))


@memo
def imported_modules(source: str) -> tuple[str, ...]:
    """What may be a module of those that `source` imports, or takes to be there, and uses, by full name: `numpy` and
    `numpy.testing`, where it has `np.testing.assert_allclose`. Raises SyntaxError."""
    nodes = list(walk(parse(source)))
    bound = unimported_modules(source)
    imported = set(bound.values())
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
            bound |= {alias.asname or top: alias.name if alias.asname else top for alias, top in _tops(node)}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module)
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return tuple(
        sorted(imported | {_place(node.value, bound) for node in nodes if isinstance(node, ast.Attribute)} - {""})
    )


@memo
def own_names(source: str) -> tuple[str, ...]:
    """The names that `source` gives a value at its top level and does not change later. Raises SyntaxError."""
    tree = hoisted(parse(source))
    nodes = list(walk(tree))
    if "globals" in _read(nodes):
        return ()
    changed = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
    symbols = symtable.symtable(ast.unparse(tree), "tests.py", "exec").get_symbols()
    bound = {each.get_name() for each in symbols if each.is_assigned() or each.is_imported()}
    return tuple(sorted(bound - changed))


def unimported_modules(source: str) -> dict[str, str]:
    """The names that `source` uses as modules and does not import, each with the module's full name."""
    return {name: MODULES.get(name, name) for name in wanted_names(source).modules}


def _tops(node: ast.Import) -> list[tuple[ast.alias, str]]:
    return [(alias, alias.name.partition(".")[0]) for alias in node.names]


def _place(node: ast.expr, bound: dict[str, str]) -> str:
    """The full name that a chain of attributes of something imported would have as a module, or ""."""
    if isinstance(node, ast.Attribute):
        place = _place(node.value, bound)
        return place and f"{place}.{node.attr}"
    return bound.get(node.id, "") if isinstance(node, ast.Name) else ""


def _starts_tests(node: ast.stmt) -> bool:
    """Whether a statement of the module is what would run it as a program: unittest.main(), or the block around it."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Compare):
        return "__name__" in (_last_name(node.test.left), _last_name(node.test.comparators[0]))
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) == "unittest.main"


def _set_classes(tree: ast.Module) -> set[str]:
    """Names of what `setattr` is called on."""
    calls = [node for node in walk(tree) if isinstance(node, ast.Call) and node.args]
    return {_last_name(call.args[0]) for call in calls if _last_name(call.func) == "setattr"}


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")


def _is_skipped(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(_last_name(each.func if isinstance(each, ast.Call) else each) == "skip" for each in decorators)


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


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
                    found.append(_at(_call("__over__", *self.inner), statement))
        return found

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before = self.inner
        self.inner = []
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
            node.body.insert(0, _at(_call("__instead__", first, middle, middle, self.count), node))
            node.orelse.insert(0, _at(_call("__instead__", middle, self.count, first, middle), node))
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.inner.append(self.count)
        return self.split(node, "__checked__")

    def split(self, node: ast.Assert, holds: str) -> ast.stmt:
        index = self.count
        self.count += 1
        if isinstance(node.test, ast.Constant) and not node.test.value:
            self.never.append(index)
            return _at(_call("__failed__", index), node)
        body = _call(holds, index, node.test)
        failed = ast.ExceptHandler(type=_name("__Exception__"), name=None, body=[_call("__failed__", index)])
        ended = ast.ExceptHandler(type=None, name=None, body=[_call("__failed__", index), ast.Raise()])
        return _at(ast.Try(body=[body], handlers=[failed, ended], orelse=[], finalbody=[]), node)


def _at(node: ast.stmt, place: ast.stmt) -> ast.stmt:
    return ast.fix_missing_locations(ast.copy_location(node, place))


def _name(name: str) -> ast.Name:
    return ast.Name(id=name, ctx=ast.Load())


def _call(function: str, *arguments: int | ast.expr) -> ast.Expr:
    args = [ast.Constant(each) if isinstance(each, int) else each for each in arguments]
    return ast.Expr(ast.Call(func=_name(function), args=args, keywords=[]))


class _OfSolution(Transformer):
    """`from solution import f as g`, as tests of a program in a file say, becomes `g = f`: in another process there is
    no such module, and what tests do not define is taken from the solution anyway. `from solution import sum` becomes
    `sum = __solution__sum`, since what is named like a builtin is not."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if node.module != "solution" or node.level:
            return node
        pairs = [(each.asname or each.name, own_name(each.name)) for each in node.names]
        given = [ast.Assign([ast.Name(to, ast.Store())], _name(name)) for to, name in pairs if to != name]
        return [_at(each, node) for each in given] or ast.copy_location(ast.Pass(), node)


def own_name(name: str) -> str:
    """By which tests have what they import from the solution."""
    return OF_SOLUTION + name if hasattr(builtins, name) else name


def _tests(source: str) -> ast.Module:
    return _OfSolution().visit(parse(source))


class _Types(Transformer):
    """`type(a)` becomes `__type__(a)`, and `super(a, b)` `__super__(a, b)` (looks.py)."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func.id if isinstance(node.func, ast.Name) and not node.keywords else ""
        if (called, len(node.args)) in (("type", 1), ("super", 2)):
            node.func = ast.copy_location(_name(f"__{called}__"), node.func)
        return node


def split_asserts(source: str) -> tuple[ast.Module, int, tuple[int, ...]]:
    """`source` with every assert replaced by a call of `__passed__(index, test)`, or `__checked__` where it may be run
    again, guarded by `__failed__(index)`; the number of asserts; and those that are `assert False`. Indices follow the
    order of the text. `__over__(*indices)` follows a statement around some, `__instead__(start, stop, start, stop)`
    begins a branch: the indices in it, and those of the other. Raises SyntaxError."""
    tree = hoisted(_tests(source))
    splitter = _Split("" if _calls_itself(tree) else "check")
    return splitter.visit(tree), splitter.count, tuple(splitter.never)


def _calls_itself(tree: ast.Module) -> bool:
    """Whether `check` may be run more than once: it is decorated, a generator, or its name is read."""
    checks = [node for node in walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "check"]
    read = any(isinstance(node, ast.Name) and node.id == "check" for node in walk(tree))
    return read or len(checks) != 1 or bool(checks[0].decorator_list)


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
    return _compiled(hoisted(_tests(source)), "setup.py")


def _compiled(tree: ast.Module, file: str) -> bytes:
    if all(_bound(node) not in ("type", "super") for node in walk(tree)):
        tree = _Types().visit(tree)
    tree = ast.fix_missing_locations(_Guarded().visit(Paired(loops=False).visit(tree)))
    return marshal.dumps(compile(tree, file, "exec", dont_inherit=True))


class Wanted(NamedTuple):
    """What tests read and do not define: names, and of these the modules, which are left out of `names`; `called`, the
    builtin functions one of which the solution may stand for; `compared`, what is compared with what (compared.py); and
    `other`, the builtins of which the solution stands for one where none of the names is its own."""

    names: tuple[str, ...]
    modules: tuple[str, ...]
    called: tuple[str, ...]
    compared: tuple[tuple[Any, ...], ...]
    other: tuple[str, ...] = ()


@memo
def wanted_names(source: str) -> Wanted:
    """What `source` needs from elsewhere. Raises SyntaxError."""
    nodes = list(walk(_tests(source)))
    members, within = _members(nodes)
    read = _read(nodes) - within
    read -= {_bound(node) for node in nodes if id(node) not in members}
    modules = {name for name in read & _used_as_modules(nodes) if name in sys.stdlib_module_names or name in MODULES}
    names = tuple(sorted(name for name in read - modules if not hasattr(builtins, name)))
    other, called = tested_builtins(nodes)
    compared = tuple(map(tuple, pairs(nodes, names, modules)))
    return Wanted(names, tuple(sorted(modules)), called if names else other, compared, other)


def _read(nodes: Iterable[ast.AST]) -> set[str]:
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _members(nodes: list[ast.AST]) -> tuple[set[int], set[str]]:
    """The id() of each node that names a method or an attribute of a class, which is no name outside of it; and those
    of these names that are read within a class, as by `@size.setter`."""
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    body = [each for node in classes for each in node.body]
    named: list[ast.AST] = [each for each in body if isinstance(each, ast.FunctionDef)]
    named += [part for each in body if isinstance(each, ast.Assign | ast.AnnAssign) for part in walk(each)]
    within = _read(part for node in classes for part in walk(node))
    return set(map(id, named)), set(map(_bound, named)) & within


def _used_as_modules(nodes: list[ast.AST]) -> set[str]:
    used = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    return used.difference(plainly_called(nodes))


def _bound(node: ast.AST) -> str:
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
