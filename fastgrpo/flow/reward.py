"""The rule-based reward of FlowReasoner (arXiv 2504.15257): performance, complexity, efficiency, diversity; and format.

Efficiency is what a workflow spent at run time, by the host's account, beside what one call would have:

    spent = cost / cost of a single call,   efficiency = x / (x + 4) with x = max(0, spent - 1)        in [0, 1)

Cost is measured in what `reward.efficiency_by` names. It is 0 for one call, 0.2 for two, 0.5 for five.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from msgspec.structs import replace

from fastgrpo.config import EfficiencyBy, RewardWeights
from fastgrpo.flow.structure import substructures
from fastgrpo.flow.types import Execution, WorkerCall
from fastgrpo.types import Reward
from fastgrpo_sandbox.guest.syntax import parse

_HALF_EXCESS = 4.0


def group_rewards(executions: Sequence[Execution], weights: RewardWeights) -> list[Reward | None]:
    """One reward for each execution of a group; None for an infrastructure failure, which is nobody's merit or fault.

    `total = performance - complexity - efficiency + diversity - format`, each term with its weight: w_p x pass rate (or
    the judge model's score, `reward.judge`), w_c x complexity, w_e x efficiency, w_d x distinctness, w_f for a
    completion without a workflow. The paper publishes no weights; ours are a choice (`docs/experiments.md`). Only
    workflows that returned a solution (status "ok") count as members of the group's diversity, so that failing in a new
    way earns nothing.
    """
    trees = [parse(execution.workflow) if execution.status == "ok" else None for execution in executions]
    distinct = distinctness(trees, [execution.calls for execution in executions])
    spent = spent_calls(executions, weights.efficiency_by)
    return [
        None if execution.status == "infrastructure" else _terms(execution, each, calls, weights)
        for execution, each, calls in zip(executions, distinct, spent, strict=True)
    ]


def warmed_up(weights: RewardWeights, step: int) -> RewardWeights:
    """The weights at a training step, from 0: over `warmup_steps` both costs grow from nothing to what they are."""
    share = min(1.0, step / weights.warmup_steps) if weights.warmup_steps else 1.0
    return replace(weights, complexity=share * weights.complexity, efficiency=share * weights.efficiency)


def _terms(execution: Execution, distinct: float, spent: float, weights: RewardWeights) -> Reward:
    performance = weights.performance * execution.performance
    complexity = weights.complexity * execution.complexity
    efficiency = weights.efficiency * inefficiency(spent)
    diversity = weights.diversity * distinct
    penalty = weights.format if execution.status == "invalid" else 0.0
    terms = {
        "performance": performance,
        "complexity": complexity,
        "efficiency": efficiency,
        "diversity": diversity,
        "format": penalty,
    }
    return Reward(total=performance - complexity - efficiency + diversity - penalty, terms=terms)


def inefficiency(spent: float) -> float:
    """What is charged in [0, 1) for having spent as much as so many single calls."""
    excess = max(0.0, spent - 1.0)
    return excess / (excess + _HALF_EXCESS)


def spent_calls(executions: Sequence[Execution], by: EfficiencyBy) -> list[float]:
    """What each execution of a group spent, in units of one call.

    The unit is the mean cost of a `generate` request that was answered in the group, of the dearest worker; where there
    is none, or at no cost, requests are counted. A request that nobody waited for is charged as one call.
    """
    unit = _single_call(executions, by)
    if not unit:
        by, unit = "calls", 1.0
    return [
        sum(_cost(call, by) / unit + call.requests - call.answered for call in execution.calls)
        for execution in executions
    ]


def _single_call(executions: Sequence[Execution], by: EfficiencyBy) -> float:
    costs = defaultdict[str, list[float]](list)
    for execution in executions:
        for call in execution.calls:
            if call.operator == "generate" and call.answered:
                costs[call.worker].append(_cost(call, by))
    return max(map(fmean, costs.values()), default=0.0)


def _cost(call: WorkerCall, by: EfficiencyBy) -> float:
    match by:
        case "tokens":
            return call.tokens
        case "calls":
            return call.answered
        case "dollars":
            return call.cost_usd
        case "seconds":
            return call.seconds


def distinctness(trees: Sequence[ast.AST | None], accounts: Sequence[Sequence[WorkerCall]] = ()) -> list[float]:
    """For each tree, its distance in [0, 1] to the nearest other one; 0 for a copy, for None and for a lone tree.

    Distance is 1 - the weighted Jaccard similarity of the multisets of all parts of the canonical structures
    (`structure_of`): what is not structure, as unused numbers or other names, makes no workflow distinct. With the
    `accounts` of the workflows, one for each tree, it is no more than the distance of what the host served to them, so
    that structure which never runs earns nothing either, nor does a call that the host refused, which names no worker.
    """
    texts = [None if tree is None else substructures(tree) for tree in trees]
    served = [
        Counter((call.operator, call.worker, call.retries > 0) for call in account if call.worker)
        for account in accounts
    ]

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
