"""The canonical structure of a workflow: which operators it calls under which control flow, and nothing else.

    for _ in range(4): ... generate ... test ... if passed: return    becomes    until(generate test)

Names, texts, numbers and layout do not show, nor does code that cannot run or calls no operator; helpers and other
names of operators are followed. `until` is a loop that may end early, `loop` one that does not, `each` a comprehension,
`test*` a test that retries, `generate@small` a call with a worker of its own.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from fastgrpo.flow.names import OPERATORS, Function, meanings, written_retries

# Code behind names is followed for so many nodes, and from no more levels of nodes than this: it may be hostile.
_FOLLOWED = 10_000
_DEEPEST = 60
_JUMPS = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_LEAVES = (ast.Return, ast.Break)


class Form(NamedTuple):
    """An operator, or control flow over further forms, as it is written in a structure."""

    text: str
    inner: tuple[Form, ...] = ()


def structure_of(tree: ast.AST) -> str:
    """The structure in one line, equal for equal structures; empty without any operator."""
    return _in_line(_forms_of(tree))


def substructures(tree: ast.AST) -> Counter[str]:
    """Every form of the structure, with its multiplicity."""
    return Counter(form.text for form in _all(_forms_of(tree)))


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
        self._meanings: dict[str, list[list[list[ast.AST]]]] = {}
        for names, codes in (named := meanings(tree)):
            for name in names:
                self._meanings.setdefault(name, []).append(codes)
        self._elsewhere = {part for _, codes in named for code in codes for part in code}
        self._leaving = _leaving(tree)
        self._open: list[str] = []
        self._level = 0
        self._left = _FOLLOWED

    def block(self, code: Sequence[ast.AST]) -> list[Form]:
        """The forms of statements, as far as they can be reached."""
        return self._in_order(_reached(code))

    def read(self, node: ast.AST) -> list[Form]:
        """The forms of one statement or expression."""
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                return [Form(name)] if name in OPERATORS else self._named(name)
            case ast.Call(func=ast.Name(id=name)) if name in OPERATORS:
                return [*self._each(node.args), *self._each(node.keywords), Form(name + _mark(name, node))]
            case ast.If(test=test) | ast.IfExp(test=test):
                return self._each([test]) + self._branches(node)
            case ast.For(iter=iterated) | ast.AsyncFor(iter=iterated):
                return self._each([iterated]) + self._loop(node) + self.block(node.orelse)
            case ast.While(test=test):
                return self._loop(node, self._each([test])) + self.block(node.orelse)
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

    def _each(self, nodes: Iterable[ast.AST]) -> list[Form]:
        """The forms of several nodes; what has a name counts where it is named."""
        return self._in_order(nodes, self._elsewhere)

    def _in_order(self, nodes: Iterable[ast.AST], elsewhere: Container[ast.AST] = ()) -> list[Form]:
        forms = []
        self._level += 1
        for node in nodes:
            self._left -= 1
            if node not in elsewhere:
                forms += self.read(node)
        self._level -= 1
        return forms

    def _named(self, name: str) -> list[Form]:
        """What a name stands for: of several meanings, the largest."""
        if name in self._open or self._level > _DEEPEST:
            return []
        self._open.append(name)
        known = (code for codes in self._meanings.get(name, []) for code in codes)
        read = (self.block(code) for code in known if self._left > 0)
        found = max(read, key=lambda forms: sum(1 for _ in _all(forms)), default=[])
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
        ends = isinstance(node, ast.While) or not self._leaving.isdisjoint(_reached(node.body))
        return _wrapped("until" if ends else "loop", body)


def _wrapped(label: str, inner: Sequence[Form]) -> list[Form]:
    """Control flow without any operator is none."""
    return [Form(f"{label}({_in_line(inner)})", tuple(inner))] if inner else []


def _in_line(forms: Iterable[Form]) -> str:
    return " ".join(form.text for form in forms)


def _reached(code: Sequence[ast.AST]) -> list[ast.AST]:
    """Statements up to the first that leaves the block."""
    end = next((index for index, node in enumerate(code, 1) if isinstance(node, _JUMPS)), len(code))
    return list(code[:end])


def _leaving(tree: ast.AST) -> set[ast.AST]:
    """Every `if` in which a loop may end."""
    holders: set[ast.AST] = set()
    for node in [*ast.walk(tree)][::-1]:  # parts before what they are parts of
        if isinstance(node, _LEAVES) or not holders.isdisjoint(ast.iter_child_nodes(node)):
            holders.add(node)
    return {node for node in holders if isinstance(node, ast.If)}


def _mark(name: str, call: ast.Call) -> str:
    """What of a call's arguments is structure: whether a test retries, and the worker."""
    retries = "*" if name == "test" and written_retries(call) else ""
    workers = [keyword.value for keyword in call.keywords if keyword.arg == "worker"]
    names = [value.value for value in workers if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return retries + "".join(f"@{name[:20]}" for name in names)
