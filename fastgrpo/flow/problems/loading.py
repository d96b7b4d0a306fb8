"""A run's problems: the configured data sets loaded, tried, split and weighted."""

from __future__ import annotations

import logging

from fastgrpo.config import Config
from fastgrpo.errors import UserError
from fastgrpo.flow.problems.files import load_sets, ranked
from fastgrpo.flow.problems.scoring import solvable
from fastgrpo.flow.problems.splitting import split
from fastgrpo.flow.types import Problem
from fastgrpo.ranks.collectives import gather_all, is_first_rank
from fastgrpo.rollouts.dataset import mixed, of_each, set_names

log = logging.getLogger(__name__)


def load_problems(config: Config, *, tried: bool = True) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems of all data sets; the splits follow `config.data.seed`, set by set.

    Of each set `data.problems` are used, as `splitting.split` draws those held out: of all difficulties alike.
    Problems whose own solution fails are left out (`scoring.solvable`), unless none is to be `tried`. Of a set with a
    larger weight problems come more than once among those to train on, of none less than once. Where
    `data.eval_dataset` names sets, all of their problems are held out, and no others. Raises UserError.
    """
    first = is_first_rank()
    sets = gather_all(_usable_sets(config, tried) if first else None, "the trial of the problems' solutions")[0]
    sets = [_some(problems, config.data.problems, config.data.seed) for problems in sets]
    count = len(set_names(config.data.dataset))
    sets, separate = sets[:count], sets[count:]
    held_out = of_each(0 if separate else config.data.held_out, sets, "data.held_out")
    weights = of_each(config.data.weights, sets, "data.weights")
    parts = [split(problems, count, config.data.seed) for problems, count in zip(sets, held_out, strict=True)]
    train = mixed([train for train, _ in parts], weights, config.data.seed)
    return train, [problem for problems in (*(test for _, test in parts), *separate) for problem in problems]


def _usable_sets(config: Config, tried: bool) -> list[list[Problem]]:
    sets = load_sets([*set_names(config.data.dataset), *set_names(config.data.eval_dataset)])
    if tried:
        sets = [solvable(problems, config.data, config.sandbox) for problems in sets]
    sets = [ranked(problems) for problems in sets]
    for problems in sets:
        name, count = problems[0].dataset, len(problems)
        simulated = config.task == "flow" and config.workers.kind == "simulated"
        if simulated and (missing := sum(problem.solution is None for problem in problems)):
            raise UserError(
                f"{missing} of {count} problems of {name} have no solution, from which simulated workers make their "
                "answers: set workers.kind to openai"
            )
        if untested := sum(not problem.checked for problem in problems):
            _require_judge(config, f"{untested} of {count} problems of {name} have no tests")
        if shared := sum(problem.shared_test for problem in problems):
            log.warning(
                "%d of %d problems of %s have one test, which is public and hidden at once", shared, count, name
            )
    return sets


def _require_judge(config: Config, said: str) -> None:
    if not config.reward.judge:
        raise UserError(f"{said}: give them some, or name the worker that judges in reward.judge (task flow)")
    if config.workers.kind == "simulated":
        raise UserError(f"{said}, by which simulated workers know what is right: set workers.kind to openai")


def _some(problems: list[Problem], count: int, seed: int) -> list[Problem]:
    return split(problems, count, seed)[1] if 0 < count < len(problems) else problems
