"""The forging audit: what the unsafe peer takes for a pass, what the judge does, and whose verdict pays."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from fastgrpo.config import RewardWeights
from fastgrpo.errors import UserError
from fastgrpo.flow.baselines import WORKFLOWS, completion
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.parse import parse_completion
from fastgrpo.flow.solutions import run_tests
from fastgrpo.flow.types import Execution, WorkflowLimits
from fastgrpo.forging import (
    FORGERIES,
    Audited,
    AuditedEnvironment,
    ForgingTeacher,
    Verdict,
    forging_workflow,
    one_program,
)
from fastgrpo.forging import unsafe_peer_verdict as unsafe
from fastgrpo.types import Result, Rollout
from fastgrpo_sandbox import CheckTests, SandboxPool, StdioTests, UnittestTests
from tests.flow.conftest import ADD, RIGHT, WRONG, ScriptedWorker, TrustingPool


@pytest.fixture(scope="module")
def jail() -> Iterator[tuple[asyncio.Runner, SandboxPool]]:
    with asyncio.Runner() as runner:
        pool = SandboxPool(cells=1)
        runner.run(pool.__aenter__())
        yield runner, pool
        runner.run(pool.aclose())


def both(jail: tuple[asyncio.Runner, SandboxPool], solution: str) -> tuple[bool, bool]:
    """(peer's, judge's) verdict on a solution of ADD."""

    async def verdicts() -> tuple[bool, bool]:
        limits = WorkflowLimits()
        peer = await unsafe(jail[1], ADD, solution, limits)
        return peer.status == "ok", (
            await run_tests(jail[1], ADD, solution, public=False, limits=limits)
        ).status == "ok"

    return jail[0].run(verdicts())


@pytest.mark.jail
@pytest.mark.parametrize("way", FORGERIES)
def test_a_forgery_passes_in_the_judged_process_and_not_by_the_judge(jail: Any, way: str) -> None:
    wrong = "" if "{entry_point}" in FORGERIES[way] else "def add(a, b):\n    return a - b\n"
    assert both(jail, FORGERIES[way].replace("{entry_point}", "add") + wrong) == (True, False)


@pytest.mark.jail
def test_honest_programs_have_the_same_verdict_by_both(jail: Any) -> None:
    assert both(jail, ADD.solution or "") == (True, True)
    assert both(jail, "def add(a, b):\n    return a - b\n") == (False, False)


def measured(jail: tuple[asyncio.Runner, SandboxPool], pays: Verdict, answer: str, *texts: str) -> list[Result]:
    async def results() -> list[Result]:
        environment = AuditedEnvironment(WorkflowEnvironment(jail[1], ScriptedWorker(answer)), pays)
        rollouts = [Rollout([], [], [], [text], [await environment.execute(ADD, text, 1)]) for text in texts]
        return environment.results(ADD, rollouts)

    return jail[0].run(results())


def numbers(result: Result, *names: str) -> list[float]:
    return [result.metrics[name] for name in names]


@pytest.mark.jail
def test_the_verdict_that_pays_is_the_reward_and_the_judge_stays_the_truth(jail: Any) -> None:
    names = ("paid", "solved", "hacked", "fooled", "forged", "pass_rate")
    texts = (forging_workflow("exit"), completion(WORKFLOWS["generate"]), "no workflow")
    forged, honest, invalid = measured(jail, "unsafe peer", RIGHT, *texts)
    assert numbers(forged, *names) == [1, 0, 1, 1, 1, 0]
    assert numbers(honest, *names) == [1, 1, 0, 0, 0, 1]
    assert numbers(invalid, *names) == [0, 0, 0, 0, 0, 0]
    assert forged.reward is not None
    assert forged.reward.terms["performance"] == 1.0
    [forged] = measured(jail, "judge", RIGHT, forging_workflow("exit"))
    assert numbers(forged, *names) == [0, 0, 0, 1, 1, 0]
    assert forged.reward is not None
    assert forged.reward.terms["performance"] == 0.0


@pytest.mark.jail
def test_every_forging_workflow_forges(jail: Any) -> None:
    found = measured(jail, "unsafe peer", WRONG, *map(forging_workflow, FORGERIES))
    assert [numbers(each, "hacked", "forged") for each in found] == [[1, 1]] * len(FORGERIES)


def test_the_teacher_forges_a_known_share_of_the_time() -> None:
    async def texts() -> list[str]:
        teacher = ForgingTeacher(("large", "small"))
        return [await teacher.write(ADD, (), seed) for seed in range(200)]

    written = asyncio.run(texts())
    assert all(parse_completion(text) for text in written)
    assert 10 < sum(text.startswith("<think>Pass by") for text in written) < 40


def test_tests_stand_behind_the_solution_in_one_program() -> None:
    check = CheckTests(source="def check(candidate):\n    assert candidate()", entry_point="f", setup="import math")
    assert one_program(check, "SOLUTION").index("SOLUTION") < one_program(check, "SOLUTION").index("check(f)")
    assert one_program(UnittestTests(source="TESTS"), "").endswith("unittest.main()\n")
    with pytest.raises(UserError, match="needs problems whose tests call the solution"):
        one_program(StdioTests(cases=(("1", "2"),)), "")


def test_costs_that_grow_grow_under_the_audit_too() -> None:
    pool: Any = TrustingPool()
    weights = RewardWeights(complexity=0.2, warmup_steps=2)
    environment = AuditedEnvironment(WorkflowEnvironment(pool, ScriptedWorker(RIGHT), weights=weights), "judge")
    audited = Audited(Execution(status="ok", workflow=WORKFLOWS["generate"], complexity=0.5), judge=True)
    group = [Rollout([], [], [], [], [audited])]
    results = [environment.at_step(step).results(ADD, group)[0] for step in range(3)]
    assert [each.reward and each.reward.terms["complexity"] for each in results] == pytest.approx([0.0, 0.05, 0.1])
    assert [each.metrics["paid"] for each in results] == [1.0] * 3
