"""One GRPO update: packed micro-batches, loss, gradients, optimizer steps, and the numbers that they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import torch

from fastgrpo.config import Grpo
from fastgrpo.ranks.collectives import over_ranks
from fastgrpo.training.advantage import less_kl
from fastgrpo.training.flops import training_flops
from fastgrpo.training.fsdp_optimizer import ShardedAdamW
from fastgrpo.training.loss import policy_loss, token_logprobs
from fastgrpo.training.optimizer import AdamW
from fastgrpo.training.packing import rank_batches
from fastgrpo.types import Batch, Sample

if TYPE_CHECKING:
    from fastgrpo.policy.model import Policy

TOKEN_MEANS = ("entropy", "kl", "clip_fraction", "importance_capped", "sampler_parity")


def update(
    policy: Policy,
    optimizer: AdamW | ShardedAdamW,
    samples: Sequence[Sample],
    config: Grpo,
    reference: Policy | None = None,
    *,
    budget: int,
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
    before_step: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """`config.epochs_per_batch` optimizer steps on each of `config.mini_batches` parts of all ranks' `samples`.

    Returns the step's metrics, which are the first optimizer step's, but for `clip_fraction`, the last one's.

    Each rank computes its share in micro-batches of at most `budget` tokens. `phase` is entered with the name of what
    is timed; the weights stay as they are until `before_step` returns. An empty `samples` (no group with variance)
    leaves the policy as it is.

    Samples from weights before the present ones (`grpo.max_lag`) are corrected by the ratio to the policy that sampled
    them, vLLM's own logprobs token by token, and the loss's clip truncates it: PPO with the behaviour policy as the old
    one (arXiv 1707.06347, eq. 7), CISPO's truncated weight, GSPO's sequence ratio. `tis_cap` then has nothing left to
    correct. Decoupled PPO (AReaL, arXiv 2505.24298) would clip around the present policy instead and correct by
    min(ratio, `tis_cap`) alone; with one step a batch nothing is clipped then, and the demo's rewards fell. All
    steps on a batch have that old policy; the first of them waits for the engine, which then waits until the last.

    Where samples have `routes`, the policy's experts are those (`policy.routing_replay`), in the old logprobs too, and
    `rerouted` is the share of pairs of a token and a layer in which its own choice would be another.

    `sampler_parity` (mean and max, nats) compares vLLM's logprobs with the trainer's before the first step; with
    `max_lag` it includes what the updates since have moved, and only the sync's check speaks of the weights.
    """
    parts = [
        rank_batches(part, config.normaliser, config.max_new_tokens, budget, policy.device)
        for part in in_parts(samples, config.mini_batches)
    ]
    parts = [batches for batches in parts if batches]
    in_reward = config.kl_weight > 0 and config.kl_estimator == "k1_reward"
    for batch in chain.from_iterable(parts):
        if config.max_lag:
            batch.old_logprobs_N = batch.sampled_logprobs_N
        elif config.epochs_per_batch * len(parts) > 1 or in_reward:
            batch.old_logprobs_N = token_logprobs(policy, batch, config.temperature)
        if reference is not None:
            # The reference is another policy, whose experts are its own choice.
            batch.ref_logprobs_N = token_logprobs(reference, replace(batch, replay=None), config.temperature)
            if in_reward:
                batch.advantages_N = less_kl(batch, config.kl_weight)
    metrics = {"samples": float(len(samples)), "loss_tokens": float(sum(sample.loss_tokens for sample in samples))}
    for number, batches in enumerate(parts * config.epochs_per_batch):
        with phase("forward_backward"):
            sums = _accumulate(policy, batches, config) | {"flop": training_flops(policy.model, batches)}
            measured = _token_means(over_ranks(sums, dict.fromkeys(sums, sum) | {"sampler_parity_max": max}))
        before_step()
        with phase("optimizer"):
            step = optimizer.step()
            if policy.device.type == "cuda":
                torch.cuda.synchronize(policy.device)
        measured |= {"grad_norm": step.grad_norm, "skipped": float(step.skipped), "lr": optimizer.lr}
        # Later ones are off-policy by design: parity and entropy are those of the policy that sampled.
        later = ("clip_fraction", "grad_norm", "skipped") if step.skipped else ("clip_fraction",)
        if 0 < number < len(parts):
            metrics["flop"] += measured["flop"]
        metrics = metrics | {name: measured[name] for name in later} if number else measured | metrics
    return metrics


def in_parts(samples: Sequence[Sample], count: int) -> list[Sequence[Sample]]:
    """`samples` in `count` parts, neighbours together, whose sizes differ by one at most."""
    ends = [len(samples) * number // count for number in range(count + 1)]
    return [samples[first:end] for first, end in pairwise(ends)]


def _accumulate(policy: Policy, batches: Sequence[Batch], config: Grpo) -> dict[str, float]:
    """Gradients of the whole step, summed over micro-batches, and its statistics (read from the device once).

    Those of `TOKEN_MEANS` are sums over "tokens", so that ranks with unequal shares add up to one mean.
    """
    loss, statistics, gaps = torch.zeros((), dtype=torch.float32, device=policy.device), None, []
    counts_2 = torch.zeros(2, dtype=torch.int64, device=policy.device)
    for batch in batches:
        if batch.replay is not None:
            # Of the passes with a gradient alone.
            batch.replay.counts_2 = counts_2
        output = policy_loss(policy, batch, config)
        policy.backward(output.loss)
        loss += output.loss.detach()
        statistics = output.statistics if statistics is None else statistics.merge(output.statistics)
        gaps.append((output.logprobs_N - batch.sampled_logprobs_N).abs())
    gap_N = torch.cat(gaps)
    # Dropped tokens have no logprob; a rank may have been given nothing but those.
    gap_N = gap_N[gap_N.isfinite()]
    assert statistics is not None, "an update has at least one batch"
    return {
        "loss": float(loss),
        "tokens": float(statistics.tokens),
        "entropy": float(statistics.entropy),
        "kl": float(statistics.kl),
        "clip_fraction": float(statistics.clipped_low + statistics.clipped_high),
        "importance_capped": float(statistics.importance_capped),
        "sampler_parity": float(gap_N.sum()),
        "sampler_parity_max": float(gap_N.max()) if len(gap_N) else 0.0,
        "replayed": float(counts_2[0]),
        "rerouted": float(counts_2[1]),
    }


def _token_means(sums: dict[str, float]) -> dict[str, float]:
    tokens, replayed, rerouted = max(sums.pop("tokens"), 1.0), sums.pop("replayed"), sums.pop("rerouted")
    means = {name: total / tokens if name in TOKEN_MEANS else total for name, total in sums.items()}
    return means | ({"rerouted": rerouted / replayed} if replayed else {})
