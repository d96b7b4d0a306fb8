"""The rule-based reward of FlowReasoner (arXiv 2504.15257): performance, complexity, diversity; and format."""

from __future__ import annotations

from collections.abc import Sequence

from fastgrpo.config import RewardWeights
from fastgrpo.flow.diversity import distinctness
from fastgrpo.flow.types import Execution
from fastgrpo.types import Reward
from fastgrpo_sandbox.guest.syntax import parse


def group_rewards(executions: Sequence[Execution], weights: RewardWeights) -> list[Reward | None]:
    """One reward for each execution of a group; None for an infrastructure failure, which is nobody's merit or fault.

    `total = performance - complexity + diversity - format`, each term with its weight: w_p x pass rate, w_c x AST
    complexity, w_d x distinctness, w_f for a completion without a workflow. The paper publishes no weights; ours were
    chosen by `bench/structures.py`. Only workflows that returned a solution
    (status "ok") count as members of the group's diversity, so that failing in a new way earns nothing.
    """
    trees = [parse(execution.workflow) if execution.status == "ok" else None for execution in executions]
    return [
        None if execution.status == "infrastructure" else _terms(execution, distinct, weights)
        for execution, distinct in zip(executions, distinctness(trees), strict=True)
    ]


def _terms(execution: Execution, distinct: float, weights: RewardWeights) -> Reward:
    performance = weights.performance * execution.pass_rate
    complexity = weights.complexity * execution.complexity
    diversity = weights.diversity * distinct
    penalty = weights.format if execution.status == "invalid" else 0.0
    terms = {"performance": performance, "complexity": complexity, "diversity": diversity, "format": penalty}
    return Reward(total=performance - complexity + diversity - penalty, terms=terms)
