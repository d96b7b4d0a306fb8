"""Rewards into optimizer steps: advantages, packed micro-batches, loss, AdamW, weights into vLLM, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from fastgrpo.config import Config, Grpo
from fastgrpo.engine.engine import Engine
from fastgrpo.errors import UserError
from fastgrpo.plan import memory_plan
from fastgrpo.policy.chat import Chat, load_chat
from fastgrpo.policy.lora import adapter_state
from fastgrpo.policy.model import BasePolicy, Policy, load_config, load_policy
from fastgrpo.ranks.collectives import gather_all, over_ranks, rank_and_world
from fastgrpo.record.gpu import throughput, training_flops
from fastgrpo.rollouts.experience import Experience, plain_array, rollouts_over_ranks
from fastgrpo.runtime import open_engine, policy_device, policy_dtype
from fastgrpo.training.advantage import group_advantages
from fastgrpo.training.checkpoint import Checkpoints, load
from fastgrpo.training.fsdp_optimizer import ShardedAdamW, optimizer_of
from fastgrpo.training.loss import policy_loss, token_logprobs
from fastgrpo.training.memory import MemoryPlan
from fastgrpo.training.optimizer import AdamW, AdamWOptions
from fastgrpo.training.packing import rank_batches
from fastgrpo.types import Batch, Group, Rollout, Sample

if TYPE_CHECKING:
    from fastgrpo.record.log import PhaseTimer

EXPERIENCE, ADAPTERS = "experience.msgpack", "adapters.pt"
TOKEN_MEANS = ("entropy", "kl", "clip_fraction", "importance_capped", "sampler_parity")


class Learner:
    """The policy in training with all that steps it: optimizer, reference, vLLM, checkpoints. `step` counts updates.

    `experience`: this rank's finished rollouts for the next update. A checkpoint holds them, because with
    `grpo.max_lag` 1 they come from weights that are gone.

    Under torchrun there is one on each rank, and every method is collective.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        policy: Policy,
        chat: Chat,
        reference: Policy | None,
        plan: MemoryPlan,
    ) -> None:
        self.config, self.engine, self.policy, self.reference, self.plan = config, engine, policy, reference, plan
        self.chat = chat
        self.step = self.skipped = 0
        self.experience: Experience | None = None
        self.optimizer = optimizer_of(
            policy,
            AdamWOptions(
                lr=config.grpo.lr,
                betas=(config.grpo.beta1, config.grpo.beta2),
                weight_decay=config.grpo.weight_decay,
                max_grad_norm=config.grpo.max_grad_norm,
                skip_grad_norm=config.grpo.skip_grad_norm,
            ),
            offload=config.model.offload_optimizer,
        )
        self.checkpoints = Checkpoints(config.folder / "checkpoints", keep=config.checkpoint.keep)

    def update(self, timer: PhaseTimer, before_step: Callable[[], object] = lambda: None) -> dict[str, float]:
        """One GRPO update on all ranks' `experience`, which is used up; returns its metrics.

        `timer` times its phases. The weights stay as they are until `before_step` returns.
        Raises UserError where memory ran out, and after `grpo.max_skipped` steps in a row with a gradient that cannot
        be used.
        """
        grpo = self.config.grpo
        samples = self._all_samples()
        self.optimizer.lr = learning_rate(grpo, self.step)
        if not grpo.max_lag:
            self.engine.sleep()
        try:
            metrics = update(
                self.policy,
                self.optimizer,
                samples,
                grpo,
                self.reference,
                budget=self.plan.micro_batch_tokens,
                phase=timer.phase,
                before_step=before_step,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of GPU memory in training; {self.plan.advice()}") from error
        self._count_skipped(metrics, samples)
        self.step, self.experience = self.step + 1, None
        seconds = timer.spent("forward_backward") / grpo.epochs_per_batch
        tokens = sum(len(sample.token_ids) for sample in samples)
        return metrics | throughput(tokens, metrics.get("flop", 0.0), seconds, self.policy.device)

    def sync(self) -> dict[str, float]:
        """The updated weights into vLLM, in place, with the parity check that stops the run where it fails."""
        if not self.config.grpo.max_lag:
            self.engine.wake()
        report = self.engine.sync(self.policy)
        return {"parity": report.parity_mean, "parity_max": report.parity_max, "sync_seconds": report.seconds}

    def save(self, score: float | None = None) -> None:
        """A resumable checkpoint of the present step."""
        self.checkpoints.save(
            self.step,
            save_hf=self.policy.save_hf,
            save_state=self._save_state,
            config=self.config,
            score=score,
        )

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at `path`, whose weights, but for adapters, the policy has loaded already."""
        self.step = load(path, self.config, self._load_state)

    def _save_state(self, folder: Path) -> None:
        self.optimizer.save(folder)
        if self.policy.adapted and rank_and_world()[0] == 0:
            torch.save(adapter_state(self.policy.model), folder / ADAPTERS)
        if self.experience is not None:
            metrics = rollouts_over_ranks(self.experience.metrics)
            everything = Experience(self._all_samples(), metrics, self.experience.records)
            if rank_and_world()[0] == 0:
                (folder / EXPERIENCE).write_bytes(everything.to_bytes())

    def _load_state(self, folder: Path) -> None:
        self.optimizer.load(folder)
        if self.policy.adapted:
            saved = torch.load(folder / ADAPTERS, map_location=self.policy.device, weights_only=True)
            for name, tensor in adapter_state(self.policy.model).items():
                tensor.copy_(saved[name])
        if (folder / EXPERIENCE).exists():
            self.experience = Experience.from_bytes((folder / EXPERIENCE).read_bytes())
            if rank_and_world()[0] != 0:
                # On any number of ranks the first one holds them all.
                self.experience.samples = []
                self.experience.metrics = {}

    def _all_samples(self) -> list[Sample]:
        """The samples of all ranks, in rank order; collective."""
        assert self.experience is not None, "rollouts come before their update"
        shares = gather_all(self.experience.samples, "the rollouts of the other ranks")
        return [sample for share in shares for sample in share]

    def _count_skipped(self, metrics: dict[str, float], samples: Sequence[Sample]) -> None:
        """Keep the batch of a skipped step for inspection, and stop after too many in a row."""
        if not metrics.get("skipped"):
            self.skipped = 0
            return
        self.skipped += 1
        path = self.config.folder / f"skipped-{self.step + 1:06d}.pt"
        if rank_and_world()[0] == 0:
            torch.save(msgspec.to_builtins(samples, enc_hook=plain_array), path)
        if self.skipped >= self.config.grpo.max_skipped:
            raise UserError(
                f"{self.skipped} steps in a row had a gradient norm that cannot be used (the last one "
                f"{metrics['grad_norm']:g}); its batch is in {path}: lower grpo.lr, or raise grpo.skip_grad_norm"
            )


@contextmanager
def open_learner(config: Config, model: Path, *, resume: bool) -> Iterator[Learner]:
    """A learner that starts from the folder `model`, or with `resume` from the run's latest checkpoint."""
    checkpoint = Checkpoints(config.folder / "checkpoints").latest() if resume else None
    sharded = config.engine.tensor_parallel > 1
    settings: dict[str, Any] = {"device": policy_device(), "dtype": policy_dtype(config), "sharded": sharded}
    plan = memory_plan(config, load_config(model), ranks=rank_and_world()[1])
    # Ranks of one vLLM need one size of its cache, and all of them micro-batches of one size.
    plan = min(gather_all(plan, "the memory plans"), key=lambda plan: plan.capacity)
    # A checkpoint's weights have the adapters merged into them: with LoRA the base is the model's own.
    weights = model if config.model.lora_rank else checkpoint or model
    policy = load_policy(
        weights,
        gradient_checkpointing=config.model.gradient_checkpointing,
        compile_layers=config.model.compile,
        lora_rank=config.model.lora_rank,
        lora_alpha=config.model.lora_alpha,
        **settings,
    )
    reference: Policy | None = None
    if config.grpo.kl_weight > 0 and policy.adapted:
        reference = BasePolicy(policy.model, policy.tokenizer)
    elif config.grpo.kl_weight > 0:
        reference = load_policy(model, trained=False, **settings)
    with open_engine(config, weights, kv_cache_gib=plan.kv_cache_gib) as engine:
        learner = Learner(config, engine, policy, load_chat(weights, config.model), reference, plan)
        if checkpoint is not None:
            learner.restore(checkpoint)
        engine.sync(policy)
        yield learner


def learning_rate(config: Grpo, step: int) -> float:
    """The learning rate of the update after `step` others: linear warm-up, then constant or in linear decay.

    AdamW's first steps move every weight by the whole learning rate, whatever the gradient's size, hence the warm-up.
    """
    warmed = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.lr * warmed * (max(0.0, 1 - step / config.decay_steps) if config.decay_steps else 1.0)


def to_samples(groups: Sequence[Group], config: Grpo) -> list[Sample]:
    """The rollouts that the step's normaliser counts, with their advantages.

    Infrastructure failures are left out of their group's baseline and of the batch. A group without variance, whose
    advantages are all 0, leaves where tokens are counted, as in DAPO's batches (arXiv 2503.14476, eq. 11). The other
    normalisers run over all sequences sampled: there it counts, as empty samples, or as whole ones for a KL term.
    """
    rollouts = [(number, rollout) for number, group in enumerate(groups) for rollout in group.rollouts]
    rewards_R = torch.tensor([float("nan") if r.reward is None else r.reward.total for _, r in rollouts])
    group_ids_R = torch.tensor([number for number, _ in rollouts])
    advantages_R = group_advantages(rewards_R, group_ids_R, mode=config.advantage).tolist()
    varied = {number for (number, _), advantage in zip(rollouts, advantages_R, strict=True) if advantage != 0.0}
    return [
        _sample(rollout, advantage) if number in varied or config.kl_weight > 0.0 else Sample.empty()
        for (number, rollout), advantage in zip(rollouts, advantages_R, strict=True)
        if rollout.reward is not None and (number in varied or config.normaliser != "token")
    ]


def _sample(rollout: Rollout, advantage: float) -> Sample:
    return Sample(
        np.array(rollout.token_ids, np.int32),
        np.array(rollout.loss_mask, np.bool_),
        np.array(rollout.logprobs, np.float32),
        advantage,
    )


def update(
    policy: Policy,
    optimizer: AdamW | ShardedAdamW,
    samples: Sequence[Sample],
    config: Grpo,
    reference: Policy | None = None,
    *,
    budget: int,
    phase: Callable[[str], AbstractContextManager] = nullcontext,
    before_step: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """`config.epochs_per_batch` optimizer steps on `samples`, those of all ranks; returns the step's metrics.

    Each rank computes its share in micro-batches of at most `budget` tokens. `phase` is entered with the name of what
    is timed; the weights stay as they are until `before_step` returns. An empty `samples` (no group with variance)
    leaves the policy as it is.

    Samples from the weights before the present ones (`grpo.max_lag` 1) are corrected by the ratio to the policy that
    sampled them, vLLM's own logprobs, and the loss's clip truncates it: PPO with the behaviour policy as the old one
    (arXiv 1707.06347, eq. 7), CISPO's truncated weight, GSPO's sequence ratio. `tis_cap` then has nothing left to
    correct. Decoupled PPO (AReaL, arXiv 2505.24298) would clip around the present policy instead and correct by
    min(ratio, `tis_cap`) alone; with one step a batch nothing is clipped then, and the demo's rewards fell.

    `sampler_parity` (mean and max, nats) compares vLLM's logprobs with the trainer's before the first step; with
    `max_lag` 1 it includes what one update moved, and only the sync's check speaks of the weights.
    """
    batches = rank_batches(samples, config.normaliser, config.max_new_tokens, budget, policy.device)
    for batch in batches:
        if config.epochs_per_batch > 1:
            batch.old_logprobs_N = token_logprobs(policy, batch, config.temperature)
        if config.max_lag:
            batch.old_logprobs_N = batch.sampled_logprobs_N
        if reference is not None:
            batch.ref_logprobs_N = token_logprobs(reference, batch, config.temperature)
    metrics = {"samples": float(len(samples)), "loss_tokens": float(sum(sample.loss_tokens for sample in samples))}
    for epoch in range(config.epochs_per_batch if batches else 0):
        with phase("forward_backward"):
            sums = _accumulate(policy, batches, config) | {"flop": training_flops(policy.model, batches)}
            measured = _token_means(over_ranks(sums, dict.fromkeys(sums, sum) | {"sampler_parity_max": max}))
        before_step()
        with phase("optimizer"):
            step = optimizer.step()
            if policy.device.type == "cuda":
                torch.cuda.synchronize(policy.device)
        measured |= {"grad_norm": step.grad_norm, "skipped": float(step.skipped), "lr": optimizer.lr}
        # Later epochs are off-policy by design: parity and entropy are those of the policy that sampled.
        later = ("clip_fraction", "grad_norm", "skipped") if step.skipped else ("clip_fraction",)
        metrics = measured | metrics if epoch == 0 else metrics | {name: measured[name] for name in later}
    return metrics


def _accumulate(policy: Policy, batches: Sequence[Batch], config: Grpo) -> dict[str, float]:
    """Gradients of the whole step, summed over micro-batches, and its statistics (read from the device once).

    Those of `TOKEN_MEANS` are sums over "tokens", so that ranks with unequal shares add up to one mean.
    """
    loss, statistics, gaps = torch.zeros((), device=policy.device), None, []
    for batch in batches:
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
    }


def _token_means(sums: dict[str, float]) -> dict[str, float]:
    tokens = max(sums["tokens"], 1.0)
    return {name: total / tokens if name in TOKEN_MEANS else total for name, total in sums.items() if name != "tokens"}
