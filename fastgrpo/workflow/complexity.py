"""How much structure a workflow has, from its syntax tree alone: the reward's second term.

    raw = sum over mentions of operators (weight x repetitions) + 0.5 x control flow + 0.02 x nodes
    complexity = raw / (raw + 8)                                                        in [0, 1), monotone in raw

Weights: an operator 1; `test` 1 + 0.5 for each retry. Repetitions: the length of the literal or `range(n)` that a loop
or comprehension runs over (at most 8), 3 where it is unknown. An operator counts where it is named, so an alias is
not free; both branches of an `if` count.
"""

from __future__ import annotations

import ast

OPERATORS = ("generate", "custom", "review", "revise", "ensemble", "test")
DEFAULT_RETRIES = 2

_HALF = 8.0
_UNKNOWN_REPETITIONS = 3
_MOST_REPETITIONS = 8
_CONTROL = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.comprehension)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


def complexity(tree: ast.AST) -> float:
    """Complexity of a workflow's tree in [0, 1): 0.15 for a single generate, about 0.5 for three, a vote and a test."""
    nodes = list(ast.walk(tree))
    control = sum(isinstance(node, _CONTROL) for node in nodes)
    raw = _operators(tree, 1) + 0.5 * control + 0.02 * len(nodes)
    return raw / (raw + _HALF)


def _operators(node: ast.AST, repetitions: int) -> float:
    """Weighted mentions of operators under `node`, each times the repetitions of the loops around it."""
    own = repetitions * _weight(node)
    return own + sum(_operators(child, repetitions * factor) for child, factor in _children(node))


def _weight(node: ast.AST) -> float:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in OPERATORS:
        return 1 + 0.5 * DEFAULT_RETRIES if node.id == "test" else 1
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
    return [(child, 1) for child in children]


def _length(iterated: ast.expr) -> int:
    """How many items a loop runs over, between 1 and 8, as far as it is written in the code."""
    length = _UNKNOWN_REPETITIONS
    if isinstance(iterated, ast.List | ast.Tuple | ast.Set):
        length = len(iterated.elts)
    elif isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name) and iterated.func.id == "range":
        values = [argument.value for argument in iterated.args if isinstance(argument, ast.Constant)]
        bounds = [value for value in values if isinstance(value, int) and abs(value) < 1000]
        if len(bounds) == len(iterated.args) and 1 <= len(bounds) <= 3 and bounds[2:] != [0]:
            length = len(range(*bounds))
    return max(1, min(length, _MOST_REPETITIONS))
