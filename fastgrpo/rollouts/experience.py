"""What a step's rollouts tell: numbers for the curves, records for samples.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Self

import msgspec
import numpy as np

from fastgrpo.ranks.collectives import gather_all
from fastgrpo.types import Group, RewardTerms, Rollout, Sample

TOTALS = ("rollouts", "infrastructure", "tokens_per_s", "worker_cost_usd")
MEANS_OF_ALL = ("completion_tokens", "truncated", "groups_without_variance")


class Experience(msgspec.Struct):
    """All that training and the log need of a step's finished rollouts, in plain data that a checkpoint can hold."""

    samples: list[Sample]
    metrics: dict[str, float]
    records: list[dict[str, Any]]

    def to_bytes(self) -> bytes:
        """As MessagePack, arrays as lists."""
        return msgspec.msgpack.encode(self, enc_hook=plain_array)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` wrote."""
        return msgspec.msgpack.decode(data, type=cls, dec_hook=lambda _, plain: np.array(plain))


def plain_array(value: Any) -> list[Any]:
    """msgspec's hook for the arrays of a `Sample`."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise NotImplementedError(f"{type(value).__name__} is no plain data")


def rollout_metrics(groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """Means over the step's rollouts, whose tokens were generated in `seconds`.

    Our own failures count in `infrastructure` alone. The workers' cost is that of all rounds.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    final = [rollout.executions[-1] for rollout in scored]
    calls = [call for rollout in scored for execution in rollout.executions for call in execution.calls]
    metrics = {
        "rollouts": float(len(rollouts)),
        "infrastructure": float(len(rollouts) - len(scored)),
        "tokens_per_s": sum(sum(rollout.loss_mask) for rollout in rollouts) / seconds,
        "completion_tokens": _mean([sum(rollout.loss_mask) for rollout in rollouts]),
        "truncated": _mean([rollout.truncated for rollout in rollouts]),
        "groups_without_variance": _mean([_even(group) for group in groups]),
    }
    metrics |= {
        f"reward/{term}": _mean([getattr(rollout.reward, term) for rollout in scored])
        for term in RewardTerms.__struct_fields__
    }
    metrics |= {
        "pass_rate": _mean([execution.pass_rate for execution in final]),
        "complexity": _mean([execution.complexity for execution in final]),
        "invalid": _mean([execution.status == "invalid" for execution in final]),
        "worker_calls": _mean([len(execution.calls) for execution in final]),
        "worker_cost_usd": sum(call.cost_usd for call in calls),
    }
    return metrics


def rollouts_over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """`rollout_metrics` of all ranks' rollouts together, from each rank's own, where it has any; collective."""
    ranks = [rank for rank in gather_all(metrics, "the rollouts' metrics of the other ranks") if rank]
    return {name: _together(name, ranks) for name in ranks[0]}


def _together(name: str, ranks: Sequence[dict[str, float]]) -> float:
    if name in TOTALS:
        return sum(rank[name] for rank in ranks)
    counts = [rank["rollouts"] - (0.0 if name in MEANS_OF_ALL else rank["infrastructure"]) for rank in ranks]
    weighted = sum(count * rank[name] for count, rank in zip(counts, ranks, strict=True))
    return weighted / sum(counts) if sum(counts) else 0.0


def sample_records(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """One plain record a rollout: what was asked, written, called, tested and rewarded. No hidden test is in it."""
    for group in groups:
        for rollout in group.rollouts:
            yield _record(group.problem, rollout)


def _record(problem: Any, rollout: Rollout) -> dict[str, Any]:
    last = rollout.executions[-1]
    return {
        "problem_id": problem.id,
        "difficulty": problem.difficulty,
        "prompt": problem.prompt,
        "completions": rollout.completions,
        "workflow": last.workflow,
        "status": last.status,
        "error": last.error,
        "worker_calls": msgspec.to_builtins(last.calls),
        "solution": last.solution,
        "tests": {"public": last.public_pass_rate, "hidden": last.pass_rate},
        "complexity": last.complexity,
        "reward": msgspec.to_builtins(rollout.reward),
    }


def _even(group: Group) -> bool:
    """True where every rollout earned the same, so that no advantage is left."""
    return len({rollout.reward.total for rollout in group.rollouts if rollout.reward is not None}) < 2


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
