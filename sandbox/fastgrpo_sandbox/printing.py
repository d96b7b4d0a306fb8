"""Tests that print what they find and raise nothing: whatever defines what they call would pass."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator

from fastgrpo_sandbox.guest.names import bound_name
from fastgrpo_sandbox.source_text import starters
from fastgrpo_sandbox.types import NoTestError

# Builtins and methods that raise for no value of a solution's that could be looked at at all. Whatever is called beside
# these, from another module say, may be what asserts.
_BUILTINS = (
    *("abs", "all", "any", "bool", "callable", "hasattr", "hash", "isinstance", "len", "max", "min", "round", "sum"),
    *("dict", "enumerate", "filter", "format", "list", "map", "print", "range", "repr", "reversed", "set", "sorted"),
    *("str", "tuple", "type", "zip"),
)
_RAISING = frozenset({"index", "remove", "pop", "popitem"})
# Whose functions raise for what is no number, or no container, at most.
_MODULES = frozenset({"collections", "logging", "math", "pprint", "random", "time", "traceback", "typing"})
_PRINTS = frozenset({"print", "pprint", "pprint.pprint", "sys.stdout.write", "sys.stderr.write"})
_PRINTS |= {f"logging.{level}" for level in ("debug", "info", "warning", "error", "critical", "exception")}
_MAY_FAIL = (ast.Assert, ast.Raise, ast.Delete, ast.With, ast.AsyncWith, ast.Await, ast.Match)
_DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def refuse_prints(tree: ast.Module) -> None:
    """Raises NoTestError for a program that prints and has nothing that fails by what the solution answers.

    One that calls the solution and prints nothing is a test that it does not raise.
    """
    nodes = list(_evaluated(tree))
    if any(isinstance(node, _MAY_FAIL) for node in nodes):
        return
    calls = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    called = {place: ast.unparse(call.func) for place, call in calls.items()}
    if _PRINTS.isdisjoint(called.values()):
        return
    bound = {bound_name(node) for node in nodes if isinstance(node, _DEFINED)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    foreign = {bound_name(each) for node in imports for each in node.names if not _is_known(node, each)}
    loops = [node for node in nodes if isinstance(node, ast.For | ast.comprehension)]
    counted = {part.id for loop in loops for part in ast.walk(loop.target) if isinstance(part, ast.Name)}
    asked = calls.keys() | {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    handed = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in asked}  # to who knows whom
    if any(_may_fail(node, counted) for node in nodes) or handed & foreign:
        return
    harmless = starters(tree) | _PRINTS
    others = [call for place, call in calls.items() if called[place] not in harmless]
    if all(_raises_nothing(call, bound, foreign) for call in others):
        raise NoTestError("the tests only print what they find: whatever defines what they call would pass")


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


def _is_known(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> bool:
    """Whether something imported is the solution's, or of a module that only looks."""
    module = alias.name if isinstance(node, ast.Import) else node.module
    return module == "solution" or module in _MODULES


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


def _raises_nothing(call: ast.Call, defined: set[str], foreign: set[str]) -> bool:
    """Whether a call is of the solution, of the tests' own functions, or of a builtin that only looks."""
    function = call.func
    if isinstance(function, ast.Name):
        name = function.id
        return name in defined or name in _BUILTINS or not (hasattr(builtins, name) or name in foreign)
    if isinstance(function, ast.Attribute) and function.attr not in _RAISING:
        root = ast.unparse(function).partition(".")[0].partition("(")[0]
        return root not in foreign and root not in ("self", "cls")
    return False
