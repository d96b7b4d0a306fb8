"""The canonical structure of a workflow: which operators it calls under which control flow, and nothing else.

    for _ in range(4): ... generate ... test ... if passed: return    becomes    until(generate test)

Names, texts, numbers and layout do not show, nor does code that cannot run or calls no operator; helpers and other
names of operators are followed. `until` is a loop that may end early, `loop` one that does not, `each` a comprehension,
`test*` a test that retries, `generate@small` a call with a worker of its own.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastgrpo.flow.names import OPERATORS, Function, meanings, written_retries

# Code behind names is followed so deep and so often: it may be hostile.
_DEEPEST = 6
_FOLLOWED = 64
_JUMPS = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_LEAVES = (ast.Return, ast.Break)


class Form(NamedTuple):
    """An operator, or control flow over further forms."""

    label: str
    inner: tuple[Form, ...] = ()

    def __str__(self) -> str:
        return f"{self.label}({' '.join(map(str, self.inner))})" if self.inner else self.label


def structure_of(tree: ast.AST) -> str:
    """The structure in one line, equal for equal structures; empty without any operator."""
    return " ".join(map(str, _forms_of(tree)))


def substructures(tree: ast.AST) -> Counter[str]:
    """Every form of the structure, with its multiplicity."""
    return Counter(str(form) for form in _all(_forms_of(tree)))


def _all(forms: Sequence[Form]) -> Iterator[Form]:
    for form in forms:
        yield form
        yield from _all(form.inner)


def _forms_of(tree: ast.AST) -> list[Form]:
    functions = [node for node in ast.iter_child_nodes(tree) if isinstance(node, Function) and node.name == "workflow"]
    return _Reader(tree).block(functions[-1].body) if functions else []


class _Reader:
    """Reads code into forms, in the order of evaluation."""

    def __init__(self, tree: ast.AST) -> None:
        self._meanings: dict[str, list[list[ast.AST]]] = {}
        for name, code in meanings(tree):
            self._meanings.setdefault(name, []).append(code)
        self._elsewhere = {part for known in self._meanings.values() for code in known for part in code}
        self._open: list[str] = []
        self._left = _FOLLOWED

    def block(self, code: Sequence[ast.AST]) -> list[Form]:
        """The forms of statements, as far as they can be reached."""
        return [form for node in _reached(code) for form in self.read(node)]

    def read(self, node: ast.AST) -> list[Form]:
        """The forms of one statement or expression."""
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                return [Form(name)] if name in OPERATORS else self._named(name)
            case ast.Call(func=ast.Name(id=name)) if name in OPERATORS:
                return [*self._each(node.args), *self._each(node.keywords), Form(name + _mark(name, node))]
            case ast.If(test=test) | ast.IfExp(test=test):
                return self.read(test) + self._branches(node)
            case ast.For(iter=iterated) | ast.AsyncFor(iter=iterated):
                return self.read(iterated) + self._loop(node) + self.block(node.orelse)
            case ast.While(test=test):
                return self._loop(node, self.read(test)) + self.block(node.orelse)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return _wrapped("each", self._each(ast.iter_child_nodes(node)))
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.arguments():
                return []  # counts where it is named
            case ast.Try():
                handlers = [statement for handler in node.handlers for statement in handler.body]
                return [
                    form for part in (node.body, handlers, node.orelse, node.finalbody) for form in self.block(part)
                ]
            case ast.With() | ast.AsyncWith():
                return self._each(node.items) + self.block(node.body)
        return self._each(ast.iter_child_nodes(node))

    def _each(self, nodes: Sequence[ast.AST] | Iterator[ast.AST]) -> list[Form]:
        """The forms of several nodes; what has a name counts where it is named."""
        return [form for node in nodes if node not in self._elsewhere for form in self.read(node)]

    def _named(self, name: str) -> list[Form]:
        """What a name stands for: of several meanings, the largest."""
        known = self._meanings.get(name, [])
        if not known or name in self._open or len(self._open) >= _DEEPEST or self._left <= 0:
            return []
        self._left -= 1
        self._open.append(name)
        found = max((self.block(code) for code in known), key=lambda forms: sum(1 for _ in _all(forms)))
        self._open.pop()
        return found

    def _branches(self, node: ast.If | ast.IfExp) -> list[Form]:
        taken, other = ([part] if isinstance(part, ast.AST) else part for part in (node.body, node.orelse))
        if isinstance(node.test, ast.Constant):
            return self.block(taken if node.test.value else other)
        return _wrapped("if", [*self.block(taken), *_wrapped("else", self.block(other))])

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While, test: Sequence[Form] = ()) -> list[Form]:
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant) and not node.test.value:
            return []
        body = [*test, *self.block(node.body)]
        if isinstance(node.body[-1], _LEAVES):  # runs once
            return body
        ends = isinstance(node, ast.While) or any(_may_leave(statement) for statement in _reached(node.body))
        return _wrapped("until" if ends else "loop", body)


def _wrapped(label: str, inner: Sequence[Form]) -> list[Form]:
    """Control flow without any operator is none."""
    return [Form(label, tuple(inner))] if inner else []


def _reached(code: Sequence[ast.AST]) -> list[ast.AST]:
    """Statements up to the first that leaves the block."""
    end = next((index for index, node in enumerate(code, 1) if isinstance(node, _JUMPS)), len(code))
    return list(code[:end])


def _may_leave(statement: ast.AST) -> bool:
    return isinstance(statement, ast.If) and any(isinstance(node, _LEAVES) for node in ast.walk(statement))


def _mark(name: str, call: ast.Call) -> str:
    """What of a call's arguments is structure: whether a test retries, and the worker."""
    retries = "*" if name == "test" and written_retries(call) else ""
    workers = [keyword.value for keyword in call.keywords if keyword.arg == "worker"]
    names = [value.value for value in workers if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return retries + "".join(f"@{name[:20]}" for name in names)
