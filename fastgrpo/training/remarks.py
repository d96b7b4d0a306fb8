"""What goes wrong in GRPO without an error: the metrics of its steps show it, and the run says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import lcm

from fastgrpo.config import Config, Grpo

# After so many steps in a row from which nothing can be learned, a run says so.
ALIKE_STEPS = 3
# A step that lost a larger share of its rollouts, to `grpo.straggler_s` or to failures of the task, has a run say so.
LOST = 0.05


class Remarks:
    """Tells by `say` what the metrics of a run's steps show to go wrong; of lost rollouts once for each cause."""

    def __init__(self, grpo: Grpo, say: Callable[[str], object]) -> None:
        self._grpo, self._say = grpo, say
        self._alike, self._cut, self._told_late, self._told_failed = 0, 0, False, False

    def step(self, values: Mapping[str, float], failure: str) -> None:
        """Look at a step's metrics `values`; `failure`: why the task failed one of its rollouts, empty for none."""
        self._alike = self._alike + 1 if values.get("groups_without_variance") == 1.0 else 0
        if self._alike == ALIKE_STEPS:
            self._say(nothing_to_learn(values))
        self._cut = self._cut + 1 if self._grpo.overlong_filter and values.get("truncated") == 1.0 else 0
        if self._cut == ALIKE_STEPS:
            self._say(nothing_whole(self._grpo))
        late, rollouts = values.get("stragglers", 0.0), values["rollouts"]
        failed = values["infrastructure"] - late
        if not self._told_late and late > LOST * rollouts:
            self._told_late = True
            self._say(quick_ones_left(late, rollouts, self._grpo))
        if not self._told_failed and failure and failed > LOST * rollouts:
            self._told_failed = True
            self._say(why_failed(failed, rollouts, failure))


def seldom_kept(config: Config) -> str:
    """What is said at the start where evaluations come at steps that have no checkpoint."""
    evaluated, saved = config.eval.every, config.checkpoint.every
    return (
        f"eval.every = {evaluated} is no multiple of checkpoint.every = {saved}: only the evaluations every "
        f"{lcm(evaluated, saved)} steps, and the last one, are of a checkpoint that can be kept as the best"
    )


def nothing_to_learn(values: Mapping[str, float]) -> str:
    """What is said after `ALIKE_STEPS` steps in a row in which no group had two rewards; `values`: the last one's."""
    terms = [f"{name.removeprefix('reward/')} {value:.3f}" for name, value in values.items() if "reward/" in name]
    return (
        f"in the last {ALIKE_STEPS} steps no group had two rewards that differ ({', '.join(terms)}): nothing is "
        "learned from it. Is --model the policy that is meant, did its warm start teach enough, and are the problems "
        "neither too hard nor too easy for it?"
    )


def nothing_whole(grpo: Grpo) -> str:
    """What is said after `ALIKE_STEPS` steps in a row of which `grpo.overlong_filter` left nothing."""
    return (
        f"in the last {ALIKE_STEPS} steps every completion was cut off, and grpo.overlong_filter leaves such out: "
        f"nothing is learned. Raise grpo.max_new_tokens = {grpo.max_new_tokens}, or unset the filter"
    )


def quick_ones_left(late: float, rollouts: float, grpo: Grpo) -> str:
    """What is said where `grpo.straggler_s` cut `late` of a step's rollouts."""
    return (
        f"{late:.0f} of {rollouts:.0f} rollouts of this step still ran grpo.straggler_s = {grpo.straggler_s:g} s after "
        "its last completion and are left out. Those that are left are the quick ones: whatever takes long only where "
        "it fails now looks better than it is. Raise grpo.straggler_s above what the slowest rollouts take, or make "
        f"what they wait for faster; {'a larger ' if grpo.max_lag else ''}grpo.max_lag hides the wait for them behind "
        "other steps"
    )


def why_failed(failed: float, rollouts: float, reason: str) -> str:
    """What is said where the task failed so many of a step's rollouts, one of them for `reason`."""
    return (
        f"{failed:.0f} of {rollouts:.0f} rollouts of this step have no reward, for a reason that is not the policy's: "
        f"{reason}. They are left out; samples.jsonl has all of them, by the status infrastructure"
    )
