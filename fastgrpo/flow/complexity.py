"""How much structure a workflow has: the reward's second term, from its syntax tree and from what the host served.

    text = sum over operators' weights + 0.5 x control flow + 0.02 x nodes
    served = sum over operators' weights                                    of the calls that reached the host
    raw = max(text, served),  complexity = raw / (raw + 8)                  in [0, 1), monotone in raw

Weights: an operator 1; `test` 1 + 0.5 for each retry. In the text an operator counts once where it is named, both
branches of an `if` count, and what a function, a lambda or another name stands for counts wherever that is named. Loops
are control flow and are not multiplied: one that may stop at its first pass costs what it costs at run time. The calls
are the account of the host, so calls that the text hides (`exec`, `globals()`, frames) count all the same.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Mapping, Sequence

from fastgrpo.flow.names import DEFAULT_RETRIES, OPERATORS, meanings, written_retries
from fastgrpo.flow.types import WorkerCall

_RETRY = 0.5
_WEIGHTS = dict.fromkeys(OPERATORS, 1.0) | {"test": 1 + _RETRY * DEFAULT_RETRIES}
_HALF = 8.0
_CONTROL = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.comprehension)
# Names that stand for names are followed so far; what one name stands for weighs at most so much.
_DEEPEST = 8
_MOST = 64.0


def complexity(tree: ast.AST, calls: Sequence[WorkerCall] = ()) -> float:
    """Complexity in [0, 1) of a workflow with this tree, which made these calls: 0.13 for a single generate."""
    nodes = list(ast.walk(tree))
    control = sum(isinstance(node, _CONTROL) for node in nodes)
    text = _named_operators(tree) + 0.5 * control + 0.02 * len(nodes)
    served = sum(1 + _RETRY * call.retries for call in calls)
    raw = max(text, served)
    return raw / (raw + _HALF)


def _named_operators(tree: ast.AST) -> float:
    """Weighted mentions of operators, by whatever name."""
    named = meanings(tree)
    nodes = [*ast.walk(tree)][::-1]  # parts before what they are parts of
    weights = dict(_WEIGHTS)
    for _ in range(_DEEPEST):
        before, weights = weights, dict(_WEIGHTS)
        mentions = _mentions(nodes, before)
        for names, codes in named:
            weight = min(max(sum(mentions[part] for part in code) for code in codes), _MOST)
            weights |= {name: max(weights.get(name, 0), weight) for name in names}
        if weights == before:
            break
    # What has a name counts where it is named; `workflow` itself is called from outside.
    elsewhere = {part for names, codes in named if names != ["workflow"] for code in codes for part in code}
    return _mentions(nodes, weights, elsewhere)[tree]


def _mentions(
    nodes: Sequence[ast.AST], weights: Mapping[str, float], elsewhere: Container[ast.AST] = ()
) -> dict[ast.AST, float]:
    """The weight of each of `nodes`, which come after their parts, with all its parts: each is looked at once."""
    found: dict[ast.AST, float] = {}
    for node in nodes:
        parts = sum(found[part] for part in ast.iter_child_nodes(node))
        found[node] = 0.0 if node in elsewhere else _weight(node, weights) + parts
    return found


def _weight(node: ast.AST, weights: Mapping[str, float]) -> float:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return weights.get(node.id, 0)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "test":
        return _RETRY * (written_retries(node) - DEFAULT_RETRIES)
    return 0
