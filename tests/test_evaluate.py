"""Evaluation and solving where nothing can be measured: what failed is said, and no empty result is a success."""

import asyncio
import multiprocessing
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from msgspec.structs import replace

from fastgrpo import controls, evaluate, evaluation, solve
from fastgrpo.cli import parse
from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.engine import opening
from fastgrpo.errors import UserError, say_error
from fastgrpo.flow.baselines import WORKFLOWS
from fastgrpo.report import write_report
from fastgrpo.tasks import Task
from fastgrpo.types import EvalRow, Group, Result, Reward, Rollout, Sampling

CONFIG = resolve({"model.path": "folder"})
PROBLEM = SimpleNamespace(id="p", difficulty=0.5)


def rollout(status: str) -> Rollout:
    ok = Result(reward=Reward(total=0.5), metrics={"pass_rate": 0.25})
    failed = Result(status="infrastructure", error="the endpoint cannot be reached")
    return Rollout([1], [1], [0.0], ["text"], result=failed if status == "infrastructure" else ok)


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Rollout]:
    """The rollouts that both programs get, without engine and jails, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    rollouts: list[Rollout] = []

    async def collect(*_: object, **__: object) -> list[Group]:
        return [Group(PROBLEM, "prompt", list(rollouts))]

    @asynccontextmanager
    async def environment(config: Config, log: object = None):
        yield SimpleNamespace(prompt=None)

    @contextmanager
    def engine(config: Config, model: Path):
        yield None

    monkeypatch.setattr(evaluation, "collect", collect)
    monkeypatch.setattr(evaluation, "prompts_fit", lambda problems, *_: [True] * len(problems))
    monkeypatch.setattr(evaluation, "open_engine", engine)
    monkeypatch.setattr(evaluation, "load_chat", lambda path, config: None)
    monkeypatch.setattr(evaluate, "task_of", lambda config: Task(lambda config: ([], [PROBLEM]), environment))
    for program in (evaluate, solve):
        monkeypatch.setattr(program, "with_readable_model", lambda config: config)
    monkeypatch.setattr(solve, "open_environment", environment)
    monkeypatch.setattr(solve, "find", lambda dataset, name: PROBLEM)
    return rollouts


def test_workflows_left_out_are_told(
    collected: list[Rollout], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    collected += [rollout("ok"), rollout("infrastructure")]
    asyncio.run(evaluate.policy_alone(CONFIG))
    assert "pass_rate 0.2500\nreward    0.5000\n" in capsys.readouterr().out
    assert "1 of 2 rollouts are left out of the evaluation: the endpoint cannot be reached" in caplog.text
    [row] = evaluation.read_rows(CONFIG.folder / "evaluation.json")
    assert (row.stage, row.metrics["pass_rate"]) == ("evaluate", 0.25)


def test_what_executes_long_is_measured_whatever_training_leaves_out(
    collected: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sampling] = []

    async def collect(*_: object, sampling: Sampling, **__: object) -> list[Group]:
        asked.append(sampling)
        return [Group(PROBLEM, "prompt", [rollout("ok")])]

    monkeypatch.setattr(evaluation, "collect", collect)
    keys = {"model.path": "folder", "grpo.straggler_s": 5.0, "grpo.routing_replay": True, "eval.temperature": 0.5}
    asyncio.run(evaluate.policy_alone(resolve(keys)))
    assert [(one.straggler_s, one.routes, one.temperature) for one in asked] == [(0.0, False, 0.5)]


def test_nothing_evaluated_is_an_error(collected: list[Rollout]) -> None:
    collected += [rollout("infrastructure")] * 2
    with pytest.raises(UserError, match="nothing was evaluated"):
        asyncio.run(evaluate.policy_alone(CONFIG))


def test_what_is_said_meanwhile(collected: list[Rollout], capsys: pytest.CaptureFixture[str]) -> None:
    collected += [rollout("ok")]
    asyncio.run(evaluate.policy_alone(CONFIG))
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["loading folder into vLLM", "4 rollouts of 1 problems, 4 of each"]
    assert said[2].startswith(f"the rollouts are in {CONFIG.folder}/evaluation.json, rows of the stage evaluate")


def test_more_failures_than_a_run_bears_are_told(collected: list[Rollout], caplog: pytest.LogCaptureFixture) -> None:
    collected += [rollout("ok"), *[rollout("infrastructure")] * 2]
    asyncio.run(evaluate.policy_alone(CONFIG))
    assert "2 of 3 rollouts are left out of the evaluation, beyond grpo.max_infrastructure = 0.5" in caplog.text


@pytest.mark.parametrize("workflow", [{"nodes": 3}, ""])
def test_an_evaluation_of_problems_of_any_kind_is_read_again(tmp_path: Path, workflow: object) -> None:
    """Of an environment of one's own: its problems' fields, but for the id, mean what they mean there."""
    problem = SimpleNamespace(id=7, difficulty="hard", dataset=[1, 2])
    one = rollout("ok")
    one.result = replace(one.result, record={"workflow": workflow})
    for stage in ("sft", "grpo"):
        evaluation.save_rows(tmp_path / "evaluation.json", evaluation.rows_of([Group(problem, "prompt", [one])], stage))
    rows = evaluation.read_rows(tmp_path / "evaluation.json")
    assert [(row.stage, row.problem_id, row.difficulty, row.dataset, row.workflow) for row in rows] == [
        ("sft", "7", None, "", "text"),
        ("grpo", "7", None, "", "text"),
    ]


def test_what_is_no_number_is_null_in_the_file_and_in_no_mean(tmp_path: Path) -> None:
    path, nan = tmp_path / "evaluation.json", float("nan")

    def row(stage: str, reward: float, share: float) -> EvalRow:
        metrics = {"pass_rate": share, "worker_tokens": share}
        return EvalRow(stage=stage, problem_id="p", status="ok", reward=reward, metrics=metrics, difficulty=0.5)

    evaluation.save_rows(path, [row("sft", nan, nan), row("sft", 0.5, 1.0)])
    evaluation.save_rows(path, [row("grpo", 1.0, nan)])
    rows = evaluation.read_rows(path)
    assert [each.reward for each in rows] == [None, 0.5, 1.0]
    assert evaluation.summary(rows) == {"pass_rate": 1.0, "worker_tokens": 1.0, "reward": 0.75}
    (tmp_path / "metrics.jsonl").write_text('{"stage":"grpo","step":1,"loss":null,"reward/total":null}\n')
    assert write_report(tmp_path).stat().st_size > 0
    path.write_text('[{"stage": 1}]')
    with pytest.raises(UserError, match=r"evaluation\.json holds no evaluation .*: move it away"):
        evaluation.read_rows(path)


def test_a_query_that_only_we_failed_is_an_error(collected: list[Rollout]) -> None:
    collected += [rollout("infrastructure")] * 2
    with pytest.raises(UserError, match="every workflow failed: the endpoint cannot be reached"):
        asyncio.run(solve.solve(CONFIG, ("p",)))


def test_a_solution_says_nothing_to_the_terminal(
    collected: list[Rollout], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "find", lambda dataset, name: SimpleNamespace(shown_tests=False))
    record = {"workflow": "w = 'é'\n\t# \x1b]52;c;eA==\x07", "solution": "x\r\x9b2J\x7f\n", "worker_calls": []}
    result = Result(status="ok", reward=Reward(total=1.0), record=record | {"tests": {"public": 1.0}})
    collected += [Rollout([1], [1], [0.0], ["text"], result=result)]
    asyncio.run(solve.solve(CONFIG, ("p",)))
    said = capsys.readouterr().out
    assert "w = 'é'\n\t# \\x1b]52;c;eA==\\x07\n\n# solution\nx\\r\\x9b2J\\x7f\n" in said
    say_error("it ended with \x1b[2J")
    assert capsys.readouterr().err.endswith("it ended with \\x1b[2J\n")


def test_a_policy_that_wrote_no_workflow_is_an_error(collected: list[Rollout]) -> None:
    result = Result(status="invalid", reward=Reward(total=-0.5), record={"workflow": "", "worker_calls": []})
    collected += [Rollout([1], [1], [0.0], ["text"], result=result)] * 2
    with pytest.raises(UserError, match="none of 2 completions holds a workflow"):
        asyncio.run(solve.solve(CONFIG, ("p",)))


def test_an_engine_that_refuses_its_settings_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError(
            "1 validation error for ModelConfig\n  Value error, max_model_len (8192) is too long [type=value_error, "
            "input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]\n  For more"
        )

    monkeypatch.setattr(opening, "Engine", refuse)
    with (
        pytest.raises(UserError, match=r"^vLLM does not start with folder .*: max_model_len \(8192\) is too long$"),
        opening.open_engine(CONFIG, Path("folder")),
    ):
        pass


@pytest.mark.parametrize(
    "said",
    [
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "To serve at least one request (0.1 GiB KV cache is needed). Try increasing `gpu_memory_utilization`",
    ],
)
@pytest.mark.parametrize(
    ("on_gpu", "fix"), [(False, r"raise engine\.kv_cache_gib, or lower that"), (True, "lower that")]
)
def test_a_cache_without_room_for_a_sequence_is_told_by_its_own_key(
    monkeypatch: pytest.MonkeyPatch, said: str, on_gpu: bool, fix: str
) -> None:
    monkeypatch.setattr(opening, "_open", Mock(side_effect=ValueError(said)))
    monkeypatch.setattr(opening.torch.cuda, "is_available", lambda: on_gpu)
    wanted = rf": the KV cache has no room for a sequence of engine\.max_model_len = \d+ tokens: {fix}$"
    with pytest.raises(UserError, match=wanted), opening.open_engine(CONFIG, Path("folder")):
        pass


def test_too_few_states_of_recurrent_layers_are_told_by_the_key_that_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = "max_num_seqs (256) exceeds available Mamba cache blocks (33). Each decode sequence requires one"
    monkeypatch.setattr(opening, "_open", Mock(side_effect=ValueError(said)))
    wanted = r": it has states for 33 sequences at once: lower engine\.max_num_seqs = \d+ to 33$"
    with pytest.raises(UserError, match=wanted), opening.open_engine(CONFIG, Path("folder")):
        pass


def write_thirty(path: Path, who: str) -> None:
    for n in range(30):
        row = EvalRow(stage=f"{who}{n}", problem_id="p", status="ok", reward=1.0, metrics={})
        evaluation.save_rows(path, [row])


def test_programs_that_write_one_evaluation_at_once_keep_each_other_s_rows(tmp_path: Path) -> None:
    path = tmp_path / "run" / "evaluation.json"
    context = multiprocessing.get_context("fork")  # with all imported: that takes seconds
    programs = [context.Process(target=write_thirty, args=(path, who)) for who in ("sft", "evaluate")]
    for program in programs:
        program.start()
    for program in programs:
        program.join(60)
    assert [program.exitcode for program in programs] == [0, 0]
    found = {row.stage for row in evaluation.read_rows(path)}
    assert found == {f"{who}{n}" for who in ("sft", "evaluate") for n in range(30)}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_model_that_is_none_is_told_before_any_solution_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where a run's folder is named in place of one of its checkpoints."""

    def tried(*_: object) -> None:
        raise AssertionError("solutions are tried")

    monkeypatch.setattr(evaluate, "task_of", lambda config: Task(tried, lambda *_: None))  # type: ignore[arg-type]
    monkeypatch.setattr(evaluate, "compare", tried)
    monkeypatch.setattr(solve, "find", tried)
    config = resolve({"model.path": str(tmp_path)})
    for program in (evaluate.policy_alone, evaluate.beside_baselines, lambda config: solve.solve(config, ["any"])):
        with pytest.raises(UserError, match=r"model folder .* has no config\.json"):
            asyncio.run(program(config))


def test_nothing_held_out_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "task_of", lambda config: Task(lambda _: ([PROBLEM], []), lambda *_: None))
    monkeypatch.setattr(evaluate, "with_readable_model", lambda config: config)
    with pytest.raises(UserError, match="no problem is held out to evaluate on: raise"):
        asyncio.run(evaluate.policy_alone(resolve({"model.path": "m"})))


def test_fixed_workflows_belong_to_the_workflow_task() -> None:
    with pytest.raises(UserError, match="fixed workflows answer problems with tests: leave task"):
        asyncio.run(controls.compare(resolve({"task": "code"}), {}))


def test_a_model_after_rl_is_shown_beside_its_start(tmp_path: Path) -> None:
    checkpoint, start = tmp_path / "run/checkpoints/step-000003", tmp_path / "run/sft"
    for folder in (checkpoint, start):
        folder.mkdir(parents=True)
    (tmp_path / "run/config.toml").write_text("[another]\nprogram = 1\n")
    assert controls.policies(str(checkpoint)) == {"policy": str(checkpoint)}
    (tmp_path / "run/metrics.jsonl").touch()
    (tmp_path / "run/config.toml").write_text("")
    assert controls.policies(str(checkpoint)) == {"SFT only": str(start), "SFT + RL": str(checkpoint)}
    assert controls.policies(str(start)) == {"SFT only": str(start)}
    (tmp_path / "run/config.toml").write_text('[model]\npath = "base"\n')
    assert controls.policies(str(start)) == {"SFT only": str(start)}
    assert controls.policies(str(checkpoint)) == {"policy": str(checkpoint)}


def test_the_seconds_of_writing_are_part_of_the_latency() -> None:
    ended = rollout("ok")
    ended.result = Result(reward=Reward(total=0.5), metrics={"latency_seconds": 2.0})
    ended.writing_s = 0.5
    [row] = evaluation.rows_of([Group(PROBLEM, "prompt", [ended])], "stage")
    assert row.metrics == {"latency_seconds": 2.5}


def test_the_flag_is_the_programs_own() -> None:
    given = ["--baselines", "--seed", "3"]
    command = parse(given, program="fastgrpo.evaluate", flags={"--baselines": "compare"})
    assert (command.flags, command.config.seed) == ({"--baselines"}, 3)
    with pytest.raises(UserError, match="--baselines needs a value"):
        parse(given, program="fastgrpo.train")


def test_how_the_policy_adapts_is_in_the_summary() -> None:
    def row(number: int, calls: float) -> EvalRow:
        metrics = {"pass_rate": 1.0, "spent": calls, "worker_tokens": 100 * calls * (1 + number)}
        code = WORKFLOWS["generate" if calls == 1 else "until passed"]
        problem = {"problem_id": f"p{number}", "difficulty": number / 9}
        return EvalRow(stage="grpo", status="ok", reward=1.0, metrics=metrics, workflow=code, **problem)

    found = evaluation.summary([row(number, 1.0 + number // 3) for number in range(9)])
    assert (found["cost_hard_over_easy"], found["structures_by_problem"]) == (3.0, 2.0)
    alone = EvalRow(stage="", problem_id="", status="ok", reward=0.0, metrics={})
    assert "cost_hard_over_easy" not in evaluation.summary([alone])
