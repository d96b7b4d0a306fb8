"""What leaves the engine, and what it remembers of a request until then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished request. `logprobs[i]` is that of `token_ids[i]` under the distribution it was sampled from.

    `versions[i]` is the number, by `Engine.sync`, of the weights that sampled it.
    """

    key: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    versions: list[int]


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """An open request. `spans`: from which of its tokens on, counted from 0, weights of which version sample."""

    key: int
    spans: list[tuple[int, int]]

    def versions(self, tokens: int) -> list[int]:
        """The version of each of its `tokens`."""
        starts, versions = zip(*self.spans, strict=True)
        spans = zip(starts, [*starts[1:], tokens], versions, strict=True)
        return [version for start, end, version in spans for _ in range(start, end)]
