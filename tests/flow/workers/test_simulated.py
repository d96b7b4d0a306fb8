"""The simulated worker: really broken mutants, odds that follow difficulty and feedback, determinism."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from statistics import mean
from typing import Any, ClassVar, TypeVar

import pytest
from msgspec.structs import replace

from fastgrpo.config import RewardWeights
from fastgrpo.flow import messages
from fastgrpo.flow.baselines import WORKFLOWS, completion
from fastgrpo.flow.complexity import complexity
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.problems.files import load
from fastgrpo.flow.problems.splitting import describe_tests
from fastgrpo.flow.solutions import run_tests
from fastgrpo.flow.types import Execution, Problem, Request, WorkflowLimits
from fastgrpo.flow.workers.simulated import SKILLS, Bank, SimulatedWorker, Skill, normalised
from fastgrpo_sandbox import AssertTests, Limits, Outcome, SandboxPool, extract_code

pytestmark = pytest.mark.jail
Result = TypeVar("Result")
PROBLEMS = load("humaneval")[3:60:8]
DRAWS = 300


class Shared:
    """One pool in one loop for all tests, and the problems' mutants, which depend on the worker's seed alone."""

    runner: asyncio.Runner
    pool: SandboxPool
    banks: ClassVar[dict[str, asyncio.Task[Bank]]] = {}


@pytest.fixture(scope="module", autouse=True)
def shared() -> Iterator[None]:
    with asyncio.Runner() as Shared.runner:
        Shared.pool = SandboxPool()
        Shared.runner.run(Shared.pool.__aenter__())
        yield
        Shared.runner.run(Shared.pool.aclose())


def with_worker(
    use: Callable[[SandboxPool, SimulatedWorker], Awaitable[Result]], skill: Skill | None = None, *, fresh: bool = False
) -> Result:
    """What `use` makes of the shared pool and a worker; a `fresh` one makes its mutants anew."""

    async def main() -> Result:
        worker = SimulatedWorker(Shared.pool, seed=7, skills={"one": skill or Skill()})
        if not fresh:
            worker._banks = Shared.banks
        try:
            return await use(Shared.pool, worker)
        finally:
            await worker.aclose()

    return Shared.runner.run(main())


def test_mutants_fail_hidden_tests_and_most_fail_public_ones() -> None:
    async def use(pool: SandboxPool, worker: SimulatedWorker) -> list[Bank]:
        await worker.prepare(PROBLEMS)
        banks = [await worker.bank(problem) for problem in PROBLEMS]
        for problem, bank in zip(PROBLEMS, banks, strict=True):
            for mutant in bank.mutants:
                test = partial(run_tests, pool, problem, mutant.source, limits=WorkflowLimits())
                assert (await test(public=False)).pass_rate < 1.0
                assert mutant.visible == ((await test(public=True)).pass_rate < 1.0)
        return banks

    banks = with_worker(use)
    assert all(len({mutant.source for mutant in bank.mutants}) == len(bank.mutants) >= 2 for bank in banks)
    assert mean(mutant.visible for bank in banks for mutant in bank.mutants) > 0.5


def shares(problem: Problem, make: Callable[[Bank], Request], *, skill: Skill | None = None) -> float:
    """Share of right replies to the same request over many seeds."""

    async def use(pool: SandboxPool, worker: SimulatedWorker) -> float:
        bank = await worker.bank(problem)
        request = make(bank)
        replies = [await worker.ask(replace(request, seed=seed)) for seed in range(DRAWS)]
        if request.operator == "review":
            return mean(messages.extract_verdict(reply.text)[0] for reply in replies)
        if request.operator == "ensemble":
            chosen = [messages.extract_choice(reply.text, len(request.codes)) for reply in replies]
            return mean(normalised(request.codes[index]) == bank.right for index in chosen)
        return mean(normalised(extract_code(reply.text)) == bank.right for reply in replies)

    return with_worker(use, skill)


def generate(problem: Problem, instruction: str = "") -> Request:
    return Request(operator="generate", problem=problem, messages=messages.generate(problem, instruction))


def test_generate_succeeds_by_difficulty() -> None:
    skill = Skill()
    for difficulty in (0.0, 0.5, 1.0):
        problem = replace(PROBLEMS[0], difficulty=difficulty)
        assert shares(problem, lambda _, p=problem: generate(p)) == pytest.approx(skill.generates(difficulty), abs=0.08)
    assert skill.generates(0.1) > 0.95
    assert skill.generates(0.9) < 0.3


def test_the_small_worker_is_weaker_and_cheaper_and_right_where_it_is_easy() -> None:
    async def use(pool: SandboxPool, _: SimulatedWorker) -> dict[str, float]:
        both = SimulatedWorker(pool)
        assert both.names == ("large", "small")
        return {name: (await both.ask(replace(generate(PROBLEMS[0]), worker=name))).cost_usd for name in both.names}

    costs = with_worker(use)
    assert costs["small"] < costs["large"] / 5
    large, small = SKILLS["large"], SKILLS["small"]
    assert small.generates(0.1) > 0.9
    assert small.generates(0.5) < large.generates(0.5) - 0.2


def test_at_temperature_zero_the_same_question_has_the_same_answer() -> None:
    problem = replace(PROBLEMS[0], difficulty=0.5)
    cold = replace(generate(problem), temperature=0.0)
    assert shares(problem, lambda _: cold) in (0.0, 1.0)
    assert 0.0 < shares(problem, lambda _: replace(cold, temperature=0.7)) < 1.0


def test_review_notices_what_is_broken() -> None:
    problem = PROBLEMS[1]

    def request(code: Callable[[Bank], str]) -> Callable[[Bank], Request]:
        return lambda bank: Request(operator="review", problem=problem, messages=[], codes=(code(bank),))

    assert shares(problem, request(lambda bank: bank.right)) == pytest.approx(0.94, abs=0.05)
    assert shares(problem, request(lambda bank: bank.mutants[0].source)) == pytest.approx(0.4, abs=0.08)
    foreign = "def other():\n    return 1"
    assert shares(problem, request(lambda bank: foreign)) == pytest.approx(0.4, abs=0.08)


def test_revise_is_as_good_as_its_feedback() -> None:
    problem = replace(PROBLEMS[1], difficulty=0.2)
    failing = describe_tests(problem.public_tests)[0]

    def request(feedback: Callable[[Bank], str]) -> Callable[[Bank], Request]:
        def make(bank: Bank) -> Request:
            code = next(mutant.source for mutant in bank.mutants if mutant.visible)
            return Request(operator="revise", problem=problem, messages=[], codes=(code,), feedback=feedback(bank))

        return make

    def hint(bank: Bank) -> str:
        return next(mutant.hint for mutant in bank.mutants if mutant.visible)

    blind = shares(problem, request(lambda _: "Public tests fail! Verdict: incorrect. Line 3."))
    reviewed = shares(problem, request(hint))
    tested = shares(problem, request(lambda _: f"1 of 3 public tests fail:\n{failing}"))
    assert blind == pytest.approx(0.1 * 0.9, abs=0.08)
    assert reviewed == pytest.approx(0.3 * 0.9, abs=0.08)
    assert tested == pytest.approx(0.45 * 0.9, abs=0.08)


def test_ensemble_takes_the_majority_whatever_its_layout() -> None:
    problem = PROBLEMS[2]

    def request(bank: Bank) -> Request:
        codes = (bank.mutants[0].source, bank.right + "\n# the same", problem.solution)
        return Request(operator="ensemble", problem=problem, messages=[], codes=codes)

    def tied(bank: Bank) -> Request:
        codes = (bank.mutants[0].source, bank.right)
        return Request(operator="ensemble", problem=problem, messages=[], codes=codes)

    assert shares(problem, request) == 1.0
    assert shares(problem, tied) == pytest.approx(0.4 + 0.6 / 2, abs=0.08)


class CountingPool:
    """No run ends well; `most` went on at once, each for `wall_s` at most."""

    def __init__(self) -> None:
        self.running, self.most, self.wall_s = 0, 0, 0.0

    async def run(self, code: str, *, tests: object, limits: Limits) -> Outcome:
        self.running += 1
        self.most, self.wall_s = max(self.most, self.running), limits.wall_s
        await asyncio.sleep(0.01)
        self.running -= 1
        return Outcome(status="timeout")


def test_codes_of_a_workflow_that_only_sleep_do_not_make_the_answer_late() -> None:
    """Late is a failure of ours, and a workflow must not be able to bring that about."""
    codes = tuple(f"import time\ntime.sleep({number})" for number in range(16))
    request = Request(operator="ensemble", problem=PROBLEMS[0], messages=[], codes=codes)
    pool: Any = CountingPool()

    async def use() -> None:
        worker = SimulatedWorker(pool)
        await worker.bank(request.problem)
        pool.most = 0
        await worker.ask(request)

    asyncio.run(use())
    assert pool.most == 16
    assert pool.wall_s < WorkflowLimits().call_s / 4


def test_a_plan_helps_and_cannot_be_guessed() -> None:
    problem = replace(PROBLEMS[0], difficulty=0.9)

    async def use(pool: SandboxPool, worker: SimulatedWorker) -> str:
        request = Request(operator="custom", problem=problem, messages=messages.custom("Plan it.", ""))
        return (await worker.ask(request)).text

    skill = Skill(plan=1.0)
    plan = with_worker(use, skill)
    assert shares(problem, lambda _: generate(problem, plan), skill=skill) == 1.0
    assert shares(problem, lambda _: generate(problem, "Plan: (outline 00000000)"), skill=skill) < 0.5


def test_latency_and_tokens_are_accounted_and_scaled() -> None:
    async def use(pool: SandboxPool, worker: SimulatedWorker) -> tuple[float, float]:
        await worker.bank(PROBLEMS[0])
        slow = SimulatedWorker(pool, seed=7, latency_scale=0.1)
        await slow.bank(PROBLEMS[0])
        start = asyncio.get_running_loop().time()
        reply = await slow.ask(generate(PROBLEMS[0]))
        return reply.seconds, asyncio.get_running_loop().time() - start

    seconds, waited = with_worker(use)
    assert seconds > 0.4
    assert waited >= 0.1 * seconds


def test_a_problem_whose_tests_accept_everything_still_has_a_broken_answer() -> None:
    tests = AssertTests(asserts=("assert callable(f)",))
    problem = replace(
        PROBLEMS[0], id="weak", solution="def f():\n    return 1\n", hidden_tests=tests, public_tests=tests
    )
    bank = with_worker(lambda pool, worker: worker.bank(problem))
    assert [mutant.source for mutant in bank.mutants] == ["raise NotImplementedError"]


def test_executions_repeat_exactly() -> None:
    async def use(pool: SandboxPool, worker: SimulatedWorker) -> list[tuple[float, str, int]]:
        environment = WorkflowEnvironment(pool, worker)
        codes = list(WORKFLOWS.values())
        work = [environment.execute(PROBLEMS[4], completion(code), seed) for code in codes for seed in (1, 2)]
        executions = await asyncio.gather(*work)
        return [(execution.pass_rate, execution.solution, len(execution.calls)) for execution in executions]

    assert with_worker(use, fresh=True) == with_worker(use, fresh=True)


def test_structure_pays_where_problems_are_hard_and_costs_where_they_are_easy() -> None:
    problems = load("humaneval")
    order = sorted(problems, key=lambda problem: problem.difficulty)
    easy, hard = order[:30:3], order[-30::3]
    names = ("generate", "generate, test")

    async def use(pool: SandboxPool, worker: SimulatedWorker) -> dict[str, list[float]]:
        environment = WorkflowEnvironment(pool, worker)

        async def rate(name: str, some: list[Problem]) -> float:
            work = [environment.execute(each, completion(WORKFLOWS[name]), seed) for each in some for seed in range(3)]
            executions: list[Execution] = list(await asyncio.gather(*work))
            assert {execution.status for execution in executions} == {"ok"}
            return mean(execution.pass_rate for execution in executions)

        return {name: [await rate(name, easy), await rate(name, hard)] for name in names}

    rates = with_worker(use)
    weight = RewardWeights().complexity
    cost = {name: weight * complexity(ast.parse(WORKFLOWS[name])) for name in names}
    plain, tested = (rates[name] for name in names)
    assert plain[0] - cost[names[0]] > tested[0] - cost[names[1]]
    assert tested[1] - cost[names[1]] > plain[1] - cost[names[0]] + 0.1
