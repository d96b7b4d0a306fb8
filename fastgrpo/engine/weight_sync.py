"""A weight sync: the policy's weights are vLLM's, and the logprobs of a canary show that vLLM samples from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgrpo.engine.shared_weights import adopt_weights
from fastgrpo.errors import UserError

if TYPE_CHECKING:
    from fastgrpo.policy.model import Policy

CANARY_SEQUENCES, CANARY_TOKENS = 4, 48
# In standard deviations of the trainer's logprobs on the canary: other weights of one kind of model differ by 1.1 (the
# mean between two normal draws), by 0.95 where one matrix of the first layer is another. The right ones over an FP8 KV
# cache differ by 0.02 from the trainer's over keys and values rounded so, by 0.2 in Qwen2.5, whose keys have large
# biases; with what a GPU's kernels round besides, by simulation, by 0.15 in random models (bench/results/engine.md).
UNLIKE = 0.5
# Where all logits are nearly one, nats.
UNLIKE_NATS = 1e-3
# How far an FP8 KV cache may take vLLM from the trainer, over what is permitted without: e4m3 rounds 16 times as
# coarsely as bfloat16, but keys and values alone. It is too coarse for keys with large biases.
FP8_PARITY = 4.0
OTHER_WEIGHTS = "vLLM is not sampling from the policy's weights"
COARSE = (
    "an FP8 KV cache is too coarse for this model's keys: set engine.kv_cache_dtype to auto, or raise "
    "engine.parity_threshold"
)


class ParityError(UserError):
    """vLLM and the trainer disagree on the canary's logprobs: other weights, or an FP8 KV cache that is too coarse."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a weight sync cost, and the canary's |logprob difference| between vLLM and the trainer, in nats.

    `bytes_copied` on this rank: of a sharded policy's weights, what was gathered to be handed to vLLM. An engine that
    goes on decoding is not checked: then both differences are nan.
    """

    seconds: float
    bytes_copied: int
    check_seconds: float
    parity_mean: float
    parity_max: float


class WeightSync:
    """The weights of one `vllm_model`, the policy that lives in them, and the canary: random tokens by `seed`."""

    def __init__(
        self, vllm_model: Any, vocab: int, max_model_len: int, threshold: float, seed: int, *, fp8_cache: bool
    ) -> None:
        """`threshold`: the canary's largest permitted mean |logprob difference|, nats; `FP8_PARITY` times as much is
        permitted where vLLM has an FP8 KV cache (`fp8_cache`). Whatever it is, vLLM must be nearer to the policy than
        other weights would be (`UNLIKE`).
        """
        self._model, self._fp8_cache = vllm_model, fp8_cache
        self._threshold = threshold * (FP8_PARITY if fp8_cache else 1.0)
        self._adopted: Policy | None = None
        generator = torch.Generator().manual_seed(seed)
        shape = (CANARY_SEQUENCES, min(CANARY_TOKENS, max_model_len - 1))
        self._canary: list[list[int]] = torch.randint(vocab, shape, generator=generator).tolist()

    def __call__(
        self,
        policy: Policy,
        renew: Callable[[], object],
        score: Callable[[Sequence[list[int]]], list[list[float]]] | None,
    ) -> SyncReport:
        """One sync. `renew` tells vLLM; `score` gives vLLM's logprobs, or is None where it is busy: nothing is checked.

        Raises ParityError above the threshold.
        """
        start = time.perf_counter()
        bytes_copied = 0
        if self._adopted is not policy or not policy.shares_weights:
            if self._adopted is not None and self._adopted is not policy:
                self._adopted.own_weights()
            bytes_copied = adopt_weights(policy, self._model)
            self._adopted = policy
        renew()
        synced = time.perf_counter()
        if score is None:
            return SyncReport(synced - start, bytes_copied, 0.0, math.nan, math.nan)
        theirs = torch.tensor([one for scores in score(self._canary) for one in scores], dtype=torch.float32)
        difference = self._checked(policy, theirs)
        checked = time.perf_counter() - synced
        return SyncReport(synced - start, bytes_copied, checked, float(difference.mean()), float(difference.max()))

    def _checked(self, policy: Policy, theirs: Tensor) -> Tensor:
        """|logprob difference| of the canary's tokens, nats. Raises ParityError, which says whose fault it is."""
        ours = torch.cat(policy.logprobs(self._canary)).cpu()
        # What the policy's weights say over such a cache: what is left of the difference is not the cache's.
        alike = torch.cat(policy.logprobs(self._canary, fp8_cache=True)).cpu() if self._fp8_cache else ours
        difference = (ours - theirs).abs()
        _refuse_beyond((alike - theirs).abs(), max(UNLIKE * float(ours.std()), UNLIKE_NATS), OTHER_WEIGHTS)
        _refuse_beyond(difference, self._threshold, COARSE if self._fp8_cache else OTHER_WEIGHTS)
        return difference

    def release(self) -> None:
        """vLLM is about to go: the policy that lives in its memory gets its own."""
        if self._adopted is not None:
            self._adopted.own_weights()


def _refuse_beyond(difference: Tensor, limit: float, reason: str) -> None:
    mean = float(difference.mean())
    if not mean <= limit:
        raise ParityError(
            f"after a weight sync vLLM and the trainer differ by {mean:.3g} nats a token on the canary "
            f"(limit {limit:.3g}): {reason}"
        )
