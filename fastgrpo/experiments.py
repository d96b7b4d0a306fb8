"""The experiments of docs/experiments.md: `python -m fastgrpo.experiments NAME [--section.key VALUE]`.

Each composes training and evaluation with other keys, in one process, and leaves Markdown, plots and the raw rows under
`runs/experiments/NAME`. What is finished there is not done again, and a training that was cut goes on. Where `--model`
is named, trainings start from it (`sft-subset` teaches it first), and experiments that only measure take it for the
trained policy, but for what stage 1 left in a run's folder: they train that.
"""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from fastgrpo import forging, sft
from fastgrpo.config import Config
from fastgrpo.config_files import flat, to_toml
from fastgrpo.config_keys import resolve
from fastgrpo.controls import compare, policies, write_rows
from fastgrpo.errors import UserError, expanded
from fastgrpo.evaluation import read_rows, save_rows
from fastgrpo.plan import command_to_run, with_readable_model
from fastgrpo.program import run_async, run_program
from fastgrpo.record.comparison import markdown, spread, write_texts
from fastgrpo.record.json_lines import lines_of
from fastgrpo.record.problem_statistics import by_problem
from fastgrpo.tasks import Task, task_of
from fastgrpo.train import train
from fastgrpo.training.checkpoint import Checkpoints
from fastgrpo.types import EvalRow

Rows = list[EvalRow]
AUDITED: Mapping[forging.Verdict, str] = {
    "judge": "paid by the judge",
    "unsafe peer": "paid by the judged process itself",
}
PERFORMANCE_ONLY = {"reward.complexity": 0.0, "reward.efficiency": 0.0, "reward.diversity": 0.0}


def sft_subset(config: Config, folder: Path) -> Rows:
    """How far supervised fine-tuning alone gets on HumanEval, or on `data.problems` of it."""
    held_out = config.data.held_out
    keys = {
        "data.dataset": "humaneval",
        "data.weights": 1.0,
        "data.held_out": held_out[0] if isinstance(held_out, tuple) else held_out,
        "grpo.steps": 0,
    }
    start = taught(config, folder, keys, sft.teach)
    run = trained(config, folder, "sft", keys | {"model.path": start})
    return rows_of_run(run, {"sft": "SFT only"}) + measured(folder / "controls.json", partial(compare, run, {}))


def reward_ablation(config: Config, folder: Path) -> Rows:
    """The pass rate as the only reward against the full one."""
    full = trained(config, folder, "full", {})
    alone = trained(config, folder, "performance-only", PERFORMANCE_ONLY)
    rows = rows_of_run(full, {"sft": "SFT only", "grpo": "full reward"})
    return rows + rows_of_run(alone, {"grpo": "performance only"})


def weights(config: Config, folder: Path) -> Rows:
    """The weights of complexity and efficiency, each at nothing and at twice what is configured."""
    rows = rows_of_run(trained(config, folder, "as-configured", {}), {"sft": "SFT only", "grpo": "as configured"})
    for term in ("complexity", "efficiency"):
        for factor in (0, 2):
            keys = {f"reward.{term}": factor * getattr(config.reward, term)}
            run = trained(config, folder, f"{term}-x{factor}", keys)
            rows += rows_of_run(run, {"grpo": f"{term} x {factor}"})
    return rows


def worker_swap(config: Config, folder: Path) -> Rows:
    """A policy trained with the first worker, answered by each of the `workers.others` without training again.

    Raises UserError where there is no other.
    """
    workers = config.workers.by_name()
    if len(workers) < 2:
        raise UserError("worker-swap needs another worker: add a table [workers.others.NAME]; docs/configuration.md")
    model = policy(with_worker(config, config.workers.name), folder)
    rows: Rows = []
    for name in workers:
        found = measured(folder / f"{name}.json", partial(compare, with_worker(config, name), {"policy": model}))
        rows += [msgspec.structs.replace(row, stage=f"{name}: {row.stage}") for row in found]
    return rows


def cost(config: Config, folder: Path) -> Rows:
    """What the policy gains over the fixed workflows, and what it costs beside them."""
    model = policy(config, folder)
    return measured(folder / "comparison.json", partial(compare, config, policies(model)))


def numbers(config: Config, folder: Path) -> Rows:
    """Questions without tests, whose answer is a number that the host compares: the policy beside the controls.

    Raises UserError where a problem has no such answer.
    """
    if any(problem.answer is None for problem in task_of(config).load_problems(config)[1]):
        raise UserError("its questions need answers: set data.dataset to a file of GSM8K's form (docs/data.md)")
    return cost(config, folder)


def hacking(config: Config, folder: Path) -> Rows:
    """Public against hidden pass rates before and after RL: a gap that grows is a test that is gamed."""
    model = policy(config, folder)
    return measured(folder / "policies.json", partial(compare, config, policies(model), controls=False))


def forging_audit(config: Config, folder: Path) -> Rows:
    """The same training paid by the judge's verdict, and by one taken in the judged process, as the peers do."""
    all_traces = {"sft.keep": "all", "sft.min_pass_rate": 0.0}
    start = config.model.path or taught(config, folder, all_traces, forging.teach)
    rows: Rows = []
    steps: list[dict[str, Any]] = []
    for pays, stage in AUDITED.items():
        run = trained(config, folder, pays.replace(" ", "-"), {"model.path": start}, forging.audit_task(pays))
        rows += rows_of_run(run, {"grpo": stage} if rows else {"sft": "before RL", "grpo": stage})
        steps += forging.steps_of(run, stage)
    tried = run_async(lambda: forging.fooled(config))
    held_out = forging.held_out_table([row.plain() for row in rows])
    tables = f"{held_out}\n{forging.steps_table(steps)}\n{tried}\n"
    details = {"details.md": tables, "details.jsonl": lines_of(steps), "details.svg": forging.steps_figure(steps)}
    write_texts(folder, details)
    return rows


def judge(config: Config, folder: Path) -> Rows:
    """A judge model's score as the reward against hidden tests as the reward, and how far the two agree."""
    name = config.reward.judge or ("large" if config.workers.kind == "simulated" else config.workers.name)
    tested = trained(config, folder, "hidden-tests", {"reward.judge": ""})
    judged = trained(config, folder, "judge-model", {"reward.judge": name})
    rows = rows_of_run(judged, {"sft": "before RL", "grpo": "paid by the judge model"})
    write_texts(folder, {"details.md": agreement(rows)})
    return rows + rows_of_run(tested, {"grpo": "paid by hidden tests"})


def agreement(rows: Rows) -> str:
    """How a judge's scores agree with hidden tests: Markdown.

    Agreeing is to score 5 of 10 or more what passes all tests, and less what does not; the score less the pass rate, in
    points, is what is overpaid: where it grows by RL, the judge is gamed. What the judge was not asked about, because
    its workflow failed, and what has no tests, is in none of the columns.
    """
    head = ["", "judge's score, %", "pass rate, %", "overpaid, points", "agrees, %", "right, scored low, %"]
    lines = [[*head, "wrong, scored high, %"]]
    plain = [row.plain() | {"overpaid": paid} for row in rows if (paid := _overpaid(row)) is not None]
    for stage in dict.fromkeys(row.stage for row in rows):
        some = [row.metrics for row in rows if row.stage == stage and _overpaid(row) is not None]
        scores, rates, over = (by_problem(plain, stage, key) for key in ("judge_score", "pass_rate", "overpaid"))
        pairs = [((m["judge_score"] or 0) >= 0.5, m["solved"] == 1) for m in some]
        shares = (
            [high == right for high, right in pairs],
            [not high for high, right in pairs if right],
            [high for high, right in pairs if not right],
        )
        figures = [_spread(column) for column in (scores, rates, over)]
        lines.append([stage, *figures, *(f"{100 * fmean(share):.1f}" if share else "" for share in shares)])
    return markdown(lines)


def _spread(column: Mapping[str, float]) -> str:
    return spread([100 * value for value in column.values()], 1) if column else ""


def _overpaid(row: EvalRow) -> float | None:
    score, rate = row.metrics.get("judge_score"), row.metrics.get("pass_rate")
    return None if score is None or rate is None else score - rate


EXPERIMENTS: Mapping[str, Callable[[Config, Path], Rows]] = {
    "sft-subset": sft_subset,
    "reward-ablation": reward_ablation,
    "worker-swap": worker_swap,
    "weights": weights,
    "cost": cost,
    "hacking": hacking,
    "numbers": numbers,
    "forging": forging_audit,
    "judge": judge,
}


def with_worker(config: Config, name: str) -> Config:
    """The configuration with the worker called `name` as the only one."""
    return msgspec.structs.replace(config, workers=config.workers.by_name()[name])


def trained(config: Config, folder: Path, name: str, keys: Mapping[str, Any], task: Task | None = None) -> Config:
    """The configuration of the run `name` in `folder`, which differs by `keys`, once it has been trained to its end.

    `task` None is the one that the configuration names.
    """
    run = resolve(flat(config) | dict(keys) | {"name": name, "runs": str(folder)})
    # The last that it leaves but its report, which anybody may have made meanwhile.
    if all(row.stage != "grpo" for row in read_rows(run.folder / "evaluation.json")):
        train(run, resume=(run.folder / "config.toml").exists(), task=task)
    return run


def taught(
    config: Config, folder: Path, keys: Mapping[str, Any], teach: Callable[..., Coroutine[Any, Any, Path]]
) -> str:
    """The folder of a policy after stage 1 with other `keys`, by `teach`, once it has been taught."""
    run = resolve(flat(config) | dict(keys) | {"name": "taught", "runs": str(folder)})
    if (run.folder / "sft").exists():
        return str(run.folder / "sft")
    return str(run_async(partial(teach, run, resume=(run.folder / "config.toml").exists())))


def policy(config: Config, folder: Path) -> str:
    """The folder of the trained policy: the model that is named unless it is a start, else a run's in `folder`.

    Raises UserError where that run has ended and its checkpoints are gone.
    """
    if config.model.path and policies(config.model.path).keys() != {"SFT only"}:
        return config.model.path
    run = trained(config, folder, "policy", {}).folder
    latest = Checkpoints(run / "checkpoints").latest()
    if latest is None:
        raise UserError(f"the run {run} has ended and has no whole checkpoint: remove its folder to train it again")
    return str(latest)


def rows_of_run(run: Config, stages: Mapping[str, str]) -> Rows:
    """The rows of a run's own evaluations, under the names that `stages` gives them."""
    rows = read_rows(run.folder / "evaluation.json")
    return [msgspec.structs.replace(row, stage=stages[row.stage]) for row in rows if row.stage in stages]


def measured(path: Path, measure: Callable[[], Coroutine[Any, Any, Rows]]) -> Rows:
    """The rows of a measurement, made once and kept at `path`."""
    if not path.exists():
        save_rows(path, run_async(measure))
    return read_rows(path)


def perform(name: str, config: Config) -> str:
    """Do what is left of the experiment `name` and return its Markdown, which is also in its folder.

    Raises UserError for an unknown name, and where the folder is of another configuration.
    """
    folder = expanded(config.runs) / "experiments" / named([name])
    saved = folder / "config.toml"
    if saved.exists() and saved.read_bytes() != to_toml(config).encode():
        raise UserError(f"{folder} was made with another configuration: move it away, or set --runs")
    write_texts(folder, {saved.name: to_toml(config)})
    text = write_rows(folder, "results", EXPERIMENTS[name](config, folder))
    details = folder / "details.md"
    return f"{text}\n## Details\n\n{details.read_text(encoding='utf-8')}" if details.exists() else text


def named(arguments: Sequence[str]) -> str:
    """The experiment that a command line names. Raises UserError where it names none, several or an unknown one."""
    if len(arguments) != 1:
        raise UserError(f"name one experiment: {', '.join(EXPERIMENTS)}")
    if arguments[0] not in EXPERIMENTS:
        raise UserError(f"there is no experiment {arguments[0]!r}: choose one of {', '.join(EXPERIMENTS)}")
    return arguments[0]


def main() -> None:
    """Perform the experiment named on the command line and print its tables."""
    command = command_to_run(
        "fastgrpo.experiments",
        lambda command: named(command.arguments),
        positional="|".join(EXPERIMENTS),
        of_run=True,
    )
    if command is None:
        return
    if "RANK" in os.environ:
        raise UserError("experiments run in one process: start them without torchrun")
    print(perform(command.arguments[0], with_readable_model(command.config)))


if __name__ == "__main__":
    run_program(main)
