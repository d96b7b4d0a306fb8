"""A weight sync: the policy's weights are vLLM's, and the logprobs of a canary show that vLLM samples from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastgrpo.engine.shared_weights import adopt_weights
from fastgrpo.errors import UserError

if TYPE_CHECKING:
    from fastgrpo.policy.model import Policy

CANARY_SEQUENCES, CANARY_TOKENS = 4, 48
# The bound where vLLM has an FP8 KV cache, over the one where it has not: e4m3 rounds 16 times as coarsely as bfloat16,
# but keys and values alone. It is too coarse for keys with large biases (Qwen2.5: bench/results/engine.md).
FP8_PARITY = 4.0
COARSE = (
    ", or an FP8 KV cache is too coarse for this model's keys: set engine.kv_cache_dtype to auto, or raise "
    "engine.parity_threshold"
)


class ParityError(UserError):
    """vLLM and the trainer disagree on the canary's logprobs: vLLM does not sample from the policy's weights."""


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
        permitted where vLLM has an FP8 KV cache (`fp8_cache`).
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
        ours = torch.cat(policy.logprobs(self._canary)).cpu()
        difference = (ours - torch.tensor([one for scores in score(self._canary) for one in scores])).abs()
        mean = float(difference.mean())
        if not mean <= self._threshold:
            raise ParityError(
                f"after a weight sync vLLM and the trainer differ by {mean:.3g} nats a token on the "
                f"canary (limit {self._threshold:g}): vLLM is not sampling from the policy's weights"
                + (COARSE if self._fp8_cache else "")
            )
        checked = time.perf_counter() - synced
        return SyncReport(synced - start, bytes_copied, checked, mean, float(difference.max()))

    def release(self) -> None:
        """vLLM is about to go: the policy that lives in its memory gets its own."""
        if self._adopted is not None:
            self._adopted.own_weights()
