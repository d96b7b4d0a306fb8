"""A dry run prints the plan; it trains, starts and writes nothing, in any program."""

from __future__ import annotations

import json
import runpy
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from fastgrpo import plan
from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.plan import print_plan
from fastgrpo.policy.demo_policy import create_policy
from fastgrpo.tasks import Task, refuse_untrainable, reward_task
from fastgrpo.train import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "[model]"
    create_policy(["count the vowels in this sentence", "aeiou bcdfg"] * 4, folder, seed=0, vocab_size=400)
    return folder


@pytest.fixture(autouse=True)
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, and no jail, no vLLM."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in ("engine.engine.Engine.__init__", "flow.jails.new_pool", "flow.problems.scoring.new_pool"):
        monkeypatch.setattr(f"fastgrpo.{part}", lambda *_, **__: pytest.fail("a dry run started something"))


@pytest.mark.parametrize(
    "program",
    ["fastgrpo.train", "fastgrpo.sft", "fastgrpo.evaluate", "fastgrpo.solve", "own_task.py", "reward_function.py"],
)
def test_a_dry_run_prints_the_plan_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    problem = ["HumanEval/0"] if program == "fastgrpo.solve" else []
    monkeypatch.setattr(sys, "argv", [program, *problem, "--model", str(model), "--dry-run"])
    example = runpy.run_path(str(ROOT / "examples" / program)) if program.endswith(".py") else {}
    (example.get("main") or import_module(program).main)()
    out, error = capsys.readouterr()
    assert error == ""
    trains = ("stage 2  ", " rollouts before and after\n", "memory of one device")
    parts = {"fastgrpo.sft": ("stage 1  ",), "fastgrpo.evaluate": (" rollouts\n",), "fastgrpo.solve": ()}
    for part in ("[grpo]", "problems  ", *parts.get(program, trains)):
        assert part in out
    assert ("memory of one device" in out) == (program not in parts)
    assert list(Path.cwd().iterdir()) == []
    assert not (tmp_path / "cache" / "fastgrpo").exists()


def test_a_plan_tells_of_evaluations_under_way(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"model.path": str(model), "eval.every": 5, "eval.samples": 2, "data.held_out": 1}
    print_plan(resolve(keys), reward_task([anything], dataset=[{"prompt": "a"}, {"prompt": "b"}]))
    assert "evaluation      2 rollouts before and after, and after every 5 steps\n" in capsys.readouterr().out


def test_a_plan_tells_the_model_as_it_was_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in ({}, {"model.source": "owner/name"}):
        keys = {"model.path": str(model), "data.held_out": 1} | source
        print_plan(resolve(keys), reward_task([anything], dataset=[{"prompt": "a"}, {"prompt": "b"}]))
        assert f"policy          {source.get('model.source', model)}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "printed"), [("0", 1), ("1", 0)])
def test_under_torchrun_one_rank_prints_the_plan_for_all(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, printed: int
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    planned = Mock(wraps=plan.memory_plan)
    monkeypatch.setattr(plan, "memory_plan", planned)
    monkeypatch.setattr(sys, "argv", ["fastgrpo.train", "--model", str(model), "--dry-run"])
    import_module("fastgrpo.train").main()
    assert capsys.readouterr().out.count("memory of one device") == printed
    assert [call.kwargs["ranks"] for call in planned.call_args_list] == [4] * printed


def anything(**_: object) -> list[float]:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        ("sft", ["--task", "code"], "sft teaches workflows"),
        ("solve", [], "solve needs --model PATH and the id of one problem"),
        ("experiments", [], "name one experiment: sft-subset, "),
        ("experiments", ["all"], "there is no experiment 'all'"),
    ],
)
def test_a_dry_run_refuses_what_the_program_does(
    monkeypatch: pytest.MonkeyPatch, program: str, arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program, *arguments, "--dry-run"])
    with pytest.raises(UserError, match=sentence):
        import_module(f"fastgrpo.{program}").main()


def test_the_problems_that_do_not_fit_are_counted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"model.path": str(model), "engine.max_model_len": 32, "grpo.max_new_tokens": 16, "data.held_out": 1}
    rows = [{"prompt": "count"}, {"prompt": "count"}, {"prompt": "count the vowels " * 40}]
    print_plan(resolve(keys), reward_task([anything], dataset=rows))
    assert "too long        1 of these problems" in capsys.readouterr().out
    Path("rows.jsonl").write_text(json.dumps(rows[2]) + "\n" + json.dumps(rows[2]))
    with pytest.raises(UserError, match=r"no prompt fits: .*raise engine\.max_model_len"):
        print_plan(resolve(keys), reward_task([anything], dataset="rows.jsonl"))


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("operator:add", "operator:add is called with the tokens alone: missing a required argument: 'b'"),
        ("operator:nothing", "the function operator:nothing cannot be imported"),
    ],
)
def test_a_loss_function_that_cannot_be_called_is_told_before_anything_starts(
    model: Path, function: str, sentence: str
) -> None:
    keys = {"model.path": str(model), "data.held_out": 0, "grpo.loss_function": function}
    with pytest.raises(UserError, match=f"grpo.loss_function: {sentence}"):
        print_plan(resolve(keys), reward_task([anything], dataset=[{"prompt": "count"}]))
    print_plan(
        resolve(keys | {"grpo.loss_function": "operator:neg"}), reward_task([anything], dataset=[{"prompt": "a"}])
    )


@pytest.mark.parametrize("program", ["train", "sft", "evaluate"])
def test_a_tracker_that_is_not_installed_is_refused_where_the_program_has_use_for_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(sys, "argv", [program, "--model", str(model), "--record.tracker", "wandb", "--dry-run"])
    main = import_module(f"fastgrpo.{program}").main
    if program == "evaluate":
        main()
        assert "evaluation  " in capsys.readouterr().out
        return
    with pytest.raises(
        UserError, match=r"record\.tracker wandb cannot be imported .*: pip install 'fastgrpo\[wandb\]'"
    ):
        main()
    if program == "train":
        keys = {"data.held_out": 0, "record.tracker": "wandb"}
        with pytest.raises(UserError, match=r"record\.tracker wandb cannot be imported"):
            train(keys, model=model, reward=anything, dataset=[{"prompt": "count"}], dry_run=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("program", ["sft", "evaluate", "solve"])
def test_a_program_is_planned_by_what_it_does_and_not_by_what_a_training_would(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    monkeypatch.setattr(plan, "memory_plan", lambda *_, **__: pytest.fail("planned the memory of a training"))
    training = ["--grpo.steps", "6", "--grpo.decay_steps", "4", "--grpo.loss_function", "operator:nothing"]
    problem = ["HumanEval/0"] if program == "solve" else []
    monkeypatch.setattr(sys, "argv", [program, *problem, "--model", str(model), *training, "--dry-run"])
    main = import_module(f"fastgrpo.{program}").main
    main()
    assert "stage 2" not in capsys.readouterr().out
    sys.argv += ["--engine.max_model_len", "9999"]
    with nullcontext() if program == "sft" else pytest.raises(UserError, match=r"positions of the model: lower it"):
        main()


@pytest.mark.parametrize("keys", [{}, {"task": "code"}, {"data.environment": "verifiers:any"}])
def test_terms_of_what_is_no_function_are_refused(model: Path, keys: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"grpo\.reward_scale terms divides reward functions"):
        print_plan(resolve({"grpo.reward_scale": "terms", "model.path": str(model)} | keys))


class Own:
    """An environment of one's own."""

    def prompt(self, problem: object) -> str:
        return "count"

    def execute(self, problem: object, completion: str, seed: int) -> float:
        raise NotImplementedError

    def feedback_text(self, execution: float) -> None:
        raise NotImplementedError

    def results(self, problem: object, rollouts: list[object]) -> list[object]:
        raise NotImplementedError


class OwnAgent(Own):
    def act(self, problem: object, access: object, seed: int) -> None:
        raise NotImplementedError

    execute = feedback_text = None  # type: ignore[assignment]


ROWS = {"reward": anything, "dataset": [{"prompt": "count"}]}
OWN, AGENT = ({"environment": each, "dataset": [SimpleNamespace(id=1)]} for each in (Own(), OwnAgent()))
JUDGE = {"workers.kind": "openai", "workers.base_url": "http://w", "workers.model": "w", "reward.judge": "worker"}


@pytest.mark.parametrize(
    ("given", "keys", "unread"),
    [
        (ROWS, JUDGE, "reward.judge = 'worker' would not be read by what is trained on here: leave it out"),
        (ROWS, {"reward.judge": "large"}, "reward.judge = 'large' would not be read by what is trained on here: leave"),
        (
            ROWS,
            {"reward.format": 1.0, "sft.lr": 1.0},
            "reward.format = 1.0 would not be .*, nor sft.lr: leave them out",
        ),
        (ROWS, {"sandbox.memory_mb": 64}, ""),
        (ROWS, {"data.reward": "m:f"}, "data.reward"),
        (ROWS, {"data.dataset": "rows.jsonl"}, "data.dataset"),
        (ROWS, {"grpo.max_turns": 3}, "grpo.max_turns"),
        (ROWS, {"reward.complexity": 0.0, "sft.epochs": 0}, ""),
        (OWN, {"data.held_out": 5}, "data.held_out = 5 .* leave it out, and pass what is held out as eval_dataset="),
        (OWN | {"eval_dataset": [SimpleNamespace(id=2)]}, {"data.held_out": 1}, ""),
        (OWN | {"eval_dataset": np.array([SimpleNamespace(id=n) for n in range(2)])}, {"data.held_out": 1}, ""),
        (OWN | {"eval_dataset": []}, {"data.held_out": 1}, "data.held_out = 1 "),
        (OWN, {"data.dataset": "rows.jsonl"}, "data.dataset"),
        (OWN, {"grpo.straggler_s": 5.0}, ""),
        (AGENT, {"grpo.straggler_s": 5.0}, "grpo.straggler_s"),
        (AGENT, {"grpo.max_turns": 3}, ""),
        (
            {},
            {"data.reward": "operator:add", "data.dataset": "rows.jsonl", "sandbox.memory_mb": 64},
            "sandbox.memory_mb",
        ),
        ({}, {"task": "code", "sandbox.memory_mb": 64}, ""),
        ({}, {"task": "code", "sandbox.workflow_s": 5.0}, "sandbox.workflow_s"),
        ({}, {"task": "code", "sft.epochs": 1}, "sft.epochs"),
        ({}, {"workers.others.small.model": "s", **JUDGE}, ""),
    ],
)
def test_a_key_that_the_task_does_not_read_is_named(
    model: Path, given: dict[str, object], keys: dict[str, object], unread: str
) -> None:
    with pytest.raises(UserError, match=f"^{unread}") if unread else nullcontext():
        train({"data.held_out": 0, **keys}, model=model, dry_run=True, **given)


def test_a_run_that_goes_on_is_planned_with_keys_that_an_older_version_did_not_refuse(model: Path) -> None:
    train({"data.held_out": 0, "reward.format": 1.0}, model=model, dry_run=True, resume=True, **ROWS)
    keys = {"data.held_out": 0, "grpo.reward_scale": "terms"}
    with pytest.raises(UserError, match=r"grpo\.reward_scale terms divides reward functions"):
        train(keys | {"task": "code"}, model=model, dry_run=True, resume=True)


def test_a_judge_that_is_no_worker_is_told_before_anything_starts(model: Path) -> None:
    keys = {"model.path": str(model), "reward.judge": "huge"}
    with pytest.raises(UserError, match=r"reward\.judge = 'huge' is no worker: choose one of large, small"):
        print_plan(resolve(keys))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"grpo.steps": 6, "grpo.decay_steps": 4},
            r"grpo\.lr would be 0 from step 5 of 6 on, by grpo\.decay_steps: set grpo\.steps to 4, or in a new run",
        ),
        ({"grpo.steps": 4, "grpo.decay_steps": 4}, ""),
        ({"grpo.steps": 6, "grpo.decay_steps": 4, "grpo.min_lr_ratio": 0.1}, ""),
        ({"eval.every": 2}, r"eval\.every = 2 would evaluate nothing, as no problem is held out"),
        ({"eval.every": 2, "data.held_out": 1}, ""),
        ({"grpo.rounds": 2}, r"grpo\.rounds = 2 would be one: a reward function says nothing between two completions"),
    ],
)
def test_what_would_have_no_effect_is_told_before_anything_starts(
    model: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, object], sentence: str
) -> None:
    config = resolve({"model.path": str(model), "data.held_out": 0} | keys)
    task = reward_task([anything], dataset=[{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
        print_plan(config, task, refuse_problems=refuse_untrainable)
    assert bool(capsys.readouterr().out) == (not sentence)


def test_evaluations_under_way_are_asked_of_no_program_but_training(model: Path) -> None:
    """`solve` and `sft` make none."""
    task = reward_task([anything], dataset=[{"prompt": "a"}, {"prompt": "b"}])
    print_plan(resolve({"model.path": str(model), "data.held_out": 0, "eval.every": 2}), task)


def test_a_task_without_a_model_is_refused_as_the_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="this task needs a model"):
        print_plan(resolve({}), reward_task([anything], dataset=[{"prompt": "count"}]))


def test_problems_that_are_none_are_refused_as_the_run_would() -> None:
    task = Task(lambda _: ([{"prompt": "no id"}], []), lambda *_: pytest.fail("opened"), distilled=True)
    with pytest.raises(UserError, match="each problem of load_problems is an object with an id"):
        print_plan(resolve({}), task)


def test_what_leaves_nothing_to_train_on_is_refused_as_the_run_would() -> None:
    held_out = [SimpleNamespace(id="p")]
    task = Task(lambda _: ([], held_out), lambda *_: pytest.fail("opened"), distilled=True)
    with pytest.raises(UserError, match=r"the task has no problem to train on: lower data\.held_out"):
        train(task=task, dry_run=True)


def test_what_leaves_nothing_to_evaluate_on_is_refused_as_the_run_would(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = ["--model", str(model), "--data.held_out", "0", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *nothing])
    with pytest.raises(UserError, match=r"no problem is held out to evaluate on: raise data\.held_out"):
        import_module("fastgrpo.evaluate").main()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", ["train", *nothing])  # which may go without an evaluation
    import_module("fastgrpo.train").main()
    assert ", 0 held out" in capsys.readouterr().out


def test_a_plan_shows_no_login(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"model.path": str(model), "data.held_out": 0, "workers.base_url": "http://otto:geheim@host/v1"}
    with pytest.raises(UserError, match=r"^workers\.base_url = 'http://host/v1' would not be read"):
        print_plan(resolve(keys | {"task": "code"}))
    print_plan(resolve(keys))
    out = capsys.readouterr().out
    assert 'base_url = "http://host/v1"' in out
    assert "geheim" not in out
