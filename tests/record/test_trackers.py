"""W&B and trackio get the curves and tables of samples; what is wrong with them costs one sentence, never the run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastgrpo.config import Record
from fastgrpo.config_files import read_saved
from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.record import trackers
from fastgrpo.record.log import RunLog, open_log

CHAT = [{"role": "user", "content": "Hi"}]


class Run:
    """Keeps what is logged."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.finished = options, [], False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fake: Any = ModuleType(request.param)
    fake.runs = []
    fake.Table = fake.Settings = SimpleNamespace
    fake.init = lambda **options: fake.runs.append(Run(options)) or fake.runs[-1]
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


def run(folder: Path, module: Any, *, done: int = 0, steps: int = 2) -> None:
    record = Record(tracker=module.__name__)
    with RunLog(folder, record=record, settings={"grpo.lr": 1.0}) as log:
        for stage in ("sft", "grpo"):
            log.stage(stage, total=steps, done=done)
            for step in range(done + 1, steps + 1):
                rollout = {"problem_id": "p", "prompt": CHAT, "completions": ["a", "b"], "reward": {"total": 0.5}}
                log.samples(step, [rollout] * 20)
                log.step(step, {"loss": 1.0 / step})


def test_each_stage_is_a_run_with_the_curves_and_a_table(module: Any, tmp_path: Path) -> None:
    run(tmp_path, module)
    sft, grpo = module.runs
    assert sft.options["config"] == {"grpo.lr": 1.0}
    assert sft.options["group"] == tmp_path.name
    assert sft.finished
    assert grpo.finished
    assert [(step, values["loss"]) for step, values in grpo.logged if "loss" in values] == [(1, 1.0), (2, 0.5)]
    (table,) = [values["samples"] for _, values in grpo.logged if "samples" in values]
    assert len(table.data) == trackers.TABLE_ROWS
    assert dict(zip(table.columns, table.data[0], strict=True)) == {
        "step": 1,
        "problem_id": "p",
        "status": "",
        "reward": 0.5,
        "prompt": "user: Hi",
        "completion": "a\n\nb",
    }


def test_no_tracker_learns_a_login_and_a_resumed_run_keeps_it(module: Any, tmp_path: Path) -> None:
    login = "http://otto:geheim@host/v1"
    own = {"workers.base_url": login, "workers.others": {"small": {"base_url": login, "model": "tiny"}}}
    workers = {"workers.kind": "openai", "workers.model": "large", **own}
    config = resolve({"runs": str(tmp_path), "record.tracker": module.__name__, **workers})
    with open_log(config, resume=False) as log:
        log.stage("grpo", total=1)
    told = module.runs[0].options["config"]
    assert told["workers.base_url"] == told["workers.others.small.base_url"] == "http://host/v1"
    assert "geheim" not in str(told)
    kept = resolve(read_saved(config.folder)).workers
    assert [worker.base_url for worker in kept.by_name().values()] == [login, login]


def test_a_resumed_run_goes_on_and_another_of_its_name_is_another(module: Any, tmp_path: Path) -> None:
    run(tmp_path, module)
    run(tmp_path, module, done=1)
    (tmp_path / "tracker.id").unlink()
    run(tmp_path, module)
    told = [each.options.get("id", each.options["name"]) for each in module.runs]
    assert told[:2] == told[2:4]
    assert not set(told[4:]) & set(told[:2])
    assert {each.options["resume"] for each in module.runs} == {"allow"}


def test_one_that_fails_later_ends_the_tracking_alone(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Run, values: dict[str, Any], step: int) -> None:
        raise ConnectionError("the server is gone\nmore")

    monkeypatch.setattr(Run, "log", refuse)
    run(tmp_path, module, steps=3)
    assert capsys.readouterr().out.count("fails (the server is gone): the curves go on in metrics.jsonl alone") == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_an_upload_without_end_is_left(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "FINISH_S", 0.05)
    monkeypatch.setattr(Run, "finish", lambda self: time.sleep(5))
    run(tmp_path, module, steps=1)
    assert "still uploads" in capsys.readouterr().out


def test_one_that_does_not_start_or_is_not_there_is_one_sentence(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("no API key configured\nmore")

    monkeypatch.setattr(module, "init", refuse)
    with pytest.raises(UserError, match=r"does not start: no API key configured; log in") as caught:
        run(tmp_path, module)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, module.__name__, None)
    with pytest.raises(UserError, match=rf"pip install 'fastgrpo\[{module.__name__}\]'"):
        run(tmp_path, module)
