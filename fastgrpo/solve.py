"""One query answered by a trained policy: `python -m fastgrpo.solve --model PATH HumanEval/12`.

The policy writes `eval.samples` workflows, each runs in its jail, and the one whose solution passes the most public
tests is shown. Hidden tests take no part in the choice.
"""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

from collections.abc import Sequence

from fastgrpo.config import Config
from fastgrpo.errors import UserError, printable
from fastgrpo.evaluation import rollouts_of_model
from fastgrpo.flow.problems.files import load
from fastgrpo.flow.task import open_environment
from fastgrpo.flow.types import Problem
from fastgrpo.plan import command_to_run, run_on_ranks, with_readable_model
from fastgrpo.program import run_program
from fastgrpo.ranks.collectives import of_replica
from fastgrpo.rollouts.asking import opened
from fastgrpo.rollouts.experience import first_failure
from fastgrpo.tasks import writes_workflows


def find(dataset: str | Sequence[str], name: str) -> Problem:
    """The problem called `name`; UserError where the data sets have none of that name."""
    problems = load(dataset)
    for problem in problems:
        if problem.id == name:
            return problem
    raise UserError(f"{dataset} has no problem {name!r}: its ids look like {problems[0].id!r}")


def refuse(config: Config, names: Sequence[str]) -> None:
    """Raises UserError where no policy and one problem are named, or the policy writes no workflows."""
    if not config.model.path or len(names) != 1:
        raise UserError("solve needs --model PATH and the id of one problem, such as HumanEval/12")
    if not writes_workflows(config):
        raise UserError("solve runs workflows, and this policy writes none: python -m fastgrpo.evaluate measures it")


async def solve(config: Config, names: Sequence[str]) -> None:
    """Print the chosen workflow for the problem named, its solution and how it did on the public tests.

    Raises UserError for an unknown problem, and where no completion holds a workflow or all failed for our reasons.
    """
    config = with_readable_model(config)
    problem = find(config.data.dataset, names[0])
    async with of_replica(opened(open_environment(config)), config.engine.tensor_parallel) as environment:
        groups = await rollouts_of_model(config.model.path, environment, [problem], config, config.seed)
    if not groups:
        return
    records = [rollout.result.record for rollout in groups[0].rollouts if rollout.reward is not None]
    if not records:
        raise UserError(f"every workflow failed: {first_failure(groups)}")
    written, records = len(records), [record for record in records if record["workflow"]]
    if not records:
        raise UserError(
            f"none of {written} completions holds a workflow: train the policy longer, or raise eval.samples"
        )
    best = max(records, key=lambda record: record["tests"]["public"])
    calls = len(best["worker_calls"])
    print(printable(f"# workflow ({calls} worker calls)\n{best['workflow']}\n\n# solution\n{best['solution']}\n"))
    if problem.shown_tests:
        print(f"# public tests passed: {best['tests']['public']:.0%} (best of {len(records)} workflows)")
    else:
        print(f"# no public tests: the first of {len(records)} workflows")


def main() -> None:
    """Answer one query."""
    command = command_to_run(
        "fastgrpo.solve",
        lambda command: refuse(command.config, command.arguments),
        parts=[],
        positional="PROBLEM_ID",
        of_run=True,
    )
    if command is not None:
        run_on_ranks(command.config, lambda: solve(command.config, command.arguments))


if __name__ == "__main__":
    run_program(main)
