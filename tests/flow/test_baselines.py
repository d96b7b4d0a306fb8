"""The fixed workflows: each is well-formed, pairs with the others by its seeds, and answers in the jails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.controls import baselines, compare, write_rows
from fastgrpo.errors import UserError
from fastgrpo.flow.baselines import ALONE, RANDOM, always, candidates, drawn, fixed_workflows, run_control
from fastgrpo.flow.parse import parse_code, parse_completion
from fastgrpo.flow.problems.files import load
from fastgrpo.flow.task import open_environment
from fastgrpo.flow.types import Execution
from fastgrpo.types import EvalRow, Result, Reward
from tests.flow.conftest import ADD

CONFIG = resolve({"eval.samples": 1, "eval.drafts": 2})


class Recording:
    """An environment that notes what it is asked to execute."""

    def __init__(self) -> None:
        self.executed: list[tuple[str, int]] = []

    def prompt(self, problem: Any) -> str:
        return "prompt"

    async def execute(self, problem: Any, completion: str, seed: int) -> Execution:
        self.executed.append((completion, seed))
        return Execution(status="ok")

    def results(self, problem: Any, rollouts: list[Any]) -> list[Result]:
        return [Result(reward=Reward(total=0.0)) for _ in rollouts]


def test_an_error_that_ends_the_evaluation_ends_what_runs_beside_it() -> None:
    """As a key that is refused: nothing goes on asking the workers."""
    ended: list[int] = []

    class Refused(Recording):
        async def execute(self, problem: Any, completion: str, seed: int) -> Execution:
            self.executed.append((completion, seed))
            number = len(self.executed)
            try:
                await asyncio.sleep(60 if number > 1 else 0.01)
            finally:
                ended.append(number)
            raise UserError("the key is refused")

    async def main() -> None:
        with pytest.raises(UserError, match="refused"):
            await run_control(Refused(), [ADD, ADD], always("code"), samples=2, seed=0)
        assert sorted(ended) == [1, 2, 3, 4]

    asyncio.run(main())


def seeds(control: Any, seed: int = 0) -> list[int]:
    environment: Any = Recording()
    asyncio.run(run_control(environment, [ADD], control, samples=3, seed=seed))
    return [each for _, each in environment.executed]


@pytest.mark.parametrize("drafts", [2, 8])
def test_every_candidate_is_a_workflow_of_so_many_drafts(drafts: int) -> None:
    codes = candidates(drafts)
    assert all(parse_code(code) for code in codes.values())
    assert sum(f"range({drafts})" in code for code in fixed_workflows(drafts).values()) == 3
    assert not any("worker=" in code for code in codes.values())


def test_controls_have_equal_seeds_and_each_sample_its_own() -> None:
    first = seeds(always("a"))
    assert first == seeds(drawn(("large",))) != seeds(always("a"), seed=1)
    assert len(set(first)) == 3


def test_a_drawn_workflow_is_well_formed_and_another_for_another_seed() -> None:
    environment: Any = Recording()
    asyncio.run(run_control(environment, [ADD], drawn(("large", "small")), samples=8, seed=0))
    assert len({parse_completion(text).source for text, _ in environment.executed}) > 2


@pytest.mark.jail
def test_every_control_answers_in_the_jails(tmp_path: Any) -> None:
    problems = sorted(load("humaneval"), key=lambda problem: problem.difficulty)[10:160:50]

    async def main(config: Config) -> list[EvalRow]:
        async with open_environment(config) as environment:
            return await baselines(environment, problems[:1], problems, config)

    rows = asyncio.run(main(CONFIG))
    by_stage = {
        stage: [row for row in rows if row.stage == stage] for stage in dict.fromkeys(row.stage for row in rows)
    }
    assert [name for name in by_stage if not name.startswith("best on")] == [*fixed_workflows(2), RANDOM]
    assert {row.status for row in rows} == {"ok"}
    assert all(len(found) == len(problems) for found in by_stage.values())
    assert [row.metrics["worker_calls"] for row in by_stage[ALONE]] == [1.0] * 3
    text = write_rows(tmp_path, "baselines", rows)
    assert "| worker alone |" in text
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".svg", ".jsonl"}


def test_a_comparison_on_no_problem_is_refused_before_a_jail_opens() -> None:
    config = resolve({"data.held_out": 0, "data.problems": 4})
    with pytest.raises(UserError, match=r"no problem is held out to evaluate on: raise data\.held_out"):
        asyncio.run(compare(config, {}))
