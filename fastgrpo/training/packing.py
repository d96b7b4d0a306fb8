"""Sequences into micro-batches without padding: each row of T tokens holds whole sequences up to a token budget.

Sequences of one prompt that lie in one row share it: it is stored, and computed, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastgrpo.config import Normaliser
from fastgrpo.ranks.collectives import rank_and_world
from fastgrpo.training.pieces import partition
from fastgrpo.types import Batch, RoutingReplay, Runs, Sample


def balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank by longest-processing-time: the fullest rank has at most 4/3 of the best possible load.

    Raises ValueError for fewer ranks than one.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shares[rank].append(index)
        load[rank] += lengths[index]
    return shares


@dataclass(frozen=True, slots=True)
class Joined:
    """Samples laid end to end, as they travel: thousands of small arrays take far longer to pickle than four."""

    lengths: list[int]
    advantages: list[float]
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
    routes: np.ndarray | None


def joined(samples: Sequence[Sample]) -> Joined:
    """The `samples` for another process; `apart` gives them back."""
    columns = [(sample.token_ids, sample.loss_mask, sample.logprobs) for sample in samples or [Sample.empty()]]
    ids, mask, logprobs = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    lengths, advantages = [len(s.token_ids) for s in samples], [s.advantage for s in samples]
    return Joined(lengths, advantages, (ids, mask, logprobs), _routes([(each, slice(None)) for each in samples]))


def apart(whole: Joined) -> list[Sample]:
    """The samples that were `joined`; they share its memory."""
    if not whole.lengths:
        return []
    ends = np.cumsum(whole.lengths)[:-1]
    ids, masks, logprobs = (np.split(array, ends) for array in whole.arrays)
    routes = [None] * len(ids) if whole.routes is None else np.split(whole.routes, ends)
    return [Sample(*parts) for parts in zip(ids, masks, logprobs, whole.advantages, routes, strict=True)]


def _routes(parts: Sequence[tuple[Sample, slice]]) -> np.ndarray | None:
    """The routes of parts of samples, end to end, -1 for those without any; None where none has any."""
    known = next((sample.routes for sample, _ in parts if sample.routes is not None), None)
    if known is None:
        return None
    none = np.full((1, *known.shape[1:]), -1, known.dtype)
    return np.concatenate(
        [
            none.repeat(len(sample.token_ids[part]), 0) if sample.routes is None else sample.routes[part]
            for sample, part in parts
        ]
    )


@dataclass(frozen=True, slots=True)
class Family:
    """Samples, by index, that are computed together. `shared`: length of the common prompt prefix; 0 = none."""

    shared: int
    members: list[int]
    tokens: int


def families(samples: Sequence[Sample], limit: int) -> list[Family]:
    """The samples by their prompts, the tokens before the first loss token; each family at most `limit` tokens.

    A family above it is cut by first-fit decreasing. A sample longer than `limit` stands alone.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for i, sample in enumerate(samples):
        by_prompt.setdefault(sample.token_ids[: _prompt_tokens(sample)].tobytes(), []).append(i)
    found = []
    for members in by_prompt.values():
        prompt = _prompt_tokens(samples[members[0]])
        own = [len(samples[i].token_ids) - prompt for i in members]
        for part in partition(own, max(limit - prompt, 1)):
            shared = prompt if len(part) > 1 else 0
            tokens = prompt + sum(own[i] for i in part)
            found.append(Family(shared, [members[i] for i in part], tokens))
    return found


def pack(samples: Sequence[Sample], weights: Sequence[float], budget: int, device: torch.device | str) -> list[Batch]:
    """Pack `samples` into batches of at most `budget` tokens; `weights[i]` is the loss weight of sample i's tokens.

    The weights belong to the whole optimizer step (see `sequence_weights`), so that the gradient does not depend
    on how the step is cut into batches, nor on which prompts are shared.
    """
    return _pack(families(samples, budget), samples, weights, budget, device)


def rank_batches(
    samples: Sequence[Sample], normaliser: Normaliser, constant: int, budget: int, device: torch.device | str
) -> list[Batch]:
    """This rank's micro-batches of an optimizer step whose `samples` every rank knows in the same order.

    Samples without a loss token are not computed; a mean over sequences counts them all the same. Families are balanced
    over the ranks by length. Every rank gets the same number of batches, because each backward ends in a collective: a
    rank with less to do repeats a sequence with weight 0, which costs no loss token.
    """
    sequences, samples = len(samples), [sample for sample in samples if sample.loss_tokens]
    if not samples:
        return []
    rank, world = rank_and_world()
    counts = [sample.loss_tokens for sample in samples]
    weights = sequence_weights(counts, normaliser, constant=constant, totals=(sum(counts), sequences))
    # Several families a rank: few large ones would leave some ranks idle.
    even = sum(len(sample.token_ids) for sample in samples) // (4 * world)
    units = families(samples, budget if world == 1 else max(min(budget, even), 1))
    shares = [[units[i] for i in share] for share in balance([unit.tokens for unit in units], world)]
    most = max(len(partition([unit.tokens for unit in share], budget)) for share in shares)
    batches = _pack(shares[rank], samples, weights, budget, device)
    shortest = min(range(len(samples)), key=lambda i: len(samples[i].token_ids))
    idle = Family(0, [shortest], len(samples[shortest].token_ids))
    return batches + [_row([idle], samples, [0.0] * len(samples), device) for _ in range(most - len(batches))]


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


def _prompt_tokens(sample: Sample) -> int:
    """Tokens before the first loss token; 0 where there is none."""
    predicted = sample.loss_mask[1:]
    first = int(predicted.argmax()) if len(predicted) else 0
    return first + 1 if predicted[first : first + 1].any() else 0


def _pack(
    units: Sequence[Family],
    samples: Sequence[Sample],
    weights: Sequence[float],
    budget: int,
    device: torch.device | str,
) -> list[Batch]:
    rows = partition([unit.tokens for unit in units], budget)
    return [_row([units[i] for i in row], samples, weights, device) for row in rows]


def _row(
    units: Sequence[Family], samples: Sequence[Sample], weights: Sequence[float], device: torch.device | str
) -> Batch:
    """One packed row. A prompt that samples share is a run of its own; what follows it in each of them is a run whose
    keys are the prompt's positions, then its own."""
    size, token_ids, positions, keys, loss, parts = 0, [], [], [], [], list[tuple[Sample, slice]]()

    def add_run(sample: Sample, part: slice, seen: np.ndarray) -> None:
        nonlocal size
        ids, first = sample.token_ids[part], part.start
        parts.append((sample, part))
        token_ids.append(ids)
        positions.append(np.arange(first, first + len(ids)))
        keys.append(seen)
        size += len(ids)

    for unit in units:
        prompt = np.arange(size, size + unit.shared)
        if unit.shared:
            add_run(samples[unit.members[0]], slice(0, unit.shared), prompt)
        for i in unit.members:
            sample, ids = samples[i], samples[i].token_ids
            where = np.concatenate([prompt, np.arange(size, size + len(ids) - unit.shared)])  # of the sample's tokens
            add_run(sample, slice(unit.shared, None), where)
            predicted = np.flatnonzero(sample.loss_mask[1:]) + 1
            alike = np.full((3, len(predicted)), [[i], [sample.advantage], [weights[i]]])
            loss.append((where[predicted - 1], ids[predicted], *alike, sample.logprobs[predicted]))

    def tensor(parts: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(dtype).to(device, non_blocking=True)

    def bounds(parts: Sequence[np.ndarray]) -> tuple[torch.Tensor, int]:
        lengths = [len(part) for part in parts]
        return tensor([np.cumsum([0, *lengths])], torch.int32), max(lengths)

    dtypes = (torch.int64, torch.int64, torch.int64, torch.float32, torch.float32, torch.float32)
    columns = [tensor(parts, dtype) for parts, dtype in zip(zip(*loss, strict=True), dtypes, strict=True)]
    shared = tensor(keys, torch.int64) if any(unit.shared for unit in units) else None
    runs = Runs(*bounds(token_ids), *bounds(keys), shared)
    batch = Batch(tensor(token_ids, torch.int64), tensor(positions, torch.int64), runs, *columns)
    if (routes := _routes(parts)) is not None:
        experts_TLK = torch.from_numpy(routes).to(device, non_blocking=True)
        batch.replay = RoutingReplay(experts_TLK, torch.zeros(2, dtype=torch.int64, device=device))
    return batch
