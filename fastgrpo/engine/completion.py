"""What leaves the engine, and what it remembers of a request until then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished request. `logprobs[i]` is that of `token_ids[i]` under the distribution it was sampled from.

    `versions[i]` is the number, by `Engine.sync`, of the weights that sampled it. `routes`, where they are recorded:
    the experts that the prompt's tokens and all but the last of `token_ids` had, [tokens, layers, k].
    """

    key: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    versions: list[int]
    routes: np.ndarray | None = None


@dataclass(slots=True)
class OpenRequest:
    """An open request. `spans`: from which of its tokens on, counted from 0, weights of which version sample.

    `routes`: `Completion`'s, at its end.
    """

    key: int
    spans: list[tuple[int, int]]
    routes: np.ndarray | None = None

    def versions(self, tokens: int) -> list[int]:
        """The version of each of its `tokens`."""
        starts, versions = zip(*self.spans, strict=True)
        spans = zip(starts, [*starts[1:], tokens], versions, strict=True)
        return [version for start, end, version in spans for _ in range(start, end)]


class Packed(NamedTuple):
    """Completions as a few arrays, to send: those of their tokens one after another, `lengths` to cut them."""

    keys: list[int]
    reasons: list[str]
    lengths: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    routes: list[np.ndarray | None]


def packed(completions: Sequence[Completion]) -> Packed:
    """The `completions` in arrays: int32, and float32, which vLLM's logprobs are; routes as they are."""
    return Packed(
        [completion.key for completion in completions],
        [completion.finish_reason for completion in completions],
        np.array([len(completion.token_ids) for completion in completions], np.int32),
        np.fromiter(chain.from_iterable(completion.token_ids for completion in completions), np.int32),
        np.fromiter(chain.from_iterable(completion.logprobs for completion in completions), np.float32),
        np.fromiter(chain.from_iterable(completion.versions for completion in completions), np.int32),
        [completion.routes for completion in completions],
    )


def unpacked(sent: Packed) -> list[Completion]:
    """What `packed` was given."""
    ends = np.cumsum(sent.lengths)
    return [
        Completion(
            key,
            sent.token_ids[start:end].tolist(),
            sent.logprobs[start:end].tolist(),
            reason,
            sent.versions[start:end].tolist(),
            routes,
        )
        for key, reason, routes, start, end in zip(
            sent.keys, sent.reasons, sent.routes, ends - sent.lengths, ends, strict=True
        )
    ]
