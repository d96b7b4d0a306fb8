"""Evaluation on problems that were never trained on: `python -m fastgrpo.evaluate --model PATH`.

With `--baselines` fixed workflows answer the same problems through the same environment, the policy beside them where a
model is named.
"""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

from fastgrpo.config import Config
from fastgrpo.controls import compare, policies, write_rows
from fastgrpo.errors import UserError, say_on_stderr
from fastgrpo.evaluation import evaluate_model, save_rows, summary
from fastgrpo.plan import command_to_run, run_on_ranks, with_readable_model
from fastgrpo.program import run_program
from fastgrpo.ranks.collectives import is_first_rank, of_replica
from fastgrpo.rollouts.asking import opened
from fastgrpo.tasks import problems_of, refuse_none_held_out, task_of

BASELINES = "--baselines"


async def policy_alone(config: Config) -> None:
    """Print the means of `eval.samples` rollouts of each held-out problem and keep the rows in evaluation.json.

    Raises UserError where no model is named or no problem held out, and as `evaluate_model` does.
    """
    if not config.model.path:
        raise UserError("evaluate needs --model PATH: a Hugging Face folder, such as a checkpoint of a run")
    config = with_readable_model(config)
    task = task_of(config)
    _, held_out = found = problems_of(task, config)
    refuse_none_held_out(found)
    async with of_replica(opened(task.open_environment(config, None)), config.engine.tensor_parallel) as environment:
        rows = await evaluate_model(config.model.path, environment, held_out, config, "evaluate")
    kept = config.folder / "evaluation.json"
    save_rows(kept, rows)
    if is_first_rank():
        say_on_stderr(f"the rollouts are in {kept}, rows of the stage evaluate, and replace those of an earlier one")
        means = summary(rows)
        width = max(map(len, means), default=0)
        for name, value in means.items():
            print(f"{name:{width}} {value:.4f}")


async def beside_baselines(config: Config) -> None:
    """Print the fixed workflows' means on the held-out problems, those of the model's policy beside them where one is
    named, and keep them in baselines.*. Raises UserError as `compare` does.
    """
    config = with_readable_model(config)
    rows = await compare(config, policies(config.model.path) if config.model.path else {})
    if is_first_rank():
        print(write_rows(config.folder, "baselines", rows))


def main() -> None:
    """Evaluate `--model PATH` on the held-out problems, or with `--baselines` compare it with fixed workflows."""
    flag = {BASELINES: "compare with fixed workflows; --model may be left out"}
    command = command_to_run(
        "fastgrpo.evaluate",
        refuse_problems=lambda _, found: refuse_none_held_out(found),
        parts=["evaluation"],
        of_run=True,
        flags=flag,
    )
    if command is not None:
        program = beside_baselines if BASELINES in command.flags else policy_alone
        run_on_ranks(command.config, lambda: program(command.config))


if __name__ == "__main__":
    run_program(main)
