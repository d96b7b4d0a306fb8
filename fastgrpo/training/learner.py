"""Rewards into optimizer steps: advantages, packed micro-batches, loss, AdamW, weights into vLLM, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import torch

from fastgrpo.config import Config, Grpo
from fastgrpo.engine.opening import AnyEngine, open_engine
from fastgrpo.errors import UserError, writing
from fastgrpo.policy.chat import Chat, load_chat
from fastgrpo.policy.folder import load_config
from fastgrpo.policy.loading import load_configured
from fastgrpo.policy.lora import adapter_state
from fastgrpo.policy.model import BasePolicy, Policy
from fastgrpo.ranks.collectives import gather_all, gather_first, is_first_rank, rank_and_world
from fastgrpo.record.phases import PhaseTimer
from fastgrpo.rollouts.experience import Experience, Tally, from_bytes, plain_array, tally_over_ranks, to_bytes
from fastgrpo.training.checkpoint import STATE, Checkpoints, load
from fastgrpo.training.curriculum import Curriculum
from fastgrpo.training.flops import throughput
from fastgrpo.training.fsdp_optimizer import optimizer_of
from fastgrpo.training.memory import MemoryPlan
from fastgrpo.training.optimizer import AdamWOptions
from fastgrpo.training.packing import apart, joined
from fastgrpo.training.tensor_files import Part, on_host, save_parts
from fastgrpo.training.update import update
from fastgrpo.training.workload import memory_plan
from fastgrpo.types import Sample

EXPERIENCE, ADAPTERS, CURRICULUM = "experience.msgpack", "adapters.pt", "curriculum.json"


class Learner:
    """The policy in training with all that steps it: optimizer, reference, vLLM, checkpoints. `step` counts updates.

    `experiences`: this rank's finished rollouts for the next updates, in their order. A checkpoint holds them, because
    with `grpo.max_lag` they come from weights that are gone. `curriculum`: pass rates so far, the same on all ranks.

    Under torchrun there is one on each rank, and every method is collective.
    """

    def __init__(
        self,
        config: Config,
        engine: AnyEngine,
        policy: Policy,
        chat: Chat,
        reference: Policy | None,
        plan: MemoryPlan,
    ) -> None:
        self.config, self.engine, self.policy, self.reference, self.plan = config, engine, policy, reference, plan
        self.chat = chat
        self.step = self.skipped = 0
        self.experiences: list[Experience] = []
        self.curriculum = Curriculum()
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
            whole_gradients=plan.whole_gradients,
        )
        self.checkpoints = Checkpoints(config.folder / "checkpoints", keep=config.checkpoint.keep)

    def update(self, timer: PhaseTimer, before_step: Callable[[], object] = lambda: None) -> dict[str, float]:
        """One GRPO update on the first of all ranks' `experiences`, which is used up; returns its metrics.

        `timer` times its phases. The weights stay as they are until `before_step` returns.
        Raises UserError where memory ran out, and after `grpo.max_skipped` steps in a row with a gradient that cannot
        be used.
        """
        grpo = self.config.grpo
        assert self.experiences, "rollouts come before their update"
        samples = _all_samples(self.experiences[0])
        self.optimizer.lr = learning_rate(grpo, self.step)
        if self.plan.engine_sleeps:
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
            raise UserError(
                f"out of GPU memory in training; {self.plan.advice()}, then continue with --resume"
            ) from error
        self._count_skipped(metrics, samples)
        self.step += 1
        self.experiences.pop(0)
        seconds = timer.spent("forward_backward") / grpo.epochs_per_batch
        tokens = sum(len(sample.token_ids) for sample in samples)
        return metrics | throughput(tokens, metrics.get("flop", 0.0), seconds, self.policy.device)

    def sync(self) -> dict[str, float]:
        """The updated weights into vLLM, in place, with the parity check that stops the run where it fails.

        With `grpo.in_flight` the engine may be paused in its work, and then there is no check.
        """
        if self.plan.engine_sleeps:
            self.engine.wake()
        report = self.engine.sync(self.policy, version=self.step, in_flight=self.config.grpo.in_flight)
        checked = {"parity": report.parity_mean, "parity_max": report.parity_max}
        return {"sync_seconds": report.seconds} | ({} if math.isnan(report.parity_mean) else checked)

    def save(self, score: float | None = None, *, anew: bool = False) -> None:
        """Begin a resumable checkpoint of the present step; of one that has been saved its score, or all of it `anew`.

        This returns when the state is copied into host memory: it may change then. `checkpoints` writes it, and raises
        what it could not.
        """
        parts = self.optimizer.parts()
        self.checkpoints.save(
            self.step,
            take=partial(self._taken, parts),
            size=sum(part.block.nbytes for part in parts.values()) + self.policy.copied_bytes,
            config=self.config,
            score=score,
            anew=anew,
        )

    def join(self, step: int, experiences: Sequence[Experience]) -> None:
        """This rank's rollouts that were under way when the checkpoint of `step` was begun go into it."""
        self.checkpoints.add(step, EXPERIENCE, _encoded(experiences))

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at `path`, whose weights, but for adapters, the policy has loaded already."""
        self.step = load(path, self.config, self._load_state)

    def _taken(self, parts: dict[str, Part], copy: bool) -> Callable[[Path], None]:
        """What writes the present state, the optimizer's being `parts`, into a checkpoint's folder. Collective.

        With `copy` it may change meanwhile. What is returned is not collective.
        """
        held = on_host(parts) if copy else parts
        save_hf, files = self.policy.copied(), dict[str, bytes]()
        if self.config.grpo.curriculum:
            files[CURRICULUM] = self.curriculum.encoded()
        if self.policy.adapted:
            torch.save(adapter_state(self.policy.model), adapters := BytesIO())
            files[ADAPTERS] = adapters.getvalue()
        if self.experiences:
            files[EXPERIENCE] = _encoded(self.experiences)

        def write(folder: Path) -> None:
            save_parts(held, folder / STATE)
            save_hf(folder)
            for name, data in files.items() if is_first_rank() else ():
                (folder / STATE / name).write_bytes(data)

        return write

    def _load_state(self, folder: Path) -> None:
        self.optimizer.load(folder)
        if self.config.grpo.curriculum:
            self.curriculum.load(folder / CURRICULUM)
        if self.policy.adapted:
            saved = torch.load(folder / ADAPTERS, map_location=self.policy.device, weights_only=True)
            for name, tensor in adapter_state(self.policy.model).items():
                tensor.copy_(saved[name])
        if (folder / EXPERIENCE).exists():
            self.experiences = from_bytes((folder / EXPERIENCE).read_bytes())
            if not is_first_rank():
                # On any number of ranks the first one holds them all.
                self.experiences = [Experience([], Tally(), []) for _ in self.experiences]

    def _count_skipped(self, metrics: dict[str, float], samples: Sequence[Sample]) -> None:
        """Keep the batch of a skipped step for inspection, and stop after too many in a row."""
        if not metrics.get("skipped"):
            self.skipped = 0
            return
        self.skipped += 1
        path = self.config.folder / f"skipped-{self.step + 1:06d}.pt"
        if is_first_rank():
            with writing(path):
                torch.save(msgspec.to_builtins(samples, enc_hook=plain_array), path)
        if self.skipped >= self.config.grpo.max_skipped:
            raise UserError(
                f"{self.skipped} steps in a row had a gradient norm that cannot be used (the last one "
                f"{metrics['grad_norm']:g}); its batch is in {path}: lower grpo.lr, or raise "
                "grpo.skip_grad_norm, in a new run under another --name, from a checkpoint by --model"
            )


@contextmanager
def open_learner(config: Config, model: Path, *, resume: bool) -> Iterator[Learner]:
    """A learner that starts from the folder `model`, or with `resume` from the run's latest checkpoint.

    Its own are written when the block ends, whatever ends it.
    """
    latest = Checkpoints(config.folder / "checkpoints").latest() if resume else None
    # What another host's file system shows may be older.
    checkpoint = gather_all(latest, "the latest checkpoint")[0]
    plan = memory_plan(config, load_config(model), ranks=rank_and_world()[1])
    # Ranks of one vLLM need one size of its cache, and all of them micro-batches of one size.
    plan = min(gather_all(plan, "the memory plans"), key=lambda plan: plan.capacity)
    # A checkpoint's weights have the adapters merged into them: with LoRA the base is the model's own.
    weights = model if config.model.lora_rank else checkpoint or model
    policy = load_configured(weights, config)
    reference: Policy | None = None
    if config.grpo.kl_weight > 0 and policy.adapted:
        reference = BasePolicy(policy.model, policy.tokenizer)
    elif config.grpo.kl_weight > 0:
        reference = load_configured(model, config, trained=False)
    opened = open_engine(config, weights, kv_cache_gib=plan.kv_cache_gib, routes=config.grpo.routing_replay)
    with opened as engine:
        learner = Learner(config, engine, policy, load_chat(weights, config.model), reference, plan)
        if checkpoint is not None:
            learner.restore(checkpoint)
        engine.sync(policy, version=learner.step)
        with learner.checkpoints.written():
            yield learner


def _encoded(experiences: Sequence[Experience]) -> bytes:
    """All ranks' rollouts, complete on the first rank; collective."""
    return to_bytes(
        [Experience(_all_samples(each), tally_over_ranks(each.tally), _all_records(each)) for each in experiences]
    )


def _all_samples(experience: Experience) -> list[Sample]:
    """The samples of all ranks, in rank order; collective."""
    shares = gather_all(joined(experience.samples), "the rollouts of the other ranks")
    return [sample for share in shares for sample in apart(share)]


def _all_records(experience: Experience) -> list[dict[str, Any]]:
    """The records of all ranks' rollouts on the first rank; collective."""
    ranks = gather_first(experience.records, "the records of the other ranks' rollouts")
    return [record for rank in ranks for record in rank]


def learning_rate(config: Grpo, step: int) -> float:
    """The learning rate of the update after `step` others: linear warm-up, then constant or in decay.

    AdamW's first steps move every weight by the whole learning rate, whatever the gradient's size, hence the warm-up.
    """
    warmed = min(1.0, (step + 1) / (config.warmup_steps + 1))
    left = max(0.0, 1 - step / config.decay_steps) if config.decay_steps else 1.0
    share = (1 - math.cos(math.pi * left)) / 2 if config.decay == "cosine" else left
    return config.lr * warmed * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
