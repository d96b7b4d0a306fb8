"""How distinct a workflow is within its group: a term of the reward, against a group's collapse to copies."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastgrpo.flow.structure import substructures
from fastgrpo.flow.types import WorkerCall


def distinctness(trees: Sequence[ast.AST | None], accounts: Sequence[Sequence[WorkerCall]] = ()) -> list[float]:
    """For each tree, its distance in [0, 1] to the nearest other one; 0 for a copy, for None and for a lone tree.

    Distance is 1 - the weighted Jaccard similarity of the multisets of all parts of the canonical structures
    (`structure_of`): what is not structure, as unused numbers or other names, makes no workflow distinct. With the
    `accounts` of the workflows, one for each tree, it is no more than the distance of what the host served to them, so
    that structure which never runs earns nothing either.
    """
    texts = [None if tree is None else substructures(tree) for tree in trees]
    served = [Counter((call.operator, call.worker, call.retries > 0) for call in account) for account in accounts]

    def distance(i: int, j: int) -> float:
        text = _distance(texts[i] or Counter(), texts[j] or Counter())
        return min(text, _distance(served[i], served[j])) if accounts else text

    members = [index for index, text in enumerate(texts) if text is not None]
    return [
        min((distance(i, j) for j in members if j != i), default=0.0) if texts[i] is not None else 0.0
        for i in range(len(trees))
    ]


def _distance(left: Counter[Any], right: Counter[Any]) -> float:
    total = (left | right).total()
    return 1.0 - (left & right).total() / total if total else 0.0
