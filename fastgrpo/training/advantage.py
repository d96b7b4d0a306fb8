"""From the rewards of a step's rollouts to samples: each reward relative to the others of its prompt, its group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import stdev
from typing import get_args

import msgspec
import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import Advantage, Grpo
from fastgrpo.errors import UserError
from fastgrpo.kernels.backend import triton_runs
from fastgrpo.kernels.reference import STD_EPSILON
from fastgrpo.kernels.validate import require
from fastgrpo.ranks.collectives import gather_all
from fastgrpo.types import Batch, Group, Reward, Rollout, Sample

ID_DTYPES = (torch.int32, torch.int64)
MODES: tuple[Advantage, ...] = get_args(Advantage)


def group_advantages(rewards_R: Tensor, group_ids_R: Tensor, mode: Advantage = "grpo") -> Tensor:
    """Advantage of each rollout, fp32 [R], over its group: a run of equal neighbours in `group_ids_R`, of any length.

    rewards_R: fp32 [R], NaN where infrastructure failed: left out of every mean, count and deviation, advantage 0.
    group_ids_R: int32 or int64 [R]; the rollouts of a group stand together.
    grpo: (r - mean) / (std + 1e-6), std with n - 1 (DeepSeekMath, arXiv 2402.03300, eq. 3); dr_grpo: r - mean
    (arXiv 2503.20783); rloo: r - mean of the others (arXiv 2402.14740) = n / (n - 1) * (r - mean).
    A group whose rewards are all equal, or with one rollout left, gets exactly 0. One kernel launch on a GPU.

    Raises ValueError naming the argument for a wrong mode, shape, dtype or device.
    """
    _check(rewards_R, group_ids_R, mode)
    if triton_runs(rewards_R.device):
        from fastgrpo.kernels import advantage_triton

        return advantage_triton.group_advantages(rewards_R, group_ids_R, mode)
    return _group_advantages_torch(rewards_R, group_ids_R, mode)


def scaled_advantages(rewards_R: Tensor, group_ids_R: Tensor, config: Grpo) -> Tensor:
    """`group_advantages` of this rank's rewards, divided by what `config.reward_scale` says.

    group: the deviation in the group, none: nothing, whatever `config.advantage` says of it. batch: that of all rewards
    of the step (arXiv 2508.08221), which makes this collective.
    """
    scale, mode = config.reward_scale, config.advantage
    if scale != "advantage" and mode != "rloo":
        mode = "grpo" if scale == "group" else "dr_grpo"
    advantages_R = group_advantages(rewards_R, group_ids_R, mode)
    return advantages_R / (_step_deviation(rewards_R) + STD_EPSILON) if scale == "batch" else advantages_R


def term_advantages(rewards: Sequence[Reward | None], group_ids_R: Tensor) -> Tensor:
    """Advantages fp32 [R] of which each term of the rewards has a share by its weight, whatever its scale; collective.

    GDPO (arXiv 2601.05242): the sum of `weights` times each term's own advantage in its group, where it applies, over
    the deviation of such sums in the step. None, where infrastructure failed, has advantage 0.
    Raises UserError where the terms have no weights.
    """
    if any(reward is not None and not reward.weights for reward in rewards):
        raise UserError(
            "grpo.reward_scale terms divides each reward function by its own deviation, and this task's terms are none "
            "of functions: set it to group, batch or none"
        )
    given = [reward for reward in rewards if reward is not None]
    weights = {name: weight for reward in given for name, weight in reward.weights.items()}
    nan = float("nan")
    sums_R = torch.zeros(len(rewards), dtype=torch.float32)
    for name, weight in weights.items():
        values = [nan if reward is None else reward.terms.get(name, nan) for reward in rewards]
        sums_R += weight * group_advantages(torch.tensor(values, dtype=torch.float32), group_ids_R)
    failed_R = torch.tensor([reward is None for reward in rewards], dtype=torch.bool)
    return sums_R / (_step_deviation(sums_R.masked_fill(failed_R, nan)) + STD_EPSILON)


def _step_deviation(rewards_R: Tensor) -> float:
    """Over the rewards of all ranks, with n - 1; 0 for fewer than two."""
    shares = gather_all(rewards_R[~rewards_R.isnan()].tolist(), "the rewards of the other ranks")
    rewards = [reward for share in shares for reward in share]
    return stdev(rewards) if len(rewards) > 1 else 0.0


def _check(rewards_R: Tensor, group_ids_R: Tensor, mode: str) -> None:
    for name, value in (("rewards_R", rewards_R), ("group_ids_R", group_ids_R)):
        require(isinstance(value, Tensor), name, "a tensor", type(value).__name__)
    flat = rewards_R.dim() == group_ids_R.dim() == 1 and len(group_ids_R) == len(rewards_R)
    same = group_ids_R.get_device() == rewards_R.get_device()
    if flat and same and mode in MODES and rewards_R.dtype == torch.float32 and group_ids_R.dtype in ID_DTYPES:
        return  # messages take longer to write than the kernel to launch
    require(mode in MODES, "mode", "'grpo', 'dr_grpo' or 'rloo'", repr(mode))
    require(rewards_R.dim() == 1, "rewards_R", "1 dimension [R]", tuple(rewards_R.shape))
    require(rewards_R.dtype == torch.float32, "rewards_R", "float32", rewards_R.dtype)
    require(group_ids_R.dtype in ID_DTYPES, "group_ids_R", "int32 or int64", group_ids_R.dtype)
    require(
        group_ids_R.shape == rewards_R.shape, "group_ids_R", f"shape {list(rewards_R.shape)}", tuple(group_ids_R.shape)
    )
    require(group_ids_R.device == rewards_R.device, "group_ids_R", f"device {rewards_R.device}", group_ids_R.device)


def _group_advantages_torch(rewards_R: Tensor, group_ids_R: Tensor, mode: Advantage) -> Tensor:
    _, run_R = torch.unique_consecutive(group_ids_R, return_inverse=True)
    groups = int(run_R[-1]) + 1 if len(run_R) else 0
    valid_R = ~rewards_R.isnan()
    filled_R = rewards_R.nan_to_num(nan=0.0)

    def group_sum(values_R: Tensor) -> Tensor:
        return values_R.new_zeros(groups).index_add_(0, run_R, values_R)[run_R]

    def group_extreme(reduce: str, empty: float) -> Tensor:
        values_R = torch.where(valid_R, rewards_R, empty)
        return values_R.new_full((groups,), empty).scatter_reduce_(0, run_R, values_R, reduce)[run_R]

    count_R = group_sum(valid_R.to(torch.float32))
    centred_R = filled_R - group_sum(filled_R) / count_R.clamp(min=1)
    others_R = (count_R - 1).clamp(min=1)
    if mode == "grpo":
        advantages_R = centred_R / ((group_sum(centred_R.square() * valid_R) / others_R).sqrt() + STD_EPSILON)
    else:
        advantages_R = centred_R * (count_R / others_R if mode == "rloo" else 1.0)
    spread_R = group_extreme("amax", -torch.inf) > group_extreme("amin", torch.inf)
    return torch.where(valid_R & spread_R, advantages_R, 0.0)


def to_samples(groups: Sequence[Group], config: Grpo) -> list[Sample]:
    """The rollouts that the step's normaliser counts, with their advantages.

    Infrastructure failures are left out of their group's baseline and of the batch. A group without variance, whose
    advantages are all 0, leaves where tokens are counted, as in DAPO's batches (arXiv 2503.14476, eq. 11). The other
    normalisers run over all sequences sampled: there it counts, as empty samples, or as whole ones for a KL term or an
    entropy bonus. With `grpo.refill` it leaves under any normaliser, because others have been sampled in its place. A
    truncated rollout that `grpo.overlong_filter` masks is an empty sample too. Each conversation of an agent is a
    sample. With `grpo.reward_scale` batch or terms this is collective.
    """
    rollouts = [(number, rollout) for number, group in enumerate(groups) for rollout in group.rollouts]
    totals = [float("nan") if r.reward is None else r.reward.total for _, r in rollouts]
    # What torch takes where no type is named is the process's, which a reward that loads a model of its own changes.
    rewards_R = torch.tensor(totals, dtype=torch.float32)
    group_ids_R = torch.tensor([number for number, _ in rollouts], dtype=torch.int64)
    if config.reward_scale == "terms":
        advantages_R = term_advantages([rollout.reward for _, rollout in rollouts], group_ids_R).tolist()
    else:
        advantages_R = scaled_advantages(rewards_R, group_ids_R, config).tolist()
    varied = {number for (number, _), advantage in zip(rollouts, advantages_R, strict=True) if advantage != 0.0}
    everyone = set(range(len(groups)))
    moving = everyone if config.kl_weight > 0.0 or config.entropy_weight > 0.0 else varied
    counted = varied if config.refill or config.normaliser == "token" else everyone
    return [
        Sample(np.array(trace.token_ids), np.array(trace.loss_mask), np.array(trace.logprobs), advantage, trace.routes)
        if number in moving and not (config.overlong_filter and rollout.truncated)
        else Sample.empty()
        for (number, rollout), advantage in zip(rollouts, advantages_R, strict=True)
        if rollout.reward is not None and number in counted
        for trace in rollout.traces
    ]


def less_kl(batch: Batch, weight: float) -> Tensor:
    """The batch's advantages less `weight` times log pi_old - log pi_ref of a token and of all after it, fp32 [N].

    That is the return of a reward with the KL in it by token (REINFORCE++, arXiv 2501.03262). A sequence's tokens stand
    together in the batch, in order.
    """
    old_N, ref_N = batch.old_logprobs_N, batch.ref_logprobs_N
    assert old_N is not None
    assert ref_N is not None
    _, counts_S = batch.sequence_N.unique_consecutive(return_counts=True)
    # Over all sequences that follow, too; in double, as what these add is taken off again.
    rest_N = torch.cat([old_N - ref_N, old_N.new_zeros(1)]).double().flip(0).cumsum(0).flip(0)
    after_N = rest_N[counts_S.cumsum(0)].repeat_interleave(counts_S)
    return batch.advantages_N - weight * (rest_N[:-1] - after_N).float()


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
    weights = reward.weights and reward.weights | {"overlong": 1.0}
    return Reward(total=reward.total + penalty, terms=reward.terms | {"overlong": penalty}, weights=weights)
