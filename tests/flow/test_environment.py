"""Completions through real jails: scored outcomes for whatever a workflow does, infrastructure for what we do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest

from fastgrpo.flow.baselines import WORKFLOWS, completion
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.problems.files import load
from fastgrpo.flow.programs import ProgramEnvironment
from fastgrpo.flow.solutions import run_tests
from fastgrpo.flow.types import Execution, Reply, Request, RequestRejected, WorkerError, WorkflowLimits
from fastgrpo.types import Rollout
from fastgrpo_sandbox import AssertTests, Limits, Outcome, SandboxPool
from tests.flow.conftest import ADD, RIGHT, WRONG, ScriptedWorker

pytestmark = pytest.mark.jail
Result = TypeVar("Result")
SHORT = WorkflowLimits(session=Limits(wall_s=1.5, cpu_s=1.0, memory_mb=256), tests=Limits(wall_s=3, cpu_s=1))


class Jail(NamedTuple):
    """One pool for all tests of the module, and the event loop that it lives in."""

    runner: asyncio.Runner
    pool: SandboxPool

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    def execute(self, worker: ScriptedWorker, *codes: str, limits: WorkflowLimits = SHORT) -> list[Execution]:
        environment = WorkflowEnvironment(self.pool, worker, limits=limits)

        async def all_of_them() -> list[Execution]:
            return list(await asyncio.gather(*[environment.execute(ADD, completion(code), 1) for code in codes]))

        return self.run(all_of_them())


@pytest.fixture(scope="module")
def jail() -> Iterator[Jail]:
    with asyncio.Runner() as runner:
        pool = SandboxPool(cells=1)
        runner.run(pool.__aenter__())
        yield Jail(runner, pool)
        runner.run(pool.aclose())


def body(text: str) -> str:
    return f"async def workflow(problem):\n    {text}"


def test_a_right_workflow_is_scored_on_hidden_tests(jail: Jail) -> None:
    [right, wrong] = jail.execute(ScriptedWorker(RIGHT, WRONG), WORKFLOWS["generate"], WORKFLOWS["generate"])
    assert sorted((right.pass_rate, wrong.pass_rate)) == [0.0, 1.0]
    good = right if right.pass_rate else wrong
    assert (good.status, good.public_pass_rate, good.solution) == ("ok", 1.0, ADD.solution.rstrip())
    assert good.feedback == "All 1 public tests pass."
    assert [call.operator for call in good.calls] == ["generate"]
    assert 0 < good.complexity < 0.2
    assert good.structure == "generate"
    assert good.workflow == WORKFLOWS["generate"]
    assert good.seconds > 0


def test_what_comes_after_the_last_answer_is_told(jail: Jail) -> None:
    before = time.perf_counter()
    [asked, alone] = jail.execute(
        ScriptedWorker(RIGHT, seconds=0.2), WORKFLOWS["generate"], body('return "def add(a, b): return a + b"')
    )
    assert before + 0.2 <= asked.answered_at < time.perf_counter()
    assert alone.answered_at is None
    group = [Rollout([], [], [], [], executions=[execution]) for execution in (asked, alone)]
    results = WorkflowEnvironment(jail.pool, ScriptedWorker(RIGHT)).results(ADD, group)
    assert [result.answered_at for result in results] == [asked.answered_at, None]


def test_a_solution_that_hangs_in_its_workflows_test_is_not_run_again(jail: Jail) -> None:
    hang = "```python\ndef add(a, b):\n    while True: pass\n```"
    code = body("code = await generate(problem)\n    await test(problem, code, retries=0)\n    return code")
    both = AssertTests(asserts=ADD.public_tests.asserts + ADD.hidden_tests.asserts)
    problem = msgspec.structs.replace(ADD, tests=both, public=(0,))
    limits = WorkflowLimits(tests=Limits(wall_s=1.0, cpu_s=5))
    environment = WorkflowEnvironment(jail.pool, ScriptedWorker(hang), limits=limits)
    before = jail.pool.stats()["timeout"]
    execution = jail.run(environment.execute(problem, completion(code), 1))
    assert (execution.status, execution.pass_rate, execution.public_pass_rate) == ("ok", 0.0, 0.0)
    assert jail.pool.stats()["timeout"] - before == 1


def test_every_canonical_structure_runs(jail: Jail) -> None:
    def answer(request: Any) -> str:
        return {"review": "Verdict: incorrect\nUse +.", "ensemble": "C"}.get(request.operator, RIGHT)

    worker = ScriptedWorker(answer)
    executions = jail.execute(worker, *WORKFLOWS.values(), limits=WorkflowLimits())
    assert [(execution.status, execution.pass_rate) for execution in executions] == [("ok", 1.0)] * len(WORKFLOWS)
    by_name = dict(zip(WORKFLOWS, executions, strict=True))
    assert [call.operator for call in by_name["generate, review, revise"].calls] == ["generate", "review", "revise"]
    assert len(by_name["3 generate, ensemble"].calls) == 4


HIDDEN = {
    "exec": """names = dict(globals())
    exec("async def draft(): return [await generate(None) for _ in range(8)][-1]", names)
    return await names["draft"]()""",
    "frames": """import sys
    call = sys._getframe(1).f_locals["call"]
    return [await call("gen" "erate", instruction="") for _ in range(8)][-1]""",
    "globals": """for _ in range(8): code = await globals()["gen" "erate"](problem)
    return code""",
    "unpacked retries": 'return (await test(problem, "", **{"retries": 8})).code',
    "never awaited": """calls = [asyncio.ensure_future(generate(problem, str(i))) for i in range(20)]
    await asyncio.sleep(0.2)
    return await calls[0]""",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_the_host_served_is_the_cost_whatever_the_text_shows(jail: Jail, name: str) -> None:
    worker = ScriptedWorker(RIGHT)
    [execution] = jail.execute(worker, body(HIDDEN[name]), limits=WorkflowLimits())
    assert (execution.status, execution.pass_rate) == ("ok", 1.0)
    assert execution.requests == len(worker.requests)
    assert execution.complexity >= (5 / 13 if name == "unpacked retries" else 8 / 16)


def test_parallel_calls_overlap(jail: Jail) -> None:
    class Together(ScriptedWorker):
        """Answers no draft before all five are asked for."""

        async def ask(self, request: Request) -> Reply:
            if request.operator == "generate":
                await drafts.wait()
            return await super().ask(request)

    drafts = asyncio.Barrier(5)
    [execution] = jail.execute(Together(RIGHT), WORKFLOWS["3 generate, ensemble"].replace("range(3)", "range(5)"))
    assert execution.pass_rate == 1.0


OUTCOMES = {
    "never returns": ("while True: pass", {"killed", "timeout"}),
    "never answers": ("await asyncio.sleep(100)", {"timeout"}),
    "prints 1 GB": ("for _ in range(1024): print('x' * 2**20)", {"output_limit"}),
    "forks": ("import os\n    while True: os.fork()", {"failed", "timeout", "killed", "memory"}),
    "eats memory": ("x = 'x' * 2**33\n    return x", {"failed", "memory", "killed"}),
    "leaves": ("import os\n    os._exit(0)", {"failed", "killed"}),
    "exits": ("raise SystemExit(0)", {"failed"}),
    "returns a number": ("return 3", {"failed"}),
    "returns nothing": ("pass", {"failed"}),
    "returns bytes": ("return b'x'", {"failed"}),
    "returns too much": ("return 'x' * 10**6", {"failed", "output_limit"}),
    "raises": ("return 1 / 0", {"failed"}),
    "misuses an operator": ("return await ensemble(problem, [])", {"failed"}),
    "asks for ever": ("while True: await generate(problem)", {"failed"}),
    "reads secrets": ("return open('/etc/passwd').read()", {"failed"}),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_a_workflow_does_is_a_scored_outcome(jail: Jail, name: str) -> None:
    text, statuses = OUTCOMES[name]
    [execution, neighbour] = jail.execute(ScriptedWorker(RIGHT), body(text), WORKFLOWS["generate"])
    assert execution.status in statuses
    assert execution.pass_rate == 0.0
    assert execution.error
    assert neighbour.pass_rate == 1.0


def test_an_error_names_itself_in_the_feedback(jail: Jail) -> None:
    [raising, asking] = jail.execute(
        ScriptedWorker(RIGHT), body("return 1 / 0"), body("return await review(problem, 3)")
    )
    assert "ZeroDivisionError" in raising.feedback
    assert "code" in asking.feedback


@pytest.mark.parametrize(
    "solution",
    [
        "def add(a, b):\n    while True: pass",
        "def add(a, b):\n    return 'x' * 10**10",
        "import sys\nsys.exit(0)",
        "",
        "add(",
    ],
)
def test_what_a_solution_does_is_scored(jail: Jail, solution: str) -> None:
    [execution] = jail.execute(ScriptedWorker(f"```python\n{solution}\n```"), WORKFLOWS["generate"])
    assert (execution.status, execution.pass_rate) == ("ok", 0.0)
    assert execution.feedback.startswith("1 of 1 public tests fail")


def test_an_invalid_completion_starts_no_jail(jail: Jail) -> None:
    environment = WorkflowEnvironment(jail.pool, ScriptedWorker(RIGHT))
    execution = jail.run(environment.execute(ADD, "<think>hm</think> no code", 1))
    assert execution.status == "invalid"
    assert "```python" in execution.error


def test_a_failing_worker_is_tried_again_then_infrastructure(jail: Jail) -> None:
    [recovered] = jail.execute(ScriptedWorker(WorkerError("down"), RIGHT), WORKFLOWS["generate"])
    assert (recovered.status, recovered.pass_rate) == ("ok", 1.0)
    lasting = ScriptedWorker(WorkerError("endpoint http://x cannot be reached"))
    [failed] = jail.execute(lasting, WORKFLOWS["generate"])
    assert failed.status == "infrastructure"
    assert "cannot be reached" in failed.error
    assert len(lasting.requests) == 2


def test_an_empty_answer_is_scored_in_whatever_operator(jail: Jail) -> None:
    executions = jail.execute(ScriptedWorker(""), *WORKFLOWS.values())
    assert {(each.status, each.solution, each.pass_rate) for each in executions} == {("ok", "", 0.0)}


def test_a_workflow_cannot_hide_a_failing_worker(jail: Jail) -> None:
    hiding = body("try:\n        return await generate(problem)\n    except BaseException:\n        return ''")
    [execution] = jail.execute(ScriptedWorker(WorkerError("down")), hiding)
    assert execution.status == "infrastructure"


def test_a_rejected_request_can_be_caught_by_the_workflow(jail: Jail) -> None:
    careful = body(
        "try:\n        return await generate(problem)\n    except Exception as error:\n        return str(error)"
    )
    [execution] = jail.execute(ScriptedWorker(RequestRejected("too long")), careful)
    assert (execution.status, execution.solution) == ("ok", "generate(): too long")


class FlakyPool:
    """A real pool whose first hidden-test runs fail in the jail."""

    def __init__(self, pool: SandboxPool, failures: int) -> None:
        self._pool, self._failures = pool, failures
        self.session = pool.session

    async def run(self, code: str, **options: Any) -> Outcome:
        if options.get("tests") == ADD.hidden_tests and self._failures:
            self._failures -= 1
            return Outcome(status="infrastructure", error="the cell died")
        return await self._pool.run(code, **options)


@pytest.mark.parametrize(("failures", "status"), [(1, "ok"), (2, "infrastructure")])
def test_a_failing_jail_is_tried_again_then_infrastructure(jail: Jail, failures: int, status: str) -> None:
    flaky: Any = FlakyPool(jail.pool, failures)
    environment = WorkflowEnvironment(flaky, ScriptedWorker(RIGHT))
    execution = jail.run(environment.execute(ADD, completion(WORKFLOWS["generate"]), 1))
    assert execution.status == status
    assert [len(calls) for calls in (execution.calls, execution.wasted)] == [1, 1]
    assert execution.pass_rate == (status == "ok")


class NotingPool(FlakyPool):
    """A real pool that notes the order of its runs."""

    def __init__(self, pool: SandboxPool) -> None:
        super().__init__(pool, 0)
        self.orders: list[int] = []

    async def run(self, code: str, **options: Any) -> Outcome:
        self.orders.append(options["order"])
        return await super().run(code, **options)


def test_all_runs_of_a_step_have_its_place_among_the_steps(jail: Jail) -> None:
    noting: Any = NotingPool(jail.pool)
    loop = completion(WORKFLOWS["until passed"])
    jail.run(WorkflowEnvironment(noting, ScriptedWorker(WRONG, RIGHT)).at_step(3).execute(ADD, loop, 1))
    assert noting.orders == [3, 3, 3]
    jail.run(ProgramEnvironment(noting).at_step(4).execute(ADD, f"```python\n{ADD.solution}\n```", 1))
    assert noting.orders[3:] == [4, 4]


def test_workflows_of_the_step_that_is_due_go_before_those_of_later_ones(jail: Jail) -> None:
    worker = ScriptedWorker(RIGHT)
    every = WorkflowEnvironment(jail.pool, worker, limits=WorkflowLimits(at_once=1))

    async def all_of_them() -> None:
        work = completion(WORKFLOWS["generate"])
        await asyncio.gather(*[every.at_step(step).execute(ADD, work, 1) for step in (5, 2, 1, 2, 0)])

    jail.run(all_of_them())
    assert [request.order for request in worker.requests] == [5, 0, 1, 2, 2]


PRYING = """import gc, os, sys
    seen = [repr(dict(os.environ)), repr(problem)]
    frame = sys._getframe()
    while frame:
        seen.append(repr(frame.f_locals) + repr(frame.f_globals))
        frame = frame.f_back
    seen += [repr(each)[:100000] for each in gc.get_objects() if isinstance(each, (list, tuple, dict))]
    words = [word[::-1] for word in (')2 ,2(dda tressa', 'b + a nruter', '.srebmun owt fo')]
    return str([any(word in each for each in seen) for word in words])"""


def test_nothing_secret_is_reachable_from_the_jail(jail: Jail) -> None:
    # The last word is the prompt's: it shows that the search finds what is there.
    [execution] = jail.execute(ScriptedWorker(RIGHT), body(PRYING), limits=WorkflowLimits())
    assert execution.solution == "[False, False, True]"


def test_all_canonical_solutions_pass_and_all_empty_bodies_fail(jail: Jail) -> None:
    problems = load("humaneval")
    hidden = partial(run_tests, jail.pool, public=False, limits=WorkflowLimits())

    async def outcomes(codes: list[str]) -> list[Outcome]:
        return list(await asyncio.gather(*map(hidden, problems, codes)))

    right = jail.run(outcomes([problem.solution for problem in problems]))
    empty = jail.run(outcomes([problem.prompt + "    pass\n" for problem in problems]))
    assert [problem.id for problem, outcome in zip(problems, right, strict=True) if outcome.pass_rate < 1.0] == []
    assert [problem.id for problem, outcome in zip(problems, empty, strict=True) if outcome.pass_rate == 1.0] == []


def test_a_solution_may_lean_on_what_the_prompt_gives(jail: Jail) -> None:
    poly = next(problem for problem in load("humaneval") if problem.id == "HumanEval/32")
    alone = poly.solution[poly.solution.index("def find_zero") :]
    assert "def poly" not in alone

    assert jail.run(run_tests(jail.pool, poly, alone, public=False, limits=WorkflowLimits())).pass_rate == 1.0


def test_at_most_so_many_workflows_run_at_once(jail: Jail) -> None:
    running, most = 0, 0

    class CountingWorker(ScriptedWorker):
        async def ask(self, request: Request) -> Reply:
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                return await super().ask(request)
            finally:
                running -= 1

    worker = CountingWorker(RIGHT, seconds=0.1)
    executions = jail.execute(worker, *[WORKFLOWS["generate"]] * 5, limits=WorkflowLimits(at_once=2))
    assert [execution.pass_rate for execution in executions] == [1.0] * 5
    assert most == 2


LOOP = """
async def workflow(problem):
    {loop}:
        try: code = await {call}
        except Exception: pass
    return code
"""


@pytest.mark.parametrize("call", ["generate(problem)", "test(problem, 'x')", "generate(problem, worker='none')"])
def test_a_workflow_that_tries_again_for_ever_ends_by_its_own_fault(jail: Jail, call: str) -> None:
    """Its refused calls kept the host, and so every other workflow, busy until its CPU or wall limit."""
    loop = LOOP.format(loop="while True", call=call)
    [execution] = jail.execute(ScriptedWorker(RIGHT), loop, limits=WorkflowLimits())
    assert (execution.status, execution.error) == ("failed", "the workflow went on after 256 calls that were refused")


def test_a_workflow_may_go_on_after_calls_that_are_refused(jail: Jail) -> None:
    loop = LOOP.format(loop="for _ in range(250)", call="generate(problem)")
    [execution] = jail.execute(ScriptedWorker(RIGHT), loop, limits=WorkflowLimits())
    assert (execution.status, execution.pass_rate, execution.requests) == ("ok", 1.0, 24)
