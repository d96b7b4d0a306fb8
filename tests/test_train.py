"""The whole loop: a task of one's own on the real engine, and the demo with real jails, interrupted and resumed."""

import asyncio
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import msgspec
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

import fastgrpo
from fastgrpo import train as programs
from fastgrpo.cli import parse
from fastgrpo.config import Config
from fastgrpo.config_files import read_toml
from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.evaluation import read_rows
from fastgrpo.policy import hub
from fastgrpo.policy.chat import Chat
from fastgrpo.policy.demo_policy import create_policy
from fastgrpo.policy.loading import load_policy
from fastgrpo.record.phases import PhaseTimer
from fastgrpo.rollouts import experience
from fastgrpo.rollouts.experience import Experience, Tally
from fastgrpo.solve import refuse
from fastgrpo.tasks import Task, problems_of, reward_task
from fastgrpo.train import refuse_idle_ranks, train
from fastgrpo.training import learner
from fastgrpo.training.curriculum import draw_problems
from fastgrpo.training.learner import Learner, learning_rate, update
from fastgrpo.training.loss import policy_loss, token_logprobs
from fastgrpo.training.memory import MemoryPlan
from fastgrpo.training.optimizer import AdamW, AdamWOptions, StepReport
from fastgrpo.training.packing import rank_batches
from fastgrpo.types import Result, Reward, Sample
from tests.helpers.full_disk import full_disk
from tests.helpers.random_engine import random_engine
from tests.helpers.runs import run_without_report

CORPUS = ["count the vowels in this sentence", "aeiou bcdfg"] * 4


class Vowels:
    """A task without jails: the reward is the share of vowels in the completion, after what is done `before`."""

    def __init__(self, before: Callable[[Any], Awaitable[None]] | None = None) -> None:
        self.before = before

    def prompt(self, problem) -> str:
        return problem.prompt

    async def execute(self, problem, completion: str, seed: int) -> float:
        if self.before is not None:
            await self.before(problem)
        return share(completion)

    def feedback_text(self, execution) -> str:
        return "again"

    def results(self, problem, rollouts):
        return [Result(reward=Reward(total=rollout.executions[-1])) for rollout in rollouts]


def share(text: str) -> float:
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)


def opened(environment: Any):
    """What opens it, as a task has it."""
    return lambda config, log: nullcontext(environment)


open_vowels = opened(Vowels())


@asynccontextmanager
async def open_interrupting(config, log):
    """Cancels the run at its fifth execution, as Ctrl-C does."""
    left, run = iter(range(4, -(10**6), -1)), asyncio.current_task()

    async def cancel(problem) -> None:
        if next(left) == 0:
            run.cancel()

    yield Vowels(cancel)


@asynccontextmanager
async def open_on_a_full_disk(config, log):
    """No file of this process may grow past 60 kB, as on a disk that has filled up: the log still fits."""
    with full_disk(60_000):
        yield Vowels()


def load_vowels(config):
    problems = [SimpleNamespace(id=f"p{i}", prompt=f"count {i}", difficulty=i / 8) for i in range(8)]
    return problems[:6], problems[6:]


NOT_HELD_OUT = (load_vowels(None)[0], [])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    create_policy(CORPUS, folder, seed=0, vocab_size=400)
    return folder


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions are drawn at random."""
    monkeypatch.setattr(learner, "open_engine", random_engine)


# What makes an engine and a step small.
SMALL = {
    "engine.max_model_len": 64,
    "engine.kv_cache_gib": 0.05,
    "grpo.prompts_per_step": 2,
    "grpo.group_size": 4,
    "grpo.max_new_tokens": 16,
}


def run(
    model: Path | str, runs: Path, name: str, *, resume: bool = False, environment=open_vowels, problems=None, **values
) -> Path:
    values = {
        **SMALL,
        "model.path": str(model),
        "runs": str(runs),
        "name": name,
        "engine.max_num_seqs": 16,
        "grpo.lr": 1e-3,
        "grpo.micro_batch_tokens": 128,
        "eval.samples": 2,
        "checkpoint.every": 2,
    } | {key.replace("__", "."): value for key, value in values.items()}
    task = Task(lambda _: problems or load_vowels(_), environment)
    return run_without_report(resolve(values), task, resume=resume)


def test_a_model_that_cannot_be_used_leaves_an_earlier_run_where_it_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/good").mkdir(parents=True)
    (tmp_path / "runs/good/metrics.jsonl").write_text("{}")
    shutil.copytree(model, tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer_config"):
        run(tmp_path / "model", tmp_path / "runs", "good")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["good"]


def test_a_run_that_lacks_the_package_of_its_adapters_leaves_an_earlier_one_where_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good/config.toml").touch()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model\.lora_rank needs peft, .*: pip install 'fastgrpo\[lora\]'"):
        run(model, tmp_path, "good", model__lora_rank=4)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def metrics(folder: Path) -> list[dict]:
    # Of a run that goes on the last line may be half written.
    lines = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == "grpo"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def test_the_first_rank_says_which_checkpoint_is_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system of another host may show one that is older, or was set aside."""
    monkeypatch.setattr(learner, "open_engine", random_engine)
    folder = run(model, tmp_path, "run", grpo__steps=1, checkpoint__every=1)
    config = resolve(read_toml(folder / "config.toml"))
    said = {"the latest checkpoint": None}
    monkeypatch.setattr(learner, "gather_all", lambda own, what: [said.get(what, own), own])
    with learner.open_learner(config, model, resume=True) as resumed:
        assert resumed.step == 0


@pytest.mark.engine
def test_two_steps_resumed_for_two_more_are_four_steps(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, tmp_path, "whole", grpo__steps=4)
    halves = run(model, tmp_path, "halves", grpo__steps=2)
    with monkeypatch.context() as patch:
        # Whatever the steps were that a full disk lost, they are made anew.
        patch.setattr(learner, "open_engine", random_engine)
        lost = r"cannot write the checkpoint .*step-000004: .*; free space, then .*--resume"
        with pytest.raises(UserError, match=lost):
            run(model, tmp_path, "halves", resume=True, grpo__steps=4, environment=open_on_a_full_disk)
    run(model, tmp_path, "halves", resume=True, grpo__steps=4)
    assert [row["step"] for row in metrics(halves)] == [1, 2, 3, 4]
    for one, other in zip(metrics(whole), metrics(halves), strict=True):
        for name in ("loss", "reward/total", "grad_norm", "entropy", "loss_tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), (one["step"], name)
    expected = weights(whole)
    assert expected.keys() == weights(halves).keys()
    for name, tensor in weights(halves).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    # float32 on a CPU, bfloat16 on a GPU.
    rounding = 1e-4 if not torch.cuda.is_available() else 2e-2
    assert max(row["parity"] for row in metrics(halves)) < rounding
    assert max(row["sampler_parity"] for row in metrics(halves)) < rounding


async def checksum(self: Vowels, problem: Any, completion: str, seed: int) -> float:
    return zlib.crc32(completion.encode()) % 7


@pytest.mark.parametrize("lag", [0, 2])
def test_held_out_problems_are_measured_while_it_trains_and_change_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_vllm: None, lag: int
) -> None:
    monkeypatch.setattr(Vowels, "execute", checksum)
    keys = {"grpo__steps": 5, "grpo__max_lag": lag, "checkpoint__every": 1, "checkpoint__keep": 1}
    plain = run(model, tmp_path, "plain", **keys)
    measured = run(model, tmp_path, "measured", eval__every=2, **keys)
    found = {row["step"]: row["held_out/reward"] for row in metrics(measured) if "held_out/reward" in row}
    assert found.keys() == {1, 3, 5}  # before the first step, after steps 2 and 4, by the weights that these begin with
    ended = [row.reward for row in read_rows(measured / "evaluation.json") if row.stage == "grpo"]
    assert list(found.values()) == [pytest.approx(sum(ended) / len(ended))] * 3  # one draw, by this engine's seeds
    assert all(row["grad_norm"] > 0 for row in metrics(plain))
    for name in ("step", "loss", "grad_norm", "reward/total"):
        assert [row.get(name) for row in metrics(plain)] == [row.get(name) for row in metrics(measured)]
    assert {row.stage for row in read_rows(measured / "evaluation.json")} == {"sft", "grpo"}


def test_the_best_of_the_measured_checkpoints_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = iter([0.1, 0.2, 0.9, 0.3, 0.4])
    monkeypatch.setattr(programs, "summary", lambda rows: {"reward": next(rewards)})
    keys = {"checkpoint__every": 1, "checkpoint__keep": 1, "eval__every": 1}
    folder = run(model, tmp_path, "best", grpo__steps=4, **keys)
    assert [row.get("held_out/reward") for row in metrics(folder)] == [0.1, 0.2, 0.9, 0.3]
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-000002", "step-000004"]
    said = "".join(capsys.readouterr().out.split())
    assert f"checkpointsthatarekept:{folder}/checkpoints/step-000002" in said
    assert "nomultiple" not in said
    assert "problems:6totrainon;2heldouttoevaluateon" in said
    assert "36 to train on; a step draws 64, some of them more than once; 44 held" in programs.how_many(36, 44, 64)


def test_an_evaluation_of_which_all_failed_ends_no_training(
    model: Path, tmp_path: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = iter(range(100))

    async def fail(problem) -> None:
        if problem.id in ("p6", "p7") and 4 <= next(held_out) < 8:
            raise OSError("no worker answers")

    keys = {"grpo__steps": 3, "eval__every": 1, "checkpoint__every": 2}
    folder = run(model, tmp_path, "failing", environment=opened(Vowels(fail)), **keys)
    assert ["held_out/reward" in row for row in metrics(folder)] == [True, False, True]
    said = " ".join(capsys.readouterr().out.split())
    assert "step 1: nothing was evaluated: all 4 rollouts failed" in said
    assert "eval.every = 1 is no multiple of checkpoint.every = 2: only the evaluations every 2 steps" in said


def test_every_problem_comes_once_in_an_epoch_whatever_the_step_size() -> None:
    config = resolve({"grpo.prompts_per_step": 4})
    drawn = [problem for step in range(5) for problem in draw_problems(list(range(10)), config, step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert draw_problems(list(range(10)), config, 3) == drawn[12:16]


def test_the_learning_rate_rises_then_stays_or_falls_to_nothing() -> None:
    constant = resolve({"grpo.lr": 1.0, "grpo.warmup_steps": 3}).grpo
    assert [learning_rate(constant, step) for step in (0, 1, 3, 100)] == [0.25, 0.5, 1.0, 1.0]
    falling = resolve({"grpo.lr": 1.0, "grpo.warmup_steps": 0, "grpo.decay_steps": 4}).grpo
    assert [learning_rate(falling, step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    cosine = msgspec.structs.replace(falling, decay="cosine", min_lr_ratio=0.1)
    half = 0.5 * 0.9 + 0.1
    side = 0.45 * math.sqrt(0.5)
    expected = [1.0, half + side, half, half - side, 0.1, 0.1]
    assert [learning_rate(cosine, step) for step in range(6)] == pytest.approx(expected)


def test_a_gradient_that_is_not_finite_is_skipped_and_leaves_the_policy_as_it_is(model: Path) -> None:
    policy = load_policy(model)
    before = policy.head_weight.detach().clone()
    optimizer = AdamW(policy.model.parameters(), AdamWOptions(lr=1e-2))
    poisoned = [Sample([1, 2, 3, 4], [0, 1, 1, 1], [0.0, -1.0, -1.0, -1.0], advantage=float("inf"))]
    report = update(policy, optimizer, poisoned, Config().grpo, budget=64)
    assert report["skipped"] == 1.0
    assert torch.equal(policy.head_weight, before)
    healthy = [Sample([1, 2, 3, 4], [0, 1, 1, 1], [0.0, -1.0, -1.0, -1.0], advantage=1.0)]
    assert update(policy, optimizer, healthy, Config().grpo, budget=64)["skipped"] == 0.0
    assert not torch.equal(policy.head_weight, before)


def test_mini_batches_are_steps_on_parts_by_the_policy_that_sampled_them_all(model: Path) -> None:
    draw = random.Random(0)
    lengths, signs = (9, 5, 7, 6, 8), (1.0, -1.0, 1.0, -0.5, 0.5)
    samples = [
        Sample([draw.randrange(300) for _ in range(n)], [0, 0] + [1] * (n - 2), [-6.0] * n, advantage=sign)
        for n, sign in zip(lengths, signs, strict=True)
    ]
    config = resolve({"grpo.mini_batches": 2, "grpo.clip_high": 0.05, "grpo.tis_cap": 0.0}).grpo
    options = AdamWOptions(lr=1e-2)
    policy, by_hand = load_policy(model), load_policy(model)
    report = update(policy, AdamW(policy.model.parameters(), options), samples, config, budget=64)

    optimizer = AdamW(by_hand.model.parameters(), options)
    parts = [rank_batches(part, "token", 1, 64, by_hand.device) for part in (samples[:2], samples[2:])]
    for batch in (*parts[0], *parts[1]):
        batch.old_logprobs_N = token_logprobs(by_hand, batch, 1.0)
    clipped = 0.0
    for part in parts:
        outputs = [policy_loss(by_hand, batch, config) for batch in part]
        for output in outputs:
            output.loss.backward()
        optimizer.step()
        clipped = sum(float(o.statistics.clipped_low + o.statistics.clipped_high) for o in outputs)
    assert (report["samples"], report["loss_tokens"]) == (5.0, 25.0)
    assert report["clip_fraction"] == pytest.approx(clipped / 15) != 0.0
    for one, other in zip(policy.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    alone = update(
        load_policy(model), Mock(lr=1.0, step=lambda: StepReport(1.0, False)), samples[:2], config, budget=64
    )
    assert alone["flop"] < report["flop"]


def test_with_lag_every_step_on_a_batch_is_by_the_policy_that_sampled_and_waits_for_the_engine(model: Path) -> None:
    """vLLM's logprobs are the old ones in all steps of an update, of which none changes the weights unasked."""
    draw = random.Random(0)
    samples = [
        Sample([draw.randrange(300) for _ in range(9)], [0, 0] + [1] * 7, [draw.gauss(-6.0, 0.1)] * 9, advantage=sign)
        for sign in (1.0, -1.0, 0.5, -0.5)
    ]
    keys = {"grpo.max_lag": 1, "grpo.mini_batches": 2, "grpo.epochs_per_batch": 2}
    config, options, order = resolve(keys).grpo, AdamWOptions(lr=1e-2), list[str]()
    policy, by_hand = load_policy(model), load_policy(model)
    optimizer, other = (AdamW(each.model.parameters(), options) for each in (policy, by_hand))
    stepping = Mock(lr=1.0, step=lambda: (order.append("step"), optimizer.step())[1])
    report = update(policy, stepping, samples, config, budget=64, before_step=lambda: order.append("asked"))
    assert order == ["asked", "step"] * 4
    for part in (samples[:2], samples[2:]) * 2:
        batches = rank_batches(part, "token", 1, 64, by_hand.device)
        for batch in batches:
            batch.old_logprobs_N = batch.sampled_logprobs_N
            output = policy_loss(by_hand, batch, config)
            output.loss.backward()
        other.step()
    clipped = float(output.statistics.clipped_low + output.statistics.clipped_high)
    assert report["clip_fraction"] == pytest.approx(clipped / 14) != 0.0
    for one, expected in zip(policy.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


def test_a_kl_in_the_reward_is_taken_off_the_advantages_of_the_tokens_up_to_it(model: Path) -> None:
    """As OpenRLHF's returns: A less the weight times the sum of k1 over a token and those after it."""
    draw = random.Random(0)
    samples = [
        Sample([draw.randrange(300) for _ in range(n)], [0, 0] + [1] * (n - 2), [-6.0] * n, advantage=sign)
        for n, sign in ((9, 1.0), (6, -1.0), (7, 0.0))
    ]
    config = resolve({"grpo.kl_weight": 0.5, "grpo.kl_estimator": "k1_reward", "grpo.tis_cap": 0.0}).grpo
    policy, by_hand, reference = load_policy(model), load_policy(model), load_policy(model)
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    unmoved = Mock(lr=1.0, step=lambda: StepReport(1.0, False))
    report, kl = update(policy, unmoved, samples, config, reference, budget=64), []
    for batch in rank_batches(samples, "token", 1, 64, by_hand.device):
        old_N, ref_N = (token_logprobs(each, batch, 1.0) for each in (by_hand, reference))
        for i, sequence in enumerate(batch.sequence_N.tolist()):
            later_N = (batch.sequence_N == sequence) & (torch.arange(len(old_N)) >= i)
            batch.advantages_N[i] -= 0.5 * (old_N - ref_N)[later_N].sum()
        kl.append(old_N - ref_N)
        policy_loss(by_hand, batch, msgspec.structs.replace(config, kl_weight=0.0)).loss.backward()
    assert report["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3) != 0.0
    for one, other in zip(policy.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_parts_without_a_token_cost_no_step(model: Path) -> None:
    policy, steps = load_policy(model), []
    optimizer = Mock(lr=1.0, step=lambda: steps.append(1) or StepReport(1.0, False))
    one = Sample([1, 2, 3, 4], [0, 1, 1, 1], [0.0, -1.0, -1.0, -1.0], advantage=1.0)
    update(policy, optimizer, [one, Sample.empty(), Sample.empty()], resolve({"grpo.mini_batches": 3}).grpo, budget=64)
    assert len(steps) == 1


@pytest.mark.parametrize("sleeps", [True, False])
def test_the_engine_sleeps_while_training_where_the_plan_says_so(model: Path, tmp_path: Path, sleeps: bool) -> None:
    config = resolve({"model.path": str(model), "runs": str(tmp_path)})
    policy, engine = load_policy(model), Mock()
    engine.sync.return_value = SimpleNamespace(parity_mean=0.0, parity_max=0.0, seconds=0.0)
    plan = MemoryPlan((), 0, 0.1, 64, engine_sleeps=sleeps)
    learner = Learner(config, engine, policy, Chat(policy.tokenizer), None, plan)
    sample = Sample([1, 2, 3, 4], [0, 1, 1, 1], [0.0, -1.0, -1.0, -1.0], advantage=1.0)
    learner.experiences = [Experience([sample], Tally(), [])]
    learner.update(PhaseTimer())
    learner.sync()
    assert [name for name, _, _ in engine.method_calls] == (["sleep", "wake", "sync"] if sleeps else ["sync"])


def test_a_skipped_later_epoch_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(model)
    optimizer = AdamW(policy.model.parameters(), AdamWOptions(lr=1e-2))
    steps = iter([StepReport(1.0, False), StepReport(float("inf"), True), StepReport(2.0, False)])
    monkeypatch.setattr(optimizer, "step", lambda: next(steps))
    once = [Sample([1, 2, 3, 4], [0, 1, 1, 1], [0.0, -1.0, -1.0, -1.0], advantage=1.0)]
    report = update(policy, optimizer, once, resolve({"grpo.epochs_per_batch": 3}).grpo, budget=64)
    assert report["skipped"] == 1.0
    assert report["grad_norm"] == float("inf")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([SimpleNamespace(id=1)], r"load_problems must return two lists, .*, got \[namespace\(id=1\)\]"),
        (None, "load_problems must return two lists, .*, got None"),
        (([{"id": 3}], []), r"each problem of load_problems is an object with an id, got \{'id': 3\}"),
        ((3, []), "load_problems cannot be read to its end: it raised TypeError"),
    ],
)
def test_problems_of_a_task_that_are_none_are_named(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        problems_of(Task(lambda _: given, open_vowels), Config())


def test_a_task_without_problems_leaves_an_earlier_run_where_it_is(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "good"
    folder.mkdir(parents=True)
    (folder / "config.toml").touch()
    with pytest.raises(UserError, match="the task has no problem to train on: lower"):
        run(model, tmp_path / "runs", "good", problems=([], load_vowels(None)[1]))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["good"]


def test_a_rank_without_a_problem_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_idle_ranks(resolve({"grpo.prompts_per_step": 1}))
    monkeypatch.setattr("fastgrpo.train.rank_and_world", lambda: (0, 4))
    refuse_idle_ranks(resolve({"grpo.prompts_per_step": 4}))
    with pytest.raises(UserError, match="prompts_per_step = 3 is below the 4 ranks"):
        refuse_idle_ranks(resolve({"grpo.prompts_per_step": 3}))


@pytest.mark.parametrize(("advantage", "logprob"), [(1.0, -20.0), (-1.0, -0.1)])
def test_one_step_ahead_the_clip_is_around_the_policy_that_sampled(
    model: Path, advantage: float, logprob: float
) -> None:
    """The policy has moved since, further than the clip and as the advantage wants: nothing is left to learn."""
    policy = load_policy(model)
    moved = [Sample([1, 2, 3, 4], [0, 1, 1, 1], [logprob] * 4, advantage)]
    reports = [
        update(
            policy,
            AdamW(policy.model.parameters(), AdamWOptions(lr=1e-6)),
            moved,
            resolve({"grpo.max_lag": lag}).grpo,
            budget=64,
        )
        for lag in (0, 1)
    ]
    assert reports[0]["grad_norm"] > 0.0
    assert reports[0]["clip_fraction"] == 0.0
    assert reports[1]["grad_norm"] == 0.0
    assert reports[1]["clip_fraction"] == 1.0


DEMO = shlex.split(
    "--name e2e --sft.teacher_samples 1 --sft.epochs 2 --data.problems 22 --data.held_out 8 --eval.samples 1"
    " --grpo.rounds 2 --grpo.prompts_per_step 2 --grpo.group_size 4 --grpo.max_new_tokens 48 --engine.kv_cache_gib 0.2"
    " --checkpoint.every 100 --grpo.decay_steps 1000"
)


@pytest.mark.engine
@pytest.mark.jail
@pytest.mark.timeout(600)
def test_the_demo_survives_an_interrupt_and_ends_with_a_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastgrpo.train", *DEMO, "--runs", str(tmp_path)]
    folder = tmp_path / "e2e"
    started = subprocess.Popen([*command, "--grpo.steps", "1000"], stdout=subprocess.PIPE, text=True)
    try:
        wait_for_step(folder, started, deadline_s=300)
        family = psutil.Process(started.pid).children(recursive=True)
        assert family, "jails run beside the training process"
        started.send_signal(signal.SIGINT)
        assert started.wait(timeout=240) == 130
    finally:
        started.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, f"left behind: {alive}"
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    subprocess.run([*command, "--resume", "--grpo.steps", str(step + 1)], check=True, timeout=300)
    steps = [row["step"] for row in metrics(folder)]
    assert steps == list(range(1, step + 2))
    stages = {row["stage"] for row in json.loads((folder / "evaluation.json").read_text())}
    assert stages == {"sft", "grpo"}
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "completions", "workflow", "worker_calls", "tests", "reward"} <= sample.keys()
    for name in ("config.toml", "traces.jsonl", "report.html", "sft/config.json"):
        assert (folder / name).stat().st_size > 0, name


def wait_for_step(folder: Path, process: subprocess.Popen, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and metrics(folder):
            return
        time.sleep(0.2)
    pytest.fail(f"no training step within {deadline_s:.0f} s (exit code {process.poll()})")


def vowels(completions, factor, **_) -> list[float]:
    """A reward function in TRL's form."""
    return [share(text) * weight for text, weight in zip(completions, factor, strict=True)]


CUT_TWICE = """
import signal, traceback, fastgrpo, tests.test_train as t
t.learner.open_engine = t.random_engine
for number in (signal.SIGINT, signal.SIGTERM):
    try:
        fastgrpo.train(KEYS | {"name": number.name}, reward=t.vowels, dataset=[{"prompt": "count", "factor": 2.0}] * 6)
    except KeyboardInterrupt:
        traceback.print_exc()
"""


def test_a_signal_to_a_script_that_trains_leaves_a_checkpoint(model: Path, tmp_path: Path) -> None:
    keys = SMALL | {"model.path": str(model), "runs": str(tmp_path), "grpo.steps": 10_000, "data.held_out": 0}
    keys |= {"checkpoint.every": 10_000}
    code = CUT_TWICE.replace("KEYS", repr(keys))
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as script:
        for number in (signal.SIGINT, signal.SIGTERM):
            wait_for_step(tmp_path / number.name, script, 120)
            script.send_signal(number)
        _, said = script.communicate(timeout=60)
    assert said.count("\nKeyboardInterrupt\n") == 2
    assert all(len(weights(tmp_path / name)) > 0 for name in ("SIGINT", "SIGTERM"))


def changing_the_process(completions, factor, **_) -> list[float]:
    """`vowels` of somebody who takes the process for their own: a folder to work in, a default type to load a model."""
    torch.set_default_dtype(torch.float64)
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        return vowels(completions, factor)


@pytest.mark.engine
def test_a_reward_that_changes_folder_and_default_type_changes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = SMALL | {"grpo.steps": 2, "data.held_out": 0, "checkpoint.every": 1}
    rows = [{"prompt": f"count {number}", "factor": 2.0} for number in range(6)]
    try:
        folders = [
            fastgrpo.train(keys | {"name": reward.__name__}, model=model, reward=reward, dataset=rows)
            for reward in (vowels, changing_the_process)
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    told = [[{key: row[key] for key in ("reward/total", "loss", "grad_norm")} for row in metrics(f)] for f in folders]
    assert told[0] == told[1]
    before, after = (weights(folder) for folder in folders)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.engine
def test_a_reward_function_and_rows_train_from_python(model: Path, tmp_path: Path) -> None:
    keys = SMALL | {"runs": str(tmp_path), "name": "rewards", "grpo.steps": 1, "data.held_out": 2, "eval.samples": 2}
    rows = [{"prompt": f"count {number}", "factor": 2.0} for number in range(6)]
    folder = fastgrpo.train(keys, model=model, reward=vowels, reward_weights=[0.5], dataset=rows)
    (row,) = metrics(folder)
    assert row["reward/total"] == pytest.approx(row["reward/vowels"])
    assert 0 < row["reward/total"] < 1
    evaluated = json.loads((folder / "evaluation.json").read_text())
    assert len(evaluated) == 2 * 2 * 2


def test_ids_and_columns_of_any_kind_end_in_files_that_can_be_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_vllm: None
) -> None:
    named = (3, (1, 2), "\ud800", None)
    problems = [SimpleNamespace(id=i, prompt="count", difficulty="hard", dataset=None) for i in named]
    vowels_of = Vowels.results
    recorded = {"workflow": 3, "step": "a"}
    monkeypatch.setattr(
        Vowels, "results", lambda *given: [msgspec.structs.replace(r, record=recorded) for r in vowels_of(*given)]
    )
    folder = run(model, tmp_path, "ids", problems=(problems, problems), grpo__steps=1)
    rows = read_rows(folder / "evaluation.json")
    assert {row.problem_id for row in rows} == {"3", "(1, 2)", "?", "None"}
    assert {(row.difficulty, row.dataset) for row in rows} == {(None, "")}


def test_a_task_from_python_is_not_taken_for_the_configuration_s(model: Path, tmp_path: Path, no_vllm: None) -> None:
    folder = run(model, tmp_path, "python", grpo__steps=1)
    config = resolve(read_toml(folder / "config.toml"))
    with pytest.raises(
        UserError, match=r"was given to fastgrpo\.train in Python: continue from there, with resume=True"
    ):
        asyncio.run(fastgrpo.train.run(config, resume=True))
    words = ["--model", str(folder / "checkpoints" / "step-000001")]
    with pytest.raises(UserError, match="in Python: name it by --reward MODULE:FUNCTION and --dataset"):
        parse(words, program="fastgrpo.evaluate", of_run=True)
    named = parse([*words, "--reward", "a:b", "--dataset", "c.jsonl"], program="fastgrpo.evaluate", of_run=True).config
    assert named.data.reward == "a:b"
    with pytest.raises(UserError, match="solve runs workflows, and this policy writes none"):
        refuse(named, ["p1"])


async def gone(problem) -> None:
    raise ConnectionError("the endpoint is gone")


@pytest.mark.parametrize("held_out", [0, 2])
def test_a_run_that_fails_throughout_ends_with_the_reason(
    model: Path, tmp_path: Path, no_vllm: None, held_out: int
) -> None:
    failed = "all 4 rollouts" if held_out else "8 of 8 rollouts of a step"
    wanted = rf"{failed} failed for a reason .*: problem p\d: execute raised ConnectionError: the endpoint is gone"
    problems, others = load_vowels(None)
    with pytest.raises(UserError, match=wanted):
        run(
            model,
            tmp_path,
            "dead",
            environment=opened(Vowels(gone)),
            problems=(problems, others[:held_out]),
            grpo__steps=2,
        )


def test_steps_from_which_nothing_is_learned_are_told_once(
    model: Path, tmp_path: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def paying(*totals: float):
        task = Vowels()
        task.results = lambda problem, rollouts: [
            Result(reward=Reward(total=total, terms={"format": total})) for total in totals[: len(rollouts)]
        ]
        return opened(task)

    alike = run(model, tmp_path, "alike", environment=paying(*[-0.5] * 4), problems=NOT_HELD_OUT, grpo__steps=5)
    assert len(metrics(alike)) == 5
    said = "in the last 3 steps no group had two rewards that differ (total -0.500, format -0.500): nothing is learned"
    assert capsys.readouterr().out.count(said) == 1
    run(model, tmp_path, "unlike", environment=paying(0.0, -0.5, 0.0, 0.0), problems=NOT_HELD_OUT, grpo__steps=4)
    assert "nothing is learned" not in capsys.readouterr().out


@pytest.mark.parametrize("filtered", [True, False])
def test_steps_of_which_the_overlong_filter_leaves_nothing_are_told_once(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_vllm: None,
    capsys: pytest.CaptureFixture[str],
    filtered: bool,
) -> None:
    """This engine's completions all end at their length."""
    monkeypatch.setattr(Vowels, "execute", checksum)
    keys = {"problems": NOT_HELD_OUT, "grpo__steps": 4, "grpo__overlong_filter": filtered}
    folder = run(model, tmp_path, "cut", **keys)
    assert [row["loss_tokens"] == 0 for row in metrics(folder)] == [filtered] * 4
    said = "in the last 3 steps every completion was cut off, and grpo.overlong_filter leaves such out: nothing is"
    assert " ".join(capsys.readouterr().out.split()).count(said) == filtered


def test_a_run_that_loses_many_stragglers_says_once_that_the_quick_ones_are_left(
    model: Path, tmp_path: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = cycle([0.0, 60.0])

    async def wait(problem) -> None:
        await asyncio.sleep(next(seconds))

    folder = run(
        model, tmp_path, "late", environment=opened(Vowels(wait)), problems=NOT_HELD_OUT, grpo__steps=2,
        grpo__straggler_s=0.1,
    )  # fmt: skip
    assert [(row["stragglers"], row["infrastructure"]) for row in metrics(folder)] == [(4, 4)] * 2
    said = "4 of 8 rollouts of this step still ran grpo.straggler_s = 0.1 s after its last completion"
    out = capsys.readouterr().out
    assert out.count(said) == 1
    assert "faster; grpo.max_lag hides the wait for them" in " ".join(out.split())


def test_a_run_that_loses_many_rollouts_to_its_task_says_once_why(
    model: Path, tmp_path: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    down = cycle([False, False, True])

    async def fail(problem) -> None:
        if next(down):
            await gone(problem)

    folder = run(model, tmp_path, "third", environment=opened(Vowels(fail)), problems=NOT_HELD_OUT, grpo__steps=3)
    assert [row["infrastructure"] for row in metrics(folder)] == [2, 3, 3]
    said = "2 of 8 rollouts of this step have no reward, for a reason that is not the policy's: problem p"
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("have no reward") == out.count(said) == 1
    assert re.search(
        r": execute raised ConnectionError: the endpoint is gone \(test_train\.py:\d+\)\. They are left out; sam", out
    )


def test_failures_of_another_rank_are_told(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_vllm: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = Tally(sums={"rollouts": 8.0, "infrastructure": 2.0, "tokens_per_s": 1.0}, failure="q: its disk is full")
    monkeypatch.setattr(experience, "gather_all", lambda own, what: [own, other])
    run(model, tmp_path, "two", problems=NOT_HELD_OUT, grpo__steps=1)
    said = "2 of 16 rollouts of this step have no reward, for a reason that is not the policy's: q: its disk is full."
    assert said in " ".join(capsys.readouterr().out.split())
    other.sums["infrastructure"] = 9.0
    with pytest.raises(UserError, match=r"9 of 16 rollouts of a step failed .*: q: its disk is full \(grpo"):
        run(model, tmp_path, "two", problems=NOT_HELD_OUT, grpo__steps=1)


def test_resuming_before_the_first_checkpoint_says_that_it_starts_over(
    model: Path, tmp_path: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError):
        run(model, tmp_path, "new", environment=opened(Vowels(gone)), grpo__steps=1)
    folder = run(model, tmp_path, "new", resume=True, grpo__steps=1)
    assert f"{folder} has no checkpoint yet: GRPO starts over, from {model}" in capsys.readouterr().out
    run(model, tmp_path, "new", resume=True, grpo__steps=1, problems=NOT_HELD_OUT)
    out = capsys.readouterr().out
    assert "no checkpoint" not in out
    assert "held out, step" not in out


def test_a_checkpoint_that_is_not_whole_is_named_and_without_another_nothing_starts_over(
    model: Path, tmp_path: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(model, tmp_path, "cut", grpo__steps=4)
    first, second = sorted((folder / "checkpoints").glob("step-*"))
    (second / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    run(model, tmp_path, "cut", resume=True, grpo__steps=4)
    said = f"continuing from {first}; step-000004 after it cannot be used: files are missing, cut short or"
    assert said in " ".join(capsys.readouterr().out.split())
    for checkpoint in (first, second):
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole, of step-000002, step-000004 files are missing"):
        run(model, tmp_path, "cut", resume=True, grpo__steps=5)
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]


def test_a_damaged_file_is_named_and_costs_no_more_than_itself(
    model: Path, tmp_path: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file of a run's folder is emptied, cut, and overwritten by noise; those of a checkpoint by noise alone."""
    keys = {"grpo__curriculum": 0.5, "grpo__max_lag": 1}
    whole = run(model, tmp_path, "whole", grpo__steps=4, **keys)
    noise = random.Random(0)
    run_files = [path for path in whole.iterdir() if path.is_file()]
    newest = [path for path in (whole / "checkpoints/step-000004").rglob("*") if path.is_file()]
    assert {path.name for path in newest} > {"experience.msgpack", "curriculum.json", "model.safetensors"}
    cases = [(path, how) for path in run_files for how in ("emptied", "cut", "noise")]
    told, gone_on = {}, {}
    for path, how in cases + [(path, "noise") for path in newest]:
        folder = Path(shutil.copytree(whole, tmp_path / "damaged"))
        data, file = path.read_bytes(), folder / path.relative_to(whole)
        file.write_bytes({"emptied": b"", "cut": data[: len(data) // 2], "noise": noise.randbytes(len(data))}[how])
        capsys.readouterr()
        try:
            run(model, tmp_path, "damaged", resume=True, grpo__steps=5, **keys)
            gone_on[path.name, how] = " ".join(capsys.readouterr().out.split())
            assert (folder / "checkpoints" / "step-000005").is_dir()
        except UserError as error:
            told[path.name, how] = str(error)
            assert file.read_bytes() != data
            for other in set(whole.rglob("*")) - {path, whole / "config.toml"}:
                assert other.is_dir() or (folder / other.relative_to(whole)).read_bytes() == other.read_bytes(), other
        shutil.rmtree(folder)
    compared = ("config.toml", "evaluation.json", "model.digest", "tokenizer.digest", "data.digest")
    assert set(told) == {(name, how) for name in compared for how in ("emptied", "cut", "noise")}
    assert [said for (name, _), said in told.items() if name not in said] == []
    for path in newest:
        assert (
            "step-000004 after it cannot be used: files are missing, cut short or changed"
            in gone_on[path.name, "noise"]
        )


def test_a_resumed_run_is_told_of_data_that_changed_and_may_go_on_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_vllm: None
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"count {number}", "factor": 2.0} for number in range(6)]
    file, folder = tmp_path / "rows.jsonl", tmp_path / "named"

    def go_on(name: str, steps: int, dataset: Any, *, resume: bool = True) -> None:
        keys = SMALL | {"runs": str(tmp_path), "name": name, "grpo.steps": steps, "data.held_out": 2, "eval.samples": 1}
        with_name = {"data.reward": "tests.test_train:vowels", "data.dataset": "rows.jsonl"} if not dataset else {}
        config = resolve({"model.path": str(model)} | keys | with_name)
        run_without_report(config, reward_task([vowels], dataset=dataset) if dataset else None, resume=resume)

    def write(rows: list[dict[str, Any]]) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(rows)
    go_on("named", 1, None, resume=False)
    go_on("path", 1, file, resume=False)
    go_on("given", 1, rows, resume=False)
    for changed in ([*rows[:2], rows[3], rows[2], *rows[4:]], [*rows, rows[0]], [rows[0] | {"factor": 1.0}, *rows[1:]]):
        write(changed)
        for name, dataset, said in (("named", None, "rows.jsonl"), ("path", str(file), str(file))):
            told = f"cannot resume {tmp_path / name}: {said} changed since it began, so that its steps would draw other"
            with pytest.raises(UserError, match=told):
                go_on(name, 2, dataset)
    with pytest.raises(UserError, match="given: what it was given to train on changed since it began"):
        go_on("given", 2, rows[::-1])
    write(rows)
    for name, dataset in (("named", None), ("path", file), ("given", rows)):
        go_on(name, 2, dataset)
    write(rows[:5])
    (folder / "data.digest").unlink()
    go_on("named", 3, None)
    go_on("named", 4, None)
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_resumed_curriculum_draws_the_same(model: Path, tmp_path: Path, no_vllm: None, lag: int) -> None:
    problems = [SimpleNamespace(id=f"p{i}", prompt=f"count {i}", difficulty=i / 20) for i in range(20)]
    keys = {"problems": (problems, []), "grpo__curriculum": 0.5, "grpo__max_lag": lag}
    whole = run(model, tmp_path, "whole", grpo__steps=6, **keys)
    run(model, tmp_path, "halves", grpo__steps=2, **keys)
    halves = run(model, tmp_path, "halves", resume=True, grpo__steps=6, **keys)

    def drawn(folder: Path) -> list[str]:
        return [json.loads(line)["problem_id"] for line in (folder / "samples.jsonl").read_text().splitlines()]

    assert len(drawn(whole)) == 6 * 8
    assert drawn(halves) == drawn(whole)
    rates = json.loads((whole / "checkpoints" / "step-000006" / "state" / "curriculum.json").read_text())
    assert sum(count > 0 for _, count in rates.values()) == len(set(drawn(whole)))


def test_a_model_by_its_name_is_found_again_by_the_commit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_vllm: None
) -> None:
    asked, snapshot = [], tmp_path / "cache" / ("c" * 40)

    def download(name: str, *, revision: str | None, **_: object) -> str:
        asked.append((name, revision))
        return str(shutil.copytree(model, snapshot, dirs_exist_ok=True))

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    folder = run("org/tiny", tmp_path, "named", grpo__steps=1)
    recorded = read_toml(folder / "config.toml")
    assert (recorded["model.source"], recorded["model.revision"]) == ("org/tiny", snapshot.name)
    shutil.rmtree(snapshot)
    config = resolve(recorded | {"grpo.steps": 2})
    run_without_report(config, Task(load_vowels, open_vowels), resume=True)
    assert [row["step"] for row in metrics(folder)] == [1, 2]
    assert asked == [("org/tiny", None), ("org/tiny", snapshot.name)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dataset": [{"prompt": "a"}]}, "dataset needs a reward or an environment"),
        ({"dataset": [{"prompt": "a"}], "reward": []}, "dataset needs a reward or an environment"),
        (
            {"environment": object()},
            "environment object has no prompt and no results and no execute and no feedback_text",
        ),
        ({"environment": object(), "reward": len}, "one of task, environment and reward, got environment and reward"),
        ({"environment": Vowels(), "reward_weights": [1.0]}, "reward_weights goes with reward"),
        ({"model": torch.nn.Linear(1, 1)}, "model is a folder, a name on the hub or a GGUF file, got Linear: write a"),
        ({"task": 3}, "task must be a fastgrpo.tasks.Task, got 3"),
        ({"config": "demo.toml"}, "takes a dict of keys by their dotted names, or a Config, got 'demo.toml'"),
        ({"config": {3: 4}}, "keys are texts such as 'grpo.steps', got 3"),
        ({"environment": Vowels(), "dataset": np.array([1, 2]), "model": "."}, "each problem of dataset is an object"),
    ],
)
def test_what_train_is_given_must_fit(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        fastgrpo.train(**({"dry_run": True, "config": {}} | arguments))


def test_a_task_that_stage_1_cannot_teach_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this task needs a model"):
        train({"runs": str(tmp_path)}, reward=vowels, dataset=[{"prompt": "a"}, {"prompt": "b"}])


def test_a_second_training_in_the_process_is_refused_and_the_first_goes_on(
    model: Path, tmp_path: Path, no_vllm: None
) -> None:
    def second(completions: list[str], **_: Any) -> list[float]:
        with pytest.raises(UserError, match="another training is under way in this process"):
            fastgrpo.train(keys, model=model, reward=vowels, dataset=rows)
        return vowels(completions, [1.0] * len(completions))

    rows = [{"prompt": f"count {number}"} for number in range(3)]
    keys = SMALL | {"runs": str(tmp_path), "grpo.steps": 1, "grpo.prompts_per_step": 1, "data.held_out": 1}
    for _ in range(2):
        (row,) = metrics(fastgrpo.train(keys, model=model, reward=second, dataset=rows))
        assert row["infrastructure"] == 0
    with pytest.raises(UserError, match=r"nothing to resume: .*other/config.toml does not exist"):
        fastgrpo.train(keys | {"name": "other"}, model=model, reward=second, dataset=rows, resume=True)


@pytest.mark.parametrize("late", [False, True])
def test_a_training_is_stopped_from_a_reward_and_resumed(
    model: Path, tmp_path: Path, no_vllm: None, late: bool
) -> None:
    """As where a notebook's cell was interrupted, whose training goes on in its thread: all of a step's groups ask."""

    def stopping(completions: list[str], factor: list[float], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state.global_step == 2:
            fastgrpo.stop()
            time.sleep(0.2 * late)  # after which nobody waits for it any more
        return vowels(completions, factor)

    stopping.__name__ = "vowels"  # by which its values are logged
    fastgrpo.stop()  # nothing is under way
    rows = [{"prompt": f"count {number}", "factor": 1.0} for number in range(6)]
    keys = SMALL | {"runs": str(tmp_path), "grpo.steps": 4, "data.held_out": 0, "grpo.max_lag": int(late)}
    whole = fastgrpo.train(keys | {"name": "whole"}, model=model, reward=vowels, dataset=rows)
    folder = fastgrpo.train(keys | {"name": "halves"}, model=model, reward=stopping, dataset=rows)
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{len(metrics(folder)):06d}" != "step-000004"
    fastgrpo.train(keys | {"name": "halves"}, model=model, reward=vowels, dataset=rows, resume=True)
    assert [row["reward/total"] for row in metrics(folder)] == [row["reward/total"] for row in metrics(whole)]


def test_a_running_loop_is_told_how_to_train() -> None:
    async def notebook() -> None:
        fastgrpo.train({}, model="m", reward=len, dataset=[])

    with pytest.raises(UserError, match=r"await asyncio\.to_thread\(fastgrpo\.train"):
        asyncio.run(notebook())
