"""Tests that zip an answer with a list of what is wanted: of an empty answer nothing would be compared."""

from __future__ import annotations

import ast
from collections import Counter
from typing import Any

from .syntax import Transformer, call, walk


class Paired(Transformer):
    """`zip(f(1), [2, 3])` becomes `zip(__some__(f(1)), [2, 3])` (arrays.py), where it is made once, and the list that
    is written there, or was given a name for this alone, says what there is to be. `loops` are not such where an
    assertion that never runs has failed anyway."""

    def __init__(self, loops: bool) -> None:
        self._loops = loops
        self._once = True
        self._lists: set[str] = set()

    def visit_Module(self, node: ast.Module) -> ast.AST:
        self._lists = _lists_for_once(node)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before = self._once, self._lists
        self._once, self._lists = self._once and _is_run_once(node), _lists_for_once(node)
        self.generic_visit(node)
        self._once, self._lists = before
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        if self._loops:
            node.iter = self.visit(node.iter)
        return self._again(node, "body", "orelse")

    visit_AsyncFunctionDef, visit_AsyncFor = visit_FunctionDef, visit_For  # type: ignore[assignment]

    def visit_While(self, node: ast.While) -> ast.AST:
        return self._again(node, "test", "body", "orelse")

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._again(node, "body")

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.AST:
        first = node.generators[0]
        first.iter = self.visit(first.iter)
        return self._again(node, "elt", "key", "value")

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp  # type: ignore[assignment]

    def _again(self, node: Any, *fields: str) -> Any:
        """The node, these fields of which may be run many times."""
        before, self._once = self._once, False
        for field in fields:
            value = getattr(node, field, None)
            for each in value if isinstance(value, list) else [value] if value else []:
                self.visit(each)
        self._once = before
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self._once and isinstance(node.func, ast.Name) and node.func.id == "zip" and not node.keywords:
            wanted = [self._is_wanted(each) for each in node.args]
            if any(wanted):
                node.args = [each if said else self._some(each) for each, said in zip(node.args, wanted, strict=True)]
        return node

    def _is_wanted(self, node: ast.expr) -> bool:
        return _is_list(node) or (isinstance(node, ast.Name) and node.id in self._lists)

    def _some(self, node: ast.expr) -> ast.expr:
        return node if isinstance(node, ast.Starred) else call("__some__", node, at=node)


def _is_run_once(node: ast.FunctionDef) -> bool:
    """Whether a function is one of tests, which no argument makes another each time."""
    given = [each.arg for each in node.args.args if each.arg != "self"]
    mocks = all("patch" in ast.unparse(each) for each in node.decorator_list)
    return node.name == "check" or (
        node.name.startswith("test") and (not given or (mocks and node.decorator_list != []))
    )


def _is_list(node: ast.AST | None) -> bool:
    return isinstance(node, ast.List | ast.Tuple) and any(not isinstance(each, ast.Starred) for each in node.elts)


def _lists_for_once(scope: ast.AST) -> set[str]:
    """The names that are given a list with something in it once, and read once."""
    names = Counter((node.id, type(node.ctx)) for node in walk(scope) if isinstance(node, ast.Name))
    given = [node for node in walk(scope) if isinstance(node, ast.Assign) and _is_list(node.value)]
    found = {node.targets[0].id for node in given if isinstance(node.targets[0], ast.Name)}
    return {name for name in found if names[name, ast.Store] == names[name, ast.Load] == 1}
