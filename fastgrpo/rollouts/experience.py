"""What a step's rollouts tell: samples for the optimizer, numbers for the curves, records for samples.jsonl."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from fastgrpo.ranks.collectives import gather_all
from fastgrpo.rollouts.environment import name_of
from fastgrpo.types import INFRASTRUCTURE, Group, Result, Sample

# What the loop logs by itself (docs/metrics.md): a task's metric of such a name is environment/NAME.
OWN_METRICS = frozenset({
    "rollouts", "infrastructure", "completion_tokens", "truncated", "groups_without_variance", "groups_refilled",
    "stragglers", "lag", "lag_max", "tokens_per_s", "tail_s", "tail_after_answers_s", "waited_for", "loss", "samples",
    "loss_tokens", "entropy", "kl", "clip_fraction", "importance_capped", "sampler_parity", "sampler_parity_max",
    "rerouted",
    "grad_norm", "lr", "skipped", "flop", "train_tokens_per_s", "mfu", "parity", "parity_max", "sync_seconds",
    "stage", "step", "time",
})  # fmt: skip
OWN_KINDS = ("reward/", "seconds/", "gpu/", "held_out/")


class Tally(msgspec.Struct):
    """Numbers that add up over rollouts and ranks: plain sums, means as (sum, count), largest values, the longest wait.

    `waited`: seconds after a rank's last completion until its last result, and whose that was. `passes`: the sum of a
    problem's pass rates and the number of its rollouts, by its id, where `add_passes` has added them. `failure`: the
    first of the environment's failures, empty where there was none.
    """

    sums: dict[str, float] = {}
    means: dict[str, tuple[float, int]] = {}
    peaks: dict[str, float] = {}
    waited: tuple[float, str] = (0.0, "")
    passes: dict[str, tuple[float, float]] = {}
    failure: str = ""

    def add(self, name: str, value: float) -> None:
        """One more value of the mean `name`."""
        total, count = self.means.get(name, (0.0, 0))
        self.means[name] = total + value, count + 1

    @classmethod
    def merged(cls, tallies: Iterable[Tally]) -> Tally:
        """All of `tallies` together."""
        whole = cls()
        for tally in tallies:
            for name, value in tally.sums.items():
                whole.sums[name] = whole.sums.get(name, 0.0) + value
            for name, (total, count) in tally.means.items():
                before, counted = whole.means.get(name, (0.0, 0))
                whole.means[name] = before + total, counted + count
            for name, (passed, rollouts) in tally.passes.items():
                earlier = whole.passes.get(name, (0.0, 0.0))
                whole.passes[name] = earlier[0] + passed, earlier[1] + rollouts
            for name, value in tally.peaks.items():
                whole.peaks[name] = max(whole.peaks.get(name, value), value)
            whole.waited = max(whole.waited, tally.waited)
            whole.failure = whole.failure or tally.failure
        return whole

    def values(self) -> dict[str, float]:
        """Each sum, mean and largest value by its name, and the longest wait as `tail_s`."""
        return (
            self.sums
            | self.peaks
            | {"tail_s": self.waited[0]}
            | {name: total / count for name, (total, count) in self.means.items()}
        )


class Experience(msgspec.Struct):
    """All that training and the log need of a step's finished rollouts, in plain data that a checkpoint can hold."""

    samples: list[Sample]
    tally: Tally
    records: list[dict[str, Any]]


def to_bytes(experiences: list[Experience]) -> bytes:
    """The rollouts of consecutive steps as MessagePack; arrays as lists, routes as their bytes."""
    return msgspec.msgpack.encode(experiences, enc_hook=plain_array)


def from_bytes(data: bytes) -> list[Experience]:
    """What `to_bytes` wrote, or one step's rollouts as older checkpoints have them."""
    found = msgspec.msgpack.decode(data, type=list[Experience] | Experience, dec_hook=lambda _, plain: _array(plain))
    return found if isinstance(found, list) else [found]


def plain_array(value: Any) -> list[Any] | dict[str, Any]:
    """msgspec's hook for the arrays of a `Sample`."""
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"{type(value).__name__} is no plain data")
    # A step's routes are a hundred million numbers.
    return (
        value.tolist() if value.ndim == 1 else {"kind": value.dtype.str, "shape": value.shape, "data": value.tobytes()}
    )


def _array(plain: Any) -> np.ndarray:
    if isinstance(plain, dict):
        return np.frombuffer(plain["data"], plain["kind"]).reshape(plain["shape"])
    return np.array(plain)


def tally_of(
    groups: Sequence[Group], seconds: float, waited: tuple[float, str] = (0.0, ""), *, by_terms: bool = False
) -> Tally:
    """The numbers of the step's rollouts, whose tokens were generated in `seconds`, then `waited` for (see `Rollouts`).

    Sums: `rollouts`, `infrastructure` (the environment's failures) and `tokens_per_s`. Means over all rollouts:
    `completion_tokens`, `truncated`; over groups: `groups_without_variance`, as `varies` says; over the rollouts with a
    reward: `reward/total`, `reward/<term>` and the environment's own metrics, each over the rollouts that have it.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    tally = Tally(waited=waited, failure=first_failure(groups))
    for rollout in rollouts:
        tally.add("completion_tokens", rollout.written)
        tally.add("truncated", rollout.truncated)
        if rollout.reward is not None:
            tally.add("reward/total", rollout.reward.total)
            for name, value in rollout.reward.terms.items():
                tally.add(_beside(f"reward/{name}", taken=name == "total"), value)
            for name, value in rollout.result.metrics.items():
                tally.add(_beside(name, taken=name in OWN_METRICS or name.startswith(OWN_KINDS)), value)
    for group in groups:
        tally.add("groups_without_variance", not varies(group, by_terms=by_terms))
    tally.sums = {
        "rollouts": float(len(rollouts)),
        "infrastructure": float(sum(rollout.reward is None for rollout in rollouts)),
        "tokens_per_s": sum(rollout.written for rollout in rollouts) / seconds,
    }
    return tally


def _beside(name: str, *, taken: bool) -> str:
    """The name of what a task gives, told apart from the loop's own where that has `taken` it."""
    return f"environment/{name}" if taken else name


def add_passes(tally: Tally, groups: Sequence[Group]) -> None:
    """Add to `tally.passes` the pass rates of the `groups`: what `grpo.curriculum` draws by."""
    for group in groups:
        if rates := [pass_rate(rollout.result) for rollout in group.rollouts if rollout.reward is not None]:
            before, counted = tally.passes.get(name_of(group.problem), (0.0, 0.0))
            tally.passes[name_of(group.problem)] = before + sum(rates), counted + len(rates)


def pass_rate(result: Result) -> float:
    """The environment's own `pass_rate`, else the reward, in [0, 1]."""
    rate = result.metrics.get("pass_rate", result.reward.total if result.reward else 0.0)
    return min(max(rate, 0.0), 1.0)


def add_lag(tally: Tally, groups: Sequence[Group], step: int) -> None:
    """Add to `tally` how old the policy's tokens are for an update that `step` others came before, in updates.

    `lag` is the mean over the tokens, `lag_max` the most.
    """
    written = [
        np.array(r.versions)[np.array(r.loss_mask, bool)]
        for group in groups
        for rollout in group.rollouts
        for r in rollout.traces
    ]
    lags = step - np.concatenate(written)
    tally.means["lag"] = float(lags.sum()), len(lags)
    tally.peaks["lag_max"] = float(lags.max(initial=0))


def first_failure(groups: Sequence[Group]) -> str:
    """Why the environment failed for the first rollout that has no reward; empty where all have one."""
    results = (rollout.result for group in groups for rollout in group.rollouts)
    return next((result.error for result in results if result.status == INFRASTRUCTURE), "")


def tally_over_ranks(tally: Tally) -> Tally:
    """The tallies of all ranks' rollouts together; collective."""
    return Tally.merged(gather_all(tally, "the rollouts' metrics of the other ranks"))


def sample_records(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """One plain record a rollout: what was asked, written and rewarded, and the environment's own record of it.

    `versions`: pairs of a number of updates and how many tokens in a row the weights behind them wrote.
    """
    for group in groups:
        for rollout in group.rollouts:
            reward = rollout.reward
            own = {
                "problem_id": name_of(group.problem),
                "prompt": group.prompt,
                "completions": rollout.completions,
                "versions": _runs(v for v, m in zip(rollout.versions, rollout.loss_mask, strict=True) if m),
                "status": rollout.result.status,
                "error": rollout.result.error,
                "reward": reward and {"total": reward.total, "terms": reward.terms},
            }
            taken = {*own, "stage", "step"}
            yield own | {_beside(key, taken=key in taken): value for key, value in rollout.result.record.items()}


def _runs(values: Iterable[int]) -> list[tuple[int, int]]:
    """(value, how often in a row), one after another."""
    return [(value, sum(1 for _ in run)) for value, run in itertools.groupby(values)]


def varies(group: Group, *, by_terms: bool = False) -> bool:
    """False where every rollout earned the same, so that no advantage is left; `by_terms`: of each term with a weight.

    The same in fp32, as advantages have it: 0.1 + 0.2 and 0.3 are one reward whose terms were added otherwise.
    """
    rewards = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
    if not by_terms:
        return len({np.float32(reward.total) for reward in rewards}) > 1
    earned = {
        (name, np.float32(reward.terms[name]))
        for reward in rewards
        for name, weight in reward.weights.items()
        if weight and name in reward.terms
    }
    return len(earned) > len({name for name, _ in earned})
