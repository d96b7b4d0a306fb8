"""The experiments: what each trains and measures, with which keys, and that nothing finished is done again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.json import encode
from msgspec.structs import replace

from fastgrpo import experiments, forging, sft
from fastgrpo.config import Config
from fastgrpo.config_files import flat, to_toml
from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.evaluation import save_rows
from fastgrpo.experiments import EXPERIMENTS, agreement, perform
from fastgrpo.record.comparison import write_texts
from fastgrpo.training.checkpoint import Checkpoints
from fastgrpo.types import EvalRow
from tests.helpers.full_disk import full_disk


class Stubs:
    """Trainings and measurements that only leave their files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[tuple[Config, bool]] = []
        self.compared: list[tuple[Config, dict[str, str], bool]] = []
        self.taught: list[Config] = []
        monkeypatch.setattr(experiments, "train", self.train)
        monkeypatch.setattr(experiments, "compare", self.compare)
        monkeypatch.setattr(forging, "teach", self.teach)
        monkeypatch.setattr(sft, "teach", self.teach)
        monkeypatch.setattr(forging, "fooled", self.fooled)

    def train(self, config: Config, *, resume: bool, task: object = None) -> None:
        self.trained.append((config, resume))
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "config.toml").write_text(to_toml(config))
        found = rows("sft", "grpo")
        if "forging" in config.runs:
            audit = {"paid": 1.0, "hacked": 0.25, "fooled": 0.25, "forged": 0.25}
            found = [replace(row, metrics=row.metrics | audit) for row in found]
        save_rows(config.folder / "evaluation.json", found)
        step = {"stage": "grpo", "paid": 0.5, "solved": 0.25, "hacked": 0.25, "fooled": 0.25, "forged": 0.5}
        (config.folder / "metrics.jsonl").write_bytes(b"".join(encode(step | {"step": n}) + b"\n" for n in range(1, 9)))
        (config.folder / "report.html").write_text("")

    async def teach(self, config: Config, *, resume: bool) -> Path:
        self.taught.append(config)
        (config.folder / "sft").mkdir(parents=True)
        return config.folder / "sft"

    async def fooled(self, config: Config) -> str:
        return "| forgery |"

    async def compare(self, config: Config, models: dict[str, str], *, controls: bool = True) -> list[EvalRow]:
        self.compared.append((config, models, controls))
        return rows("worker alone", *models)


def rows(*stages: str) -> list[EvalRow]:
    metrics = {"solved": 1.0, "pass_rate": 0.5, "public_pass_rate": 0.75, "worker_tokens": 100.0, "complexity": 0.1}
    return [
        EvalRow(
            stage=stage,
            problem_id=f"p{number}",
            status="ok",
            reward=0.5,
            metrics=metrics,
            difficulty=number / 3,
            dataset="humaneval",
            workflow="async def workflow(problem):\n    return await generate(problem)",
        )
        for stage in stages
        for number in range(3)
    ]


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Stubs:
    return Stubs(monkeypatch)


def config(tmp_path: Path, **keys: Any) -> Config:
    return resolve({"runs": str(tmp_path)} | {name.replace("__", "."): value for name, value in keys.items()})


def differing(one: Config, other: Config) -> dict[str, Any]:
    """What `one` has otherwise than `other`, but for its folder."""
    before = flat(other)
    return {name: value for name, value in flat(one).items() if before[name] != value and name not in ("name", "runs")}


def test_the_ablation_trains_twice_and_differs_by_the_reward_alone(stubs: Stubs, tmp_path: Path) -> None:
    base = config(tmp_path)
    text = perform("reward-ablation", base)
    full, alone = (run for run, _ in stubs.trained)
    assert differing(full, base) == {}
    assert differing(alone, base) == {"reward.complexity": 0.0, "reward.efficiency": 0.0, "reward.diversity": 0.0}
    assert [f"| {stage} |" in text for stage in ("SFT only", "full reward", "performance only")] == [True] * 3
    folder = tmp_path / "experiments/reward-ablation"
    names = ("results.md", "results.jsonl", "results.svg", "results-tests.svg")
    assert all((folder / name).stat().st_size for name in names)


def test_the_weights_are_swept_one_at_a_time(stubs: Stubs, tmp_path: Path) -> None:
    base = config(tmp_path, reward__complexity=0.4, reward__efficiency=0.1)
    perform("weights", base)
    swept = [differing(run, base) for run, _ in stubs.trained]
    assert swept[1:3] == [{"reward.complexity": 0.0}, {"reward.complexity": 0.8}]
    assert swept[3:] == [{"reward.efficiency": 0.0}, {"reward.efficiency": 0.2}]


def test_fine_tuning_alone_takes_no_step_of_rl(stubs: Stubs, tmp_path: Path) -> None:
    base = config(tmp_path, data__dataset=("humaneval", "mbpp.json"), data__held_out=(131, 341), model__path="base")
    text = perform("sft-subset", base)
    [(run, _)], [taught] = stubs.trained, stubs.taught
    subset = {"data.dataset": "humaneval", "data.held_out": 131, "grpo.steps": 0}
    assert differing(taught, base) == subset
    assert differing(run, base) == subset | {"model.path": str(taught.folder / "sft")}
    assert "SFT + RL" not in text
    assert [(models, controls) for _, models, controls in stubs.compared] == [({}, True)]


def test_the_audit_pays_the_same_training_by_two_verdicts(stubs: Stubs, tmp_path: Path) -> None:
    perform("forging", config(tmp_path))
    judged, unsafe = (run for run, _ in stubs.trained)
    assert judged.name == "judge"
    assert unsafe.name == "unsafe-peer"
    assert differing(judged, unsafe) == {}
    assert judged.model.path == str(tmp_path / "experiments/forging/taught/sft")
    table = (tmp_path / "experiments/forging/details.md").read_text()
    assert "| paid by the judged process itself | 6 to 8 | 50.0 | 25.0 | 25.0 | 50 | 50.0 |" in table
    assert "| before RL | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] | 25.0 [25.0, 25.0] | 25 | 25.0 |" in table
    assert "| forgery |" in table
    assert (tmp_path / "experiments/forging/details.svg").read_text().startswith("<svg")


def test_a_judges_scores_are_held_against_hidden_tests(stubs: Stubs, tmp_path: Path) -> None:
    text = perform("judge", config(tmp_path))
    tested, judged = (run for run, _ in stubs.trained)
    assert (judged.reward.judge, tested.reward.judge) == ("large", "")
    assert differing(judged, tested) == {"reward.judge": "large"}
    assert [f"| {stage} |" in text for stage in ("before RL", "paid by the judge model", "paid by hidden tests")]
    found = [
        replace(row, metrics={"judge_score": score, "pass_rate": rate, "solved": float(rate == 1)})
        for row, (score, rate) in zip(rows("a"), [(0.9, 1.0), (0.8, 0.5), (0.2, 1.0)], strict=True)
    ]
    assert "| 63.3 [20.0, 90.0] | 83.3 [50.0, 100.0] | -20.0 [-80.0, 30.0] | 33.3 | 50.0 | 100.0 |" in agreement(found)
    # A workflow that failed passes nothing and is not shown to the judge: it is in the means of neither.
    failed = replace(found[0], metrics={"pass_rate": 0.0, "solved": 0.0})
    untested = replace(found[0], metrics={"judge_score": 0.5})
    assert agreement([*found, failed, untested]) == agreement(found)


def test_another_worker_answers_the_same_policy(stubs: Stubs, tmp_path: Path) -> None:
    endpoint = {"workers.kind": "openai", "workers.base_url": "http://localhost:1/v1", "workers.model": "one"}
    other = {"workers.others.small.model": "two", "model.path": "policy"}
    text = perform("worker-swap", resolve({"runs": str(tmp_path)} | endpoint | other))
    assert stubs.trained == []
    asked = [(run.workers.model, run.workers.others, models) for run, models, _ in stubs.compared]
    assert asked == [("one", {}, {"policy": "policy"}), ("two", {}, {"policy": "policy"})]
    gained = text.partition("## What is gained over small: worker alone")[2]
    assert re.search(r"\| small: policy \| 0\.0 \[0\.0, 0\.0\] \|.*\| 1\.00 \|", gained)


def test_a_swap_needs_another_worker(stubs: Stubs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"add a table \[workers\.others\.NAME\]"):
        perform("worker-swap", config(tmp_path))


@pytest.mark.parametrize("name", ["cost", "hacking"])
def test_a_model_that_is_named_is_measured_and_not_trained(stubs: Stubs, tmp_path: Path, name: str) -> None:
    perform(name, config(tmp_path, model__path="folder"))
    assert stubs.trained == []
    assert [(models, controls) for _, models, controls in stubs.compared] == [({"policy": "folder"}, name == "cost")]


@pytest.mark.parametrize("name", ["cost", "hacking", "worker-swap"])
def test_what_stage_1_left_is_a_start_from_which_the_policy_is_trained(
    stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start, step = tmp_path / "flow/sft", tmp_path / "experiments" / name / "policy/checkpoints/step-000002"
    start.mkdir(parents=True)
    (tmp_path / "flow/config.toml").write_text('[model]\npath = "a-real-model"\n')
    (tmp_path / "flow/metrics.jsonl").touch()
    monkeypatch.setattr(Checkpoints, "latest", lambda self: self.folder / "step-000002")
    workers = {"kind": "openai", "base_url": "http://localhost:1/v1", "model": "one", "others.small.model": "two"}
    keys = {f"workers.{key}": value for key, value in workers.items()}
    perform(name, config(tmp_path, model__path=str(start), **keys))
    [(run, _)] = stubs.trained
    assert run.model.path == str(start)
    both = {"policy": str(step)} if name == "worker-swap" else {"SFT only": str(start), "SFT + RL": str(step)}
    assert [models for _, models, _ in stubs.compared] == [both] * (2 if name == "worker-swap" else 1)


def test_a_policy_whose_checkpoints_are_gone_is_named(stubs: Stubs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cost/policy has ended and has no whole checkpoint: remove its folder"):
        perform("cost", config(tmp_path))


def test_numbers_are_compared_on_questions_alone(stubs: Stubs, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_bytes(b"".join(encode({"question": "?" * n, "answer": n}) + b"\n" for n in range(1, 9)))
    perform("numbers", config(tmp_path, model__path="folder", data__dataset=str(questions), data__held_out=4))
    assert [(models, controls) for _, models, controls in stubs.compared] == [({"policy": "folder"}, True)]
    with pytest.raises(UserError, match="to a file of GSM8K's form"):
        perform("numbers", config(tmp_path / "other"))


def test_public_and_hidden_pass_rates_are_told_by_difficulty(stubs: Stubs, tmp_path: Path) -> None:
    text = perform("hacking", config(tmp_path, model__path="folder"))
    assert "| policy | easiest third | 75.0 | 50.0 | 25.0 [25.0, 25.0] | 0.10 | 1 |" in text


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - {"worker-swap", "cost", "hacking", "numbers"}))
def test_what_is_finished_is_not_done_again_and_what_was_cut_goes_on(stubs: Stubs, tmp_path: Path, name: str) -> None:
    first = perform(name, config(tmp_path))
    count, measured = len(stubs.trained), len(stubs.compared)
    assert perform(name, config(tmp_path)) == first
    assert (len(stubs.trained), len(stubs.compared)) == (count, measured)
    # A report says nothing of the end: it can be made while a training goes on.
    evaluation = stubs.trained[-1][0].folder / "evaluation.json"
    evaluation.write_bytes(encode(rows("sft")))
    perform(name, config(tmp_path))
    assert [resume for _, resume in stubs.trained] == [False] * count + [True]


def test_a_full_disk_leaves_what_was_written_before(tmp_path: Path) -> None:
    write_texts(tmp_path / "cost", {"config.toml": "whole"})
    with full_disk(100), pytest.raises(UserError, match=r"cannot write .*config\.toml: File too large; free space or"):
        write_texts(tmp_path / "cost", {"config.toml": "x" * 1000})
    assert {path.name: path.read_text() for path in (tmp_path / "cost").iterdir()} == {"config.toml": "whole"}


def test_another_configuration_is_refused(stubs: Stubs, tmp_path: Path) -> None:
    perform("sft-subset", config(tmp_path))
    with pytest.raises(UserError, match="was made with another configuration"):
        perform("sft-subset", config(tmp_path, seed=1))


def test_an_unknown_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no experiment 'all': choose one of sft-subset, "):
        perform("all", config(tmp_path))
