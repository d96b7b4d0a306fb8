"""Reward shaping of the engine's own, on top of what an environment gives: DAPO's soft overlong punishment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import msgspec

from fastgrpo.config import Grpo
from fastgrpo.types import Group, Reward, Rollout


def shape_rewards(groups: Sequence[Group], config: Grpo) -> None:
    """Add the term `overlong` to each reward of the `groups`, in place, where `grpo.overlong_penalty_tokens` asks so.

    A rollout over several rounds is judged by its longest completion; a truncated one costs 1 whatever its length.
    """
    if not config.overlong_penalty_tokens:
        return
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        if rollout.reward is not None:
            length = config.max_new_tokens if rollout.truncated else _longest_completion(rollout)
            penalty = overlong_penalty(length, config.max_new_tokens, config.overlong_penalty_tokens)
            rollout.result = msgspec.structs.replace(rollout.result, reward=_with_term(rollout.reward, penalty))


def overlong_penalty(length: int, limit: int, soft: int) -> float:
    """0 up to `limit` - `soft` tokens, then linearly down to -1 at `limit` (DAPO, arXiv 2503.14476, eq. 13)."""
    return -min(1.0, max(0, length - (limit - soft)) / soft)


def _longest_completion(rollout: Rollout) -> int:
    return max((sum(run) for trace in rollout.traces for _, run in groupby(trace.loss_mask)), default=0)


def _with_term(reward: Reward, penalty: float) -> Reward:
    return Reward(total=reward.total + penalty, terms=reward.terms | {"overlong": penalty})
