"""Tests that print what they find and raise nothing: whatever defines what they call would pass."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator

from fastgrpo_sandbox.guest.names import bound_name
from fastgrpo_sandbox.types import NoTestError

# Builtins and methods that raise for no value of a solution's that could be looked at at all. Whatever is called beside
# these, from another module say, may be what asserts.
_BUILTINS = (
    *("abs", "all", "any", "bool", "callable", "hasattr", "hash", "isinstance", "len", "max", "min", "round", "sum"),
    *("dict", "enumerate", "filter", "format", "frozenset", "id", "iter", "list", "map", "open", "print", "range"),
    *("repr", "reversed", "set", "sorted", "str", "super", "tuple", "type", "zip"),
)
_RAISING = frozenset({"index", "remove", "pop", "popitem", "testing", "wait_for", "timeout"})
_TO_LOOK = (
    *("asyncio.gather", "asyncio.run", "asyncio.sleep", "collections", "contextlib", "copy", "dataclasses"),
    *("datetime.date", "datetime.datetime.now", "datetime.timedelta", "decimal.Decimal", "fractions.Fraction"),
    *("functools", "io", "IPython.display", "itertools", "json.dump", "json.dumps", "logging", "math", "numpy"),
    *("os.linesep", "os.path.basename", "os.path.join", "pandas", "pprint", "random", "re.findall", "re.fullmatch"),
    *("re.match", "re.search", "re.sub", "rich", "solution", "string", "sys.getsizeof", "sys.maxsize"),
    *("sys.setrecursionlimit", "sys.stderr", "sys.stdout", "tabulate", "textwrap", "time", "timeit", "tqdm"),
    *("traceback", "typing", "unittest.mock", "unittest.main", "unittest.TestCase", "pytest.main", "warnings"),
)  # modules, and what is in them, that raise for what is no number, or no container, at most
_PRINTS = (
    *("print", "IPython.display", "json.dump", "pprint", "rich", "sys.stderr", "sys.stdout", "traceback.print_exc"),
    *("tqdm.tqdm.write", "warnings.warn"),
)
_LEVELS = ("debug", "info", "warning", "error", "critical", "exception", "log")  # of logging
_ENTERED = ("contextlib", "io", "open", "self.subTest", "unittest.mock", "warnings.catch_warnings")
_MAY_FAIL = (ast.Assert, ast.Raise, ast.Delete, ast.AsyncWith)
_DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def refuse_prints(tree: ast.Module) -> None:
    """Raises NoTestError for a program that prints and has nothing that fails by what the solution answers.

    One that calls the solution and prints nothing is a test that it does not raise.
    """
    nodes = list(_evaluated(tree))
    if any(isinstance(node, _MAY_FAIL) for node in nodes):
        return
    names = _Names(nodes)
    if not any(map(names.prints, nodes)):
        return
    loops = [node for node in nodes if isinstance(node, ast.For | ast.comprehension)]
    counted = {part.id for loop in loops for part in ast.walk(loop.target) if isinstance(part, ast.Name)}
    if not any(_may_fail(node, counted) or names.may_fail(node) for node in nodes):
        raise NoTestError("the tests only print what they find: whatever defines what they call would pass")


class _Names:
    """What the names of a program are: of modules, by their full names, or its own."""

    def __init__(self, nodes: list[ast.AST]) -> None:
        self._own = {bound_name(node) for node in nodes if isinstance(node, _DEFINED)}
        self._full: dict[str, str] = {}
        for node in nodes:
            if isinstance(node, ast.Import):
                self._full |= {bound_name(each): each.name if each.asname else bound_name(each) for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                self._full |= {bound_name(each): f"{node.module}.{each.name}" for each in node.names}
        self._imported = frozenset(self._full)
        for node in nodes:  # as by `log = logging.getLogger()`
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if name not in self._own:
                    place = self.place(value)
                    if place == "print" or place.partition(".")[0] in self._modules:
                        self._full[name] = place
        asked = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        self._asked = asked | {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}

    @property
    def _modules(self) -> set[str]:
        return {self._full[name].partition(".")[0] for name in self._imported}

    def place(self, node: ast.AST) -> str:
        """`logging.getLogger.info` of `log.info`; "" of what has no name."""
        match node:
            case ast.Name(id=name):
                return self._full.get(name, name)
            case ast.Attribute(value=value, attr=attr):
                return f"{self.place(value)}.{attr}"
            case ast.Call(func=function):
                return self.place(function)
        return ""

    def prints(self, node: ast.AST) -> bool:
        """Whether a node is what prints."""
        if not isinstance(node, ast.Name | ast.Attribute):
            return False
        place = self.place(node)
        is_log = place.startswith("logging.") and place.rpartition(".")[2] in _LEVELS
        return place not in self._own and (is_log or _is_in(place, _PRINTS))

    def may_fail(self, node: ast.AST) -> bool:
        """Whether a node calls, enters or hands on what may fail by the value of an answer."""
        match node:
            case ast.Attribute(attr=attr) if attr.startswith("assert"):
                return True
            case ast.Call():
                return not self._raises_nothing(node.func)
            case ast.withitem(context_expr=entered):
                return not _is_in(self.place(entered), _ENTERED)
            case ast.Name(id=name) if name in self._imported and id(node) not in self._asked:  # to who knows whom
                return not _only_looks(self._full[name])
        return False

    def _raises_nothing(self, function: ast.expr) -> bool:
        """Whether what is called is the solution's, the tests' own, or only looks."""
        place = self.place(function)
        root, _, rest = place.partition(".")
        if root in self._modules:
            return _only_looks(place)
        if isinstance(function, ast.Name):
            return root in self._own or root in _BUILTINS or not hasattr(builtins, root)
        if root in ("self", "cls"):
            return rest in self._own or rest in ("subTest", "id", "addCleanup")
        return isinstance(function, ast.Attribute) and not _may_raise(rest)


def _only_looks(place: str) -> bool:
    return _is_in(place, _TO_LOOK) and not _may_raise(place)


def _is_in(place: str, modules: tuple[str, ...]) -> bool:
    return any(place == module or place.startswith(f"{module}.") for module in modules)


def _may_raise(place: str) -> bool:
    return any(part in _RAISING or part.startswith("assert") for part in place.split("."))


def _evaluated(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes but those of annotations."""
    waiting = [tree]
    while waiting:
        yield (node := waiting.pop())
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                waiting += [
                    each for each in (value if isinstance(value, list) else [value]) if isinstance(each, ast.AST)
                ]


def _may_fail(node: ast.AST, counted: set[str]) -> bool:
    """Whether an expression may fail by the value of an answer: a key that is not there, another number of items, a
    division by what does not hold."""
    match node:
        case ast.Subscript(slice=ast.Constant() | ast.Slice() | ast.UnaryOp(operand=ast.Constant())):
            return False
        case ast.Subscript(slice=ast.Name(id=name)):
            return name not in counted
        case ast.Subscript():
            return True
        case ast.Assign(targets=[ast.Tuple() | ast.List(), *_], value=value):
            return not isinstance(value, ast.Tuple | ast.List)
        case ast.For(target=ast.Tuple(), iter=ast.Call(func=ast.Name(id=name))):
            return name not in _BUILTINS
        case ast.BinOp(op=ast.Div() | ast.FloorDiv() | ast.Mod(), right=right):
            return any(isinstance(part, ast.Compare | ast.BoolOp) for part in ast.walk(right))
    return False
