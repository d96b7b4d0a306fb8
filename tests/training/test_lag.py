"""Rollouts beside training, on the real engine: lag 0, bounded lags, weights that change under rollouts, resumes."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastgrpo.config_keys import resolve
from fastgrpo.engine.engine import Engine
from fastgrpo.policy.demo_policy import create_policy
from fastgrpo.record.phases import PhaseTimer
from fastgrpo.rollouts.experience import Experience, Tally, from_bytes
from fastgrpo.rollouts.rollouts import collect
from fastgrpo.tasks import Task
from fastgrpo.training.advantage import to_samples
from fastgrpo.training.curriculum import draw_problems
from fastgrpo.training.learner import EXPERIENCE, Learner, open_learner
from fastgrpo.training.schedule import Schedule
from fastgrpo.types import Group, Rollout, Sampling
from tests.helpers.runs import run_without_report
from tests.test_train import CORPUS, Vowels, load_vowels, metrics, open_interrupting, open_vowels
from tests.test_train import weights as saved_weights

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    create_policy(CORPUS, folder, seed=0, vocab_size=400)
    return folder


def settings(model: Path, runs: Path, name: str, **grpo: object):
    keys = {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 16, "lr": 1e-3, "micro_batch_tokens": 128} | grpo
    engine = {"process": "shared", "max_model_len": 64, "max_num_seqs": 16, "kv_cache_gib": 0.05}
    return resolve(
        {"model.path": str(model), "runs": str(runs), "name": name, "eval.samples": 1, "checkpoint.every": 2}
        | {f"grpo.{key}": value for key, value in keys.items()}
        | {f"engine.{key}": value for key, value in engine.items()}
    )


def train(config, *, resume: bool = False, environment=open_vowels) -> Path:
    return run_without_report(config, Task(load_vowels, environment), resume=resume)


def lags(folder: Path) -> list[tuple[int, list[int]]]:
    """For each rollout, the update it was for and how far behind it the weights of each of its tokens were."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    # `step` in the log counts the update itself.
    rows = [row for row in rows if row.get("stage", "grpo") == "grpo"]
    return [(row["step"], [row["step"] - 1 - v for v, n in row["versions"] for _ in range(n)]) for row in rows]


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.policy.weights()}


def noted(patch: pytest.MonkeyPatch) -> tuple[list[dict[str, torch.Tensor]], list[Rollout]]:
    """The weights behind each number of updates, and all rollouts, of the run that comes."""
    by_version, written = list[dict[str, torch.Tensor]](), list[Rollout]()
    begin, sync, told = Learner.__init__, Learner.sync, Schedule._experience

    def note(learner: Learner) -> None:
        if learner.step == len(by_version):
            by_version.append(weights(learner))

    patch.setattr(Learner, "__init__", lambda self, *given: (begin(self, *given), note(self))[0])
    patch.setattr(Learner, "sync", lambda self: (note(self), sync(self))[1])

    def experience(self: Schedule, step: int, groups: list[Group], *given: Any, **named: Any) -> Experience:
        written.extend(rollout for group in groups for rollout in group.rollouts)
        return told(self, step, groups, *given, **named)

    patch.setattr(Schedule, "_experience", experience)
    return by_version, written


def assert_logprobs_are_the_versions_own(
    model: Path, by_version: list[dict[str, torch.Tensor]], rollouts: list[Rollout]
) -> None:
    """By a plain model token by token, over the keys that the weights of earlier tokens have left."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    exact = 1e-4 if not torch.cuda.is_available() else 0.1
    for rollout in rollouts:
        begun, past, gaps, version = rollout.loss_mask.index(1), None, [], -1
        for position in range(begun, len(rollout.token_ids)):
            if version != rollout.versions[position]:
                version = rollout.versions[position]
                plain.load_state_dict(by_version[version], strict=False)
            read = rollout.token_ids[position - 1 : position] if past else rollout.token_ids[:begun]
            with torch.no_grad():
                output = plain(torch.tensor([read]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            logprob = output.logits[0, -1].log_softmax(-1)[rollout.token_ids[position]]
            gaps.append(abs(float(logprob) - rollout.logprobs[position]))
        assert max(gaps) < exact, rollout.versions


def test_without_lag_the_loop_takes_turns_bit_by_bit(model: Path, tmp_path: Path, monkeypatch) -> None:
    """Three steps of the loop leave the very weights of: collect, update, sync; one after another."""
    config, found = settings(model, tmp_path, "turns", steps=3), {}
    saved = Learner.save
    monkeypatch.setattr(Learner, "save", lambda self, score=None: found.update(weights(self)) or saved(self, score))
    train(config)
    problems, _ = load_vowels(config)
    with open_learner(config, model, resume=False) as learner:
        for step in range(3):
            groups = asyncio.run(
                collect(
                    learner.engine,
                    Vowels(),
                    learner.chat,
                    draw_problems(problems, config, step),
                    group_size=4,
                    sampling=Sampling.of(config),
                    seed=config.seed * 1_000_003 + step,
                )
            )
            learner.experiences = [Experience(to_samples(groups, config.grpo), Tally(), [])]
            learner.update(PhaseTimer())
            learner.sync()
        expected = weights(learner)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert all(lag == 0 for _, tokens in lags(config.folder) for lag in tokens)


def test_three_updates_ahead_the_lag_is_bounded_and_a_resumed_run_has_the_same_numbers(
    model: Path, tmp_path: Path
) -> None:
    configure = partial(settings, model, tmp_path, max_lag=3)
    whole = train(configure("whole", steps=5))
    parts = train(configure("parts", steps=2))
    state = next((parts / "checkpoints").glob("step-000002")) / "state" / EXPERIENCE
    assert len(from_bytes(state.read_bytes())) == 3
    with pytest.raises(asyncio.CancelledError):
        train(configure("parts", steps=5), resume=True, environment=open_interrupting)
    train(configure("parts", steps=5), resume=True)
    assert [row["step"] for row in metrics(parts)] == [1, 2, 3, 4, 5]
    for one, other in zip(metrics(whole), metrics(parts), strict=True):
        for name in ("loss", "reward/total", "grad_norm", "sampler_parity", "loss_tokens", "lag", "lag_max"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (one["step"], name)
    assert [row["lag_max"] for row in metrics(whole)] == [0, 1, 2, 3, 3]
    # Each completion is of one version.
    assert all(set(tokens) == {min(step - 1, 3)} for step, tokens in lags(whole))
    expected = saved_weights(whole)
    for name, tensor in saved_weights(parts).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    # vLLM has the trainer's weights after each sync; the samples of all steps but the first are of older ones.
    assert max(row["parity"] for row in metrics(whole)) < (1e-4 if not torch.cuda.is_available() else 2e-2)
    gaps = [row["sampler_parity"] for row in metrics(whole)]
    assert all(gap > 2 * gaps[0] for gap in gaps[1:])


def test_in_flight_tokens_of_one_rollout_are_of_several_versions_and_survive_a_resume(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding is slowed down, so that updates come while it goes on; it never sees weights between two steps."""
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (time.sleep(0.01), step(self))[1])
    configure = partial(settings, model, tmp_path, max_lag=2, in_flight=True, max_new_tokens=40, mini_batches=2)
    with monkeypatch.context() as patch:
        by_version, written = noted(patch)
        folder = train(configure("flight", steps=4))
    assert_logprobs_are_the_versions_own(model, by_version, written[::3])
    state = next((folder / "checkpoints").glob("step-000004")) / "state" / EXPERIENCE
    assert len(from_bytes(state.read_bytes())) == 2
    train(configure("flight", steps=6), resume=True)
    found = lags(folder)
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert len(found) == 6 * 8
    assert max(row["lag_max"] for row in metrics(folder)) <= 2
    assert all(0 <= lag <= 2 for _, tokens in found for lag in tokens)
    # A rollout's tokens are of ever newer weights, and some have seen them change.
    assert all(tokens == sorted(tokens, reverse=True) for _, tokens in found)
    assert any(len(set(tokens)) > 1 for _, tokens in found)
    # Those that the checkpoint held were not drawn anew by the weights of step 4.
    assert any(max(tokens) == 2 for number, tokens in found if number == 6)
