"""One query answered by a trained policy: `python -m fastgrpo.solve --model PATH HumanEval/12`.

The policy writes `eval.samples` workflows, each runs in its jail, and the one whose solution passes the most public
tests is shown. Hidden tests take no part in the choice.
"""

from __future__ import annotations

import fastgrpo.engine_extra  # isort: skip # noqa: F401

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastgrpo.cli import CommandLine, parse, run_async
from fastgrpo.engine.opening import open_engine
from fastgrpo.errors import UserError
from fastgrpo.flow import problems as data
from fastgrpo.flow.task import open_environment
from fastgrpo.flow.types import Problem
from fastgrpo.plan import print_plan
from fastgrpo.policy.chat import load_chat
from fastgrpo.policy.hub import with_local_model
from fastgrpo.program import run_program
from fastgrpo.ranks.collectives import joined_ranks, of_replica, replica_share
from fastgrpo.rollouts.experience import first_failure
from fastgrpo.rollouts.rollouts import collect, fitting
from fastgrpo.rollouts.sampling import Sampling


def find(dataset: str | Sequence[str], name: str) -> Problem:
    """The problem called `name`; UserError where the data sets have none of that name."""
    problems = data.load(dataset)
    for problem in problems:
        if problem.id == name:
            return problem
    raise UserError(f"{dataset} has no problem {name!r}: its ids look like {problems[0].id!r}")


async def solve(command: CommandLine) -> None:
    """Print the chosen workflow, its solution and how it did on the public tests."""
    config, names = command.config, command.arguments
    if not config.model.path or len(names) != 1:
        raise UserError("solve needs --model PATH and the id of one problem, such as HumanEval/12")
    config = with_local_model(config)
    problem, model = find(config.data.dataset, names[0]), Path(config.model.path)
    ranks = config.engine.tensor_parallel
    async with of_replica(open_environment(config), ranks) as environment:
        chat = load_chat(model, config.model)
        if environment:
            fitting([problem], environment, chat, Sampling.of(config))
        with open_engine(config, model) as engine:
            groups = await collect(
                engine,
                environment,
                chat,
                [problem][replica_share(ranks)],
                group_size=config.eval.samples,
                sampling=replace(Sampling.of(config), temperature=config.eval.temperature),
                seed=config.seed,
                ranks=ranks,
            )
    if not groups:
        return
    records = [rollout.result.record for rollout in groups[0].rollouts if rollout.reward is not None]
    if not records:
        raise UserError(f"every workflow failed: {first_failure(groups)}")
    best = max(records, key=lambda record: record["tests"]["public"])
    print(
        f"# workflow ({len(best['worker_calls'])} worker calls)\n{best['workflow']}\n\n# solution\n{best['solution']}\n"
    )
    if problem.shown_tests:
        print(f"# public tests passed: {best['tests']['public']:.0%} (best of {len(records)} workflows)")
    else:
        print(f"# no public tests: the first of {len(records)} workflows")


def main() -> None:
    """Answer one query."""
    command = parse(sys.argv[1:], program="fastgrpo.solve", positional="PROBLEM_ID", of_run=True)
    if command.dry_run:
        return print_plan(command.config)
    with joined_ranks(command.config.engine.tensor_parallel):
        run_async(lambda: solve(command))


if __name__ == "__main__":
    run_program(main)
