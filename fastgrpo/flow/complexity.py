"""How much structure a workflow has, from its syntax tree alone: the reward's second term.

    raw = sum over mentions of operators (weight x repetitions) + 0.5 x control flow + 0.02 x nodes
    complexity = raw / (raw + 8)                                                        in [0, 1), monotone in raw

Weights: an operator 1; `test` 1 + 0.5 for each retry. Repetitions: the length of the literal or `range(n)` that a loop,
a comprehension or `map` runs over, or the factor of `[...] * n` (at most 8), 3 where it is unknown. An operator counts
where it is named, both branches of an `if` count, and what a function, a lambda or another name stands for counts
wherever that is named (recursion eight times); what is handed to a call, which may call it, three times. So calls are
hard to hide.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Mapping

OPERATORS = ("generate", "custom", "review", "revise", "ensemble", "test")
DEFAULT_RETRIES = 2

_WEIGHTS = dict.fromkeys(OPERATORS, 1.0) | {"test": 1 + 0.5 * DEFAULT_RETRIES}
_HALF = 8.0
_UNKNOWN_REPETITIONS = 3
_MOST_REPETITIONS = 8
_CONTROL = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.comprehension)
_CODE = (ast.Name, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


def complexity(tree: ast.AST) -> float:
    """Complexity of a workflow's tree in [0, 1): 0.15 for a single generate, about 0.5 for three, a vote and a test."""
    nodes = list(ast.walk(tree))
    control = sum(isinstance(node, _CONTROL) for node in nodes)
    raw = _named_operators(tree, nodes) + 0.5 * control + 0.02 * len(nodes)
    return raw / (raw + _HALF)


def _named_operators(tree: ast.AST, nodes: list[ast.AST]) -> float:
    """Weighted mentions of operators, by whatever name."""
    mentioned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    meanings = [(name, value) for node in nodes for name, value in _bound(node) if name in mentioned]
    weights = dict(_WEIGHTS)
    for _ in range(_MOST_REPETITIONS):
        before, weights = weights, dict(_WEIGHTS)
        for name, value in meanings:
            weights[name] = max(weights.get(name, 0), sum(_operators(part, 1, before) for part in value))
        if weights == before:
            break
    # What has a name counts where it is named; `workflow` itself is called from outside.
    elsewhere = {part for name, value in meanings for part in value if name != "workflow"}
    return _operators(tree, 1, weights, elsewhere)


def _bound(node: ast.AST) -> list[tuple[str, list[ast.AST]]]:
    """A name that stands for code from here on, and that code."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [(node.name, list(node.body))]
    if isinstance(node, ast.Assign | ast.NamedExpr) and _is_code(node.value):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [(target.id, [node.value]) for target in targets if isinstance(target, ast.Name)]
    return []


def _is_code(value: ast.expr) -> bool:
    return isinstance(value, _CODE) or (isinstance(value, ast.Call) and _name(value.func) == "partial")


def _operators(
    node: ast.AST, repetitions: int, weights: Mapping[str, float], elsewhere: Container[ast.AST] = ()
) -> float:
    """Weighted mentions of operators under `node`, each times the repetitions of the loops around it."""
    if node in elsewhere:
        return 0.0
    own = repetitions * _weight(node, weights)
    return own + sum(_operators(child, repetitions * n, weights, elsewhere) for child, n in _children(node))


def _weight(node: ast.AST, weights: Mapping[str, float]) -> float:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return weights.get(node.id, 0)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "test":
        return 0.5 * (_retries(node) - DEFAULT_RETRIES)
    return 0


def _retries(call: ast.Call) -> int:
    """The retries of a `test` call as written; the default where they are not a literal."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "retries"] + call.args[2:3]
    value = given[0].value if given and isinstance(given[0], ast.Constant) else DEFAULT_RETRIES
    return max(0, min(value, _MOST_REPETITIONS)) if type(value) is int else DEFAULT_RETRIES


def _children(node: ast.AST) -> list[tuple[ast.AST, int]]:
    """(child, times it runs for one run of `node`)."""
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.While):
        return [(child, _UNKNOWN_REPETITIONS) for child in children]
    if isinstance(node, ast.For | ast.AsyncFor):
        times = _length(node.iter)
        return [(child, times if child in node.body else 1) for child in children]
    if isinstance(node, _COMPREHENSIONS):
        times = 1
        for generator in node.generators:
            times = min(_MOST_REPETITIONS, times * _length(generator.iter))
        return [(child, 1 if isinstance(child, ast.comprehension) else times) for child in children]
    if isinstance(node, ast.Call):
        return [(child, _calls(node) if child in node.args and isinstance(child, _CODE) else 1) for child in children]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        factors = dict[ast.AST, int](_multiplied(node))
        return [(child, factors.get(child, 1)) for child in children]
    return [(child, 1) for child in children]


def _calls(call: ast.Call) -> int:
    """How often what is called may call the code that it is given."""
    name = _name(call.func)
    if name == "partial":
        return 1
    return _REPEATING[name](call.args[1]) if name in _REPEATING and len(call.args) > 1 else _UNKNOWN_REPETITIONS


def _length(iterated: ast.expr) -> int:
    """How many items a loop runs over, between 1 and 8, as far as it is written in the code."""
    length = _UNKNOWN_REPETITIONS
    if isinstance(iterated, ast.List | ast.Tuple | ast.Set):
        length = len(iterated.elts)
    elif isinstance(iterated, ast.BinOp) and isinstance(iterated.op, ast.Mult):
        length = max((n * len(side.elts) for side, n in _multiplied(iterated)), default=length)
    elif isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name) and iterated.func.id == "range":
        values = [argument.value for argument in iterated.args if isinstance(argument, ast.Constant)]
        bounds = [value for value in values if isinstance(value, int) and abs(value) < 1000]
        if len(bounds) == len(iterated.args) and 1 <= len(bounds) <= 3 and bounds[2:] != [0]:
            length = len(range(*bounds))
    return max(1, min(length, _MOST_REPETITIONS))


def _multiplied(product: ast.BinOp) -> list[tuple[ast.List | ast.Tuple, int]]:
    """The list or tuple among the factors, and how often it is repeated."""
    factors = (product.left, product.right), (product.right, product.left)
    return [(side, _count(other)) for side, other in factors if isinstance(side, ast.List | ast.Tuple)]


def _count(factor: ast.expr) -> int:
    """How often something is repeated, between 1 and 8, as far as it is written in the code."""
    value = factor.value if isinstance(factor, ast.Constant) else None
    return max(1, min(value, _MOST_REPETITIONS)) if type(value) is int else _UNKNOWN_REPETITIONS


def _name(function: ast.expr) -> str:
    """The last part of what is called."""
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


# What calls or yields its first argument as often as its second one says.
_REPEATING = {"map": _length, "starmap": _length, "repeat": _count}
