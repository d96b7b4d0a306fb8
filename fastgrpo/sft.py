"""Stage 1, warm start: `python -m fastgrpo.sft`. Distil a teacher's workflows, then fine-tune the policy on them."""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fastgrpo.config import Config, Sft
from fastgrpo.errors import UserError, writing
from fastgrpo.flow.distill import TeacherTrace, TraceFile, distill, read_traces, selected
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.problems.loading import load_problems
from fastgrpo.flow.task import open_environment
from fastgrpo.flow.teachers import ModelTeacher, ScriptedTeacher, Teacher
from fastgrpo.flow.types import Problem
from fastgrpo.plan import command_to_run, require_adapters, run_on_ranks, with_readable_model
from fastgrpo.policy.chat import Chat, load_chat
from fastgrpo.policy.demo_policy import create_policy
from fastgrpo.policy.loading import load_configured
from fastgrpo.policy.model import Policy
from fastgrpo.program import run_program
from fastgrpo.ranks.collectives import gather_all, is_first_rank, of_replica
from fastgrpo.record.log import RunLog, open_log, refuse_unshared
from fastgrpo.rollouts.asking import opened
from fastgrpo.signals import interruptible
from fastgrpo.tasks import digests_of, task_of, writes_workflows
from fastgrpo.training.fsdp_optimizer import optimizer_of
from fastgrpo.training.loss import sft_loss
from fastgrpo.training.manifest import flush
from fastgrpo.training.optimizer import AdamWOptions
from fastgrpo.training.packing import rank_batches
from fastgrpo.types import Sample

TRACES = "traces.jsonl"


async def warm_start(
    config: Config,
    environment: WorkflowEnvironment,
    problems: Sequence[Problem],
    log: RunLog,
    teacher: Teacher | None = None,
) -> Path:
    """The folder of the fine-tuned policy, in Hugging Face format; what an interrupted start did is not done again.

    `teacher` None is the one that is configured.
    """
    finished = config.folder / "sft"
    if finished.exists():
        return finished
    first = is_first_rank()
    if first:
        await _distill(config, environment, problems, log, teacher)
    gather_all(None, "the first rank's traces")
    traces = selected(read_traces(config.folder / TRACES), problems, config.sft)
    model = Path(config.model.path or config.folder / "initial")
    if first and not config.model.path:
        with writing(f"the initial policy {model}"):
            create_policy([trace.prompt + trace.text for trace in traces], model, seed=config.seed)
        log.say("without --model a small policy is made from the traces, the demo's, which knows nothing else")
    gather_all(None, "the first rank's initial policy")
    policy = load_configured(model, config)
    with interruptible():
        fit(policy, load_chat(model, config.model), traces, config, log)
    save_finished(policy, finished)
    gather_all(None, "the first rank's warm-started policy")
    return finished


def save_finished(policy: Policy, finished: Path) -> None:
    """Write the policy into the folder `finished`, which is whole or not there; collective.

    Raises `CannotWrite`, as where the disk is full: then nothing half-written stays.
    """
    partial, first = finished.with_suffix(".partial"), is_first_rank()
    try:
        with writing(f"the warm-started policy {finished}"):
            policy.save_hf(partial)
            if first:
                flush(partial)
                partial.rename(finished)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


async def _distill(
    config: Config,
    environment: WorkflowEnvironment,
    problems: Sequence[Problem],
    log: RunLog,
    teacher: Teacher | None,
) -> None:
    """The teacher's traces into the run's folder, less those that are there.

    Raises UserError where more failed than were made, or none is worth learning.
    """
    sft, traces, worker = config.sft, TraceFile(config.folder / TRACES), environment.worker
    if teacher is None:
        teacher = ScriptedTeacher(worker.names) if sft.teacher == "scripted" else ModelTeacher(worker)
    with log.phase("distill"):
        failures = await distill(
            environment,
            teacher,
            problems,
            traces,
            rounds=sft.rounds,
            samples=sft.teacher_samples,
            seed=config.seed,
            concurrency=config.workers.concurrency,
        )
    made = read_traces(traces.path)
    learned, wanted = len(selected(made, problems, sft)), len(problems) * sft.teacher_samples
    log.say(f"distilled {len(made)} of {wanted} traces of {len(problems)} problems; {learned} to learn from")
    if failures:
        reason, times = Counter(failures).most_common(1)[0]
        said = f"{len(failures)} traces failed, {times} of them because: {reason}"
        if len(made) < wanted / 2:
            raise UserError(f"{said}; mend that and continue with --resume: the {len(made)} that are made are kept")
        log.say(said)
    if not learned:
        raise UserError(
            f"none of the {len(made)} traces passes {sft.min_pass_rate:.0%} of the hidden tests: "
            "lower sft.min_pass_rate and continue with --resume, or choose another teacher"
        )


def fit(policy: Policy, chat: Chat, traces: Sequence[TeacherTrace], config: Config, log: RunLog) -> None:
    """Supervised fine-tuning on packed traces: the token mean of the completions' negative log-likelihood.

    The learning rate rises over the first tenth of the steps and falls by a cosine to a tenth of its peak.
    """
    samples = [to_sample(chat, trace) for trace in traces]
    steps = list(_schedule(samples, config.sft, config.seed))
    optimizer = optimizer_of(policy, AdamWOptions(lr=config.sft.lr), offload=config.model.offload_optimizer)
    log.stage("sft", len(steps))
    for step, chosen in enumerate(steps, 1):
        with log.phase("train"):
            loss = torch.zeros((), dtype=torch.float32, device=policy.device)
            for batch in rank_batches(chosen, "token", 1, config.grpo.micro_batch_tokens, policy.device):
                share = sft_loss(policy, batch)
                policy.backward(share)
                loss += share.detach()
            optimizer.lr = config.sft.lr * _decay(step, len(steps))
            norm = optimizer.step().grad_norm
        total = sum(gather_all(float(loss), "the losses of the other ranks"))
        log.step(step, {"loss": total, "grad_norm": norm, "lr": optimizer.lr})


def to_sample(chat: Chat, trace: TeacherTrace) -> Sample:
    """Prompt and completion as token ids, the loss on the completion alone."""
    prompt = chat.prompt_ids(trace.prompt)
    completion = chat.completion_ids(trace.text)
    return Sample(
        token_ids=np.array([*prompt, *completion], np.int32),
        loss_mask=np.repeat([False, True], [len(prompt), len(completion)]),
        logprobs=np.zeros(len(prompt) + len(completion), np.float32),
    )


def _schedule(samples: Sequence[Sample], config: Sft, seed: int) -> Iterator[list[Sample]]:
    """Shuffled samples of every epoch, cut into optimizer steps of about `batch_tokens` tokens."""
    for epoch in range(config.epochs):
        chosen: list[Sample] = []
        tokens = 0
        for sample in random.Random(f"{seed}/sft/{epoch}").sample(samples, len(samples)):
            chosen.append(sample)
            tokens += len(sample.token_ids)
            if tokens >= config.batch_tokens:
                yield chosen
                chosen, tokens = [], 0
        if chosen:
            yield chosen


def _decay(step: int, steps: int) -> float:
    warmup = max(steps // 10, 1)
    if step <= warmup:
        return step / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


async def teach(config: Config, *, resume: bool) -> Path:
    """Stage 1 as the run `config` has it, begun or gone on with: the folder of the fine-tuned policy."""
    refuse_other_task(config)
    require_adapters(config)
    refuse_unshared(config.folder)
    config = with_readable_model(config, again=resume)
    problems, _ = found = load_problems(config)
    data = digests_of(task_of(config), config, found) if is_first_rank() else {}
    with open_log(config, resume=resume, data=data) as log:
        async with of_replica(opened(open_environment(config, log)), config.engine.tensor_parallel) as environment:
            folder = await warm_start(config, environment, problems, log)
        log.say(f"the warm-started policy is in {folder}: continue with python -m fastgrpo.train --model {folder}")
    return folder


def refuse_other_task(config: Config) -> None:
    """Raises UserError where the run's task is not the workflows that a teacher writes."""
    if not writes_workflows(config):
        raise UserError("sft teaches workflows: leave out task, data.reward and data.environment")


def main() -> None:
    """Run stage 1 alone."""
    if command := command_to_run("fastgrpo.sft", lambda each: refuse_other_task(each.config), parts=["stage 1"]):
        run_on_ranks(command.config, lambda: teach(command.config, resume=command.resume))


if __name__ == "__main__":
    run_program(main)
