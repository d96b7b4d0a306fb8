"""A weight sync: the policy's weights are vLLM's, and the logprobs of a canary show that vLLM samples from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgrpo.engine.shared_weights import adopt_weights
from fastgrpo.errors import UserError

if TYPE_CHECKING:
    from fastgrpo.engine.engine import Engine
    from fastgrpo.engine.engine_process import EngineProcess
    from fastgrpo.policy.model import Policy

# The last tokens of each sequence are vLLM's own: the first of these comes of reading the others, the rest of decoding.
CANARY_SEQUENCES, CANARY_TOKENS, SAMPLED_TOKENS = 4, 48, 4
DECODED_TOKENS = SAMPLED_TOKENS - 1
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
# How far decoding may be from the trainer: so many times what reading is, and this share of the threshold in any case.
# By the median of its tokens' differences: they are few, and one token that a rounding sends to other experts is off by
# more than all the others together.
DECODE_TIMES, DECODE_SHARE = 4.0, 0.1
OTHER_WEIGHTS = "vLLM is not sampling from the policy's weights"
COARSE = (
    "an FP8 KV cache is too coarse for this model's keys: set engine.kv_cache_dtype to auto, or raise "
    "engine.parity_threshold"
)
OTHER_DECODING = (
    "vLLM reads prompts by the policy's weights and does not decode by them: set engine.enforce_eager to true, or "
    f"raise engine.parity_threshold, {DECODE_SHARE:g} of which decoding may differ by"
)


class ParityError(UserError):
    """vLLM and the trainer disagree on the canary's logprobs: other weights, decoding that does not follow them, or an
    FP8 KV cache that is too coarse."""


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
    """The weights of one `vllm_model`, the policy that lives in them, and the canary: random tokens by `seed`, and the
    tokens that vLLM samples after them, as it does in rollouts."""

    def __init__(
        self, vllm_model: Any, vocab: int, max_model_len: int, threshold: float, seed: int, *, fp8_cache: bool
    ) -> None:
        """`threshold`: the canary's largest permitted mean |logprob difference|, nats; `FP8_PARITY` times as much is
        permitted where vLLM has an FP8 KV cache (`fp8_cache`). Whatever it is, vLLM must be nearer to the policy than
        other weights would be (`UNLIKE`), and decode as it reads (`DECODE_TIMES`).
        """
        self._model, self._vocab, self._seed, self._fp8_cache = vllm_model, vocab, seed, fp8_cache
        self._threshold = threshold * (FP8_PARITY if fp8_cache else 1.0)
        self._adopted: Policy | None = None
        generator = torch.Generator().manual_seed(seed)
        shape = (CANARY_SEQUENCES, min(CANARY_TOKENS, max_model_len) - SAMPLED_TOKENS)
        self._canary: list[list[int]] = torch.randint(vocab, shape, generator=generator).tolist()

    def __call__(
        self, policy: Policy, renew: Callable[[], object], engine: Engine | EngineProcess | None
    ) -> SyncReport:
        """One sync. `renew` tells vLLM; the `engine` reads and continues the canary, or is None where it is busy:
        nothing is checked.

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
        if engine is None:
            return SyncReport(synced - start, bytes_copied, 0.0, math.nan, math.nan)
        difference = self._checked(policy, engine)
        checked = time.perf_counter() - synced
        return SyncReport(synced - start, bytes_copied, checked, float(difference.mean()), float(difference.max()))

    def _checked(self, policy: Policy, engine: Engine | EngineProcess) -> Tensor:
        """|logprob difference| of the canary's tokens, nats. Raises ParityError, which says whose fault it is."""
        scores = engine.score(self._canary)
        # What is sampled of such logits may be in no vocabulary, and a GPU would end at looking it up.
        if not math.isfinite(sum(map(sum, scores))):
            raise ParityError(f"after a weight sync vLLM's logprobs on the canary are not finite: {OTHER_WEIGHTS}")
        sampled = engine.complete(self._canary, max_tokens=SAMPLED_TOKENS, seed=self._seed)
        self._refuse_unknown(token for one in sampled for token in one.token_ids)
        theirs_ST = torch.tensor([read + one.logprobs for read, one in zip(scores, sampled, strict=True)])
        sequences = [prompt + one.token_ids for prompt, one in zip(self._canary, sampled, strict=True)]
        ours_ST = torch.stack(policy.logprobs(sequences)).cpu()
        # What the policy's weights say over such a cache: what is left of the difference is not the cache's.
        alike_ST = torch.stack(policy.logprobs(sequences, fp8_cache=True)).cpu() if self._fp8_cache else ours_ST
        difference_ST, unlike_ST = (ours_ST - theirs_ST).abs(), (alike_ST - theirs_ST).abs()
        read, decoded = slice(None, -DECODED_TOKENS), slice(-DECODED_TOKENS, None)
        reading, deviation = float(unlike_ST[:, read].mean()), float(ours_ST[:, read].std())
        _refuse_beyond(reading, max(UNLIKE * deviation, UNLIKE_NATS), OTHER_WEIGHTS)
        coarse = COARSE if self._fp8_cache else OTHER_WEIGHTS
        _refuse_beyond(float(difference_ST[:, read].mean()), self._threshold, coarse)
        limit = max(DECODE_TIMES * reading, DECODE_SHARE * self._threshold)
        _refuse_beyond(float(unlike_ST[:, decoded].median()), limit, OTHER_DECODING, " while decoding")
        return difference_ST

    def _refuse_unknown(self, tokens: Iterable[int]) -> None:
        """Raises ParityError at one of `tokens` that the trainer could not look up."""
        for token in tokens:
            if not 0 <= token < self._vocab:
                raise ParityError(
                    f"after a weight sync vLLM samples the token {token} on the canary, of a vocabulary of "
                    f"{self._vocab}: {OTHER_WEIGHTS}"
                )

    def release(self) -> None:
        """vLLM is about to go: the policy that lives in its memory gets its own."""
        if self._adopted is not None:
            self._adopted.own_weights()


def _refuse_beyond(difference: float, limit: float, reason: str, when: str = "") -> None:
    if not difference <= limit:
        raise ParityError(
            f"after a weight sync vLLM and the trainer differ by {difference:.3g} nats a token{when} on the canary "
            f"(limit {limit:.3g}): {reason}"
        )
