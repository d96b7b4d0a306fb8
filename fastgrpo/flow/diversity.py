"""How distinct a workflow is within its group: the reward's third term, against a group's collapse to copies."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence

from fastgrpo.flow.complexity import OPERATORS

# Texts of instructions and names of variables are free to change, so they make no workflow distinct.
_ANONYMOUS = "_"
_NAMING = (ast.Attribute, ast.keyword)


def distinctness(trees: Sequence[ast.AST | None]) -> list[float]:
    """For each tree, its distance in [0, 1] to the nearest other one; 0 for a copy, for None and for a lone tree.

    Distance is 1 - the weighted Jaccard similarity of the multisets of all subtrees, with variables renamed, texts
    blanked and docstrings dropped.
    """
    bags = [None if tree is None else _subtrees(tree) for tree in trees]
    return [
        0.0
        if bag is None
        else min((_distance(bag, other) for j, other in enumerate(bags) if other is not None and j != i), default=0.0)
        for i, bag in enumerate(bags)
    ]


def _distance(left: Counter[int], right: Counter[int]) -> float:
    return 1.0 - (left & right).total() / (left | right).total()


def _subtrees(tree: ast.AST) -> Counter[int]:
    """Hashes of all subtrees, with their multiplicity."""
    bag: Counter[int] = Counter()
    _hash(tree, bag)
    return bag


def _hash(node: ast.AST, bag: Counter[int]) -> int:
    parts: list[object] = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            parts.append((name, tuple(_part(node, item, bag) for item in value if not _is_text_statement(item))))
        else:
            parts.append((name, _part(node, value, bag)))
    key = hash(tuple(parts))
    if not isinstance(node, ast.expr_context):
        bag[key] += 1
    return key


def _part(owner: ast.AST, value: object, bag: Counter[int]) -> object:
    if isinstance(value, ast.AST):
        return _hash(value, bag)
    if isinstance(value, str | bytes):
        return value if isinstance(owner, _NAMING) or value in OPERATORS else _ANONYMOUS
    return (type(value).__name__, value)


def _is_text_statement(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
