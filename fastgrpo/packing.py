"""Sequences into micro-batches without padding: each row of T tokens holds whole sequences up to a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from fastgrpo.config import Normaliser
from fastgrpo.distributed import rank_and_world
from fastgrpo.types import Batch, Sample


def partition(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped by first-fit decreasing, each group at most `budget` tokens; a longer sequence stands alone.

    First-fit decreasing needs at most 11/9 of the fewest possible groups. Ties keep the input's order.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[index]
        fit = next((g for g, free in enumerate(room) if free >= need), None)
        if fit is None:
            groups.append([index])
            room.append(budget - need)
        else:
            groups[fit].append(index)
            room[fit] -= need
    return groups


def balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank by longest-processing-time: the fullest rank has at most 4/3 of the best possible load."""
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shares[rank].append(index)
        load[rank] += lengths[index]
    return shares


def pack(samples: Sequence[Sample], weights: Sequence[float], budget: int, device: torch.device | str) -> list[Batch]:
    """Pack `samples` into batches of at most `budget` tokens; `weights[i]` is the loss weight of sample i's tokens.

    The weights belong to the whole optimizer step (see `sequence_weights`), so that the gradient does not depend
    on how the step is cut into batches.
    """
    groups = partition([len(sample.token_ids) for sample in samples], budget)
    return [_row([samples[i] for i in group], [weights[i] for i in group], group, device) for group in groups]


def rank_batches(
    samples: Sequence[Sample], normaliser: Normaliser, constant: int, budget: int, device: torch.device | str
) -> list[Batch]:
    """This rank's micro-batches of an optimizer step whose `samples` every rank knows in the same order.

    Sequences are balanced over the ranks by length. Every rank gets the same number of batches, because each backward
    ends in a collective: a rank with less to do repeats a sequence with weight 0, which costs no loss token.
    """
    if not samples:
        return []
    rank, world = rank_and_world()
    counts = [sample.loss_tokens for sample in samples]
    weights = sequence_weights(counts, normaliser, constant=constant, totals=(sum(counts), len(samples)))
    lengths = [len(sample.token_ids) for sample in samples]
    shares = balance(lengths, world)
    most = max(len(partition([lengths[i] for i in share], budget)) for share in shares)
    mine = shares[rank]
    batches = pack([samples[i] for i in mine], [weights[i] for i in mine], budget, device)
    idle = min(samples, key=lambda sample: len(sample.token_ids))
    return batches + [pack([idle], [0.0], budget, device)[0] for _ in range(most - len(batches))]


def sequence_weights(
    loss_tokens: Sequence[int], normaliser: Normaliser, *, constant: int, totals: tuple[int, int]
) -> list[float]:
    """The weight of each token of each sequence, so that the step's loss is a plain weighted sum.

    `loss_tokens[i]` counts sequence i's loss tokens; `totals` are the loss tokens and sequences of the whole optimizer
    step over all ranks; `constant` is the divisor of dr_grpo (the completion limit).
    """
    tokens, sequences = totals
    if normaliser == "token":
        return [1.0 / max(tokens, 1)] * len(loss_tokens)
    if normaliser == "sequence":
        return [1.0 / (max(sequences, 1) * max(count, 1)) for count in loss_tokens]
    return [1.0 / (max(sequences, 1) * constant)] * len(loss_tokens)


def _row(samples: list[Sample], weights: list[float], ids: list[int], device: torch.device | str) -> Batch:
    lengths = [len(sample.token_ids) for sample in samples]
    starts = [0, *accumulate(lengths)]
    index, targets, sequence, advantages, token_weights, logprobs = [], [], [], [], [], []
    for sample, start, weight, number in zip(samples, starts, weights, ids, strict=False):
        for t in range(1, len(sample.token_ids)):
            if sample.loss_mask[t]:
                index.append(start + t - 1)
                targets.append(sample.token_ids[t])
                sequence.append(number)
                advantages.append(sample.advantage)
                token_weights.append(weight)
                logprobs.append(sample.logprobs[t])

    def tensor(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return Batch(
        input_ids_T=tensor([t for sample in samples for t in sample.token_ids], torch.int64),
        position_ids_T=tensor([p for length in lengths for p in range(length)], torch.int64),
        cu_seqlens_S=tensor(starts, torch.int32),
        max_seqlen=max(lengths),
        loss_index_N=tensor(index, torch.int64),
        targets_N=tensor(targets, torch.int64),
        sequence_N=tensor(sequence, torch.int64),
        advantages_N=tensor(advantages, torch.float32),
        weights_N=tensor(token_weights, torch.float32),
        sampled_logprobs_N=tensor(logprobs, torch.float32),
    )
