"""The host's side of the operators: answers, accounts, budgets, and what a hostile jail may send."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fastgrpo.flow import messages
from fastgrpo.flow.judge import extract_score
from fastgrpo.flow.operators import JailFailure, OperatorHost
from fastgrpo.flow.parse import InvalidWorkflow, parse_completion
from fastgrpo.flow.problems.numbers import read_answer, vote
from fastgrpo.flow.solutions import last_line, program_after
from fastgrpo.flow.types import NoAnswer, Problem, RequestRejected, WorkerError, WorkflowLimits
from fastgrpo_sandbox import AssertTests, CallError, EndSession, extract_code
from tests.flow.conftest import ADD, RIGHT, WRONG, ScriptedWorker, TrustingPool
from tests.helpers.work import thread_seconds

GOOD, BAD = ADD.solution.rstrip(), "def add(a, b):\n    return a - b"


def host(worker: ScriptedWorker, pool: Any = None, seed: int = 0, **limits: Any) -> OperatorHost:
    return OperatorHost(ADD, worker, pool or TrustingPool(), WorkflowLimits(**limits), seed)


def call(operators: OperatorHost, method: str, **params: Any) -> Any:
    return asyncio.run(operators(method, params))


def test_generate_returns_the_code_and_accounts_for_it() -> None:
    operators = host(ScriptedWorker(f"Here:\n{RIGHT}\nDone."))
    assert call(operators, "generate", instruction="") == GOOD
    [account] = operators.calls
    assert (account.operator, account.prompt_tokens, account.cost_usd) == ("generate", 10, 0.01)


def test_a_call_is_in_the_account_from_its_arrival_on() -> None:
    """Whether it is still open when the workflow ends, cancelled with it, or refused."""
    worker = ScriptedWorker(RIGHT, seconds=60)
    operators = host(worker)

    async def use() -> None:
        tasks = [asyncio.ensure_future(operators("generate", {"instruction": ""})) for _ in range(20)]
        await asyncio.sleep(0)
        assert [call.requests for call in operators.calls] == [1] * 20
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(use())
    assert len(operators.calls) == len(worker.requests) == 20
    assert {(call.requests, call.answered, call.tokens) for call in operators.calls} == {(1, 0, 0)}


def test_refused_calls_and_retries_are_in_the_account() -> None:
    operators = host(ScriptedWorker(WRONG))
    for method, params in (("fly", {}), ("review", {"code": 3}), ("generate", {"instruction": "", "worker": "huge"})):
        with pytest.raises(CallError):
            call(operators, method, **params)
    call(operators, "test", code=BAD, retries=2)
    assert [each.operator for each in operators.calls] == ["fly", "review", "generate", "test"]
    assert [each.requests for each in operators.calls] == [0, 0, 0, 2]
    tested = operators.calls[-1]
    assert (tested.retries, tested.answered, tested.tokens, tested.seconds) == (2, 2, 30, 1.0)


def test_the_account_of_a_workflow_that_asks_for_ever_is_bounded() -> None:
    operators = host(ScriptedWorker(RIGHT))

    async def use() -> None:
        for _ in range(1000):
            with contextlib.suppress(CallError, EndSession):
                await operators("generate", {"instruction": ""})

    asyncio.run(use())
    assert sum(each.requests for each in operators.calls) == WorkflowLimits().calls
    assert len(operators.calls) < 1000


def test_worker_and_temperature_are_passed_on() -> None:
    worker = ScriptedWorker("A")
    operators = host(worker)
    plain: dict[str, dict[str, Any]] = {
        "generate": {"instruction": ""},
        "custom": {"input": "x", "instruction": ""},
        "review": {"code": BAD},
        "revise": {"code": BAD, "feedback": ""},
        "ensemble": {"codes": [BAD, GOOD]},
        "test": {"code": BAD, "retries": 1},
    }
    for method, params in plain.items():
        call(operators, method, **params, worker="small", temperature=1)
        call(operators, method, **params)
    asked = [(request.operator, request.worker, request.temperature) for request in worker.requests]
    assert asked == [(name, *rest) for name in plain for rest in (("small", 1.0), ("large", None))]
    assert [each.worker for each in operators.calls] == ["small", "large"] * 6
    seeds = [request.seed for request in worker.requests]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("value", [-0.1, 2.5, float("nan"), float("inf"), "hot", True, [1]])
def test_a_temperature_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(CallError, match="temperature"):
        call(host(ScriptedWorker(RIGHT)), "generate", instruction="", temperature=value)


def test_an_unknown_worker_is_refused_with_those_there_are() -> None:
    with pytest.raises(CallError, match="no worker 'huge'; choose one of: large, small"):
        call(host(ScriptedWorker(RIGHT)), "generate", instruction="", worker="huge")


def test_a_test_that_is_hidden_too_is_not_shown() -> None:
    """Its text holds the answer, and so may the error of the run."""
    tests = AssertTests(asserts=("assert add(6, 36) == 42",))
    single = replace(ADD, public_tests=tests, hidden_tests=tests)
    worker = ScriptedWorker(WRONG)
    operators = OperatorHost(single, worker, TrustingPool(), WorkflowLimits(), 0)
    passed, _, feedback = call(operators, "test", code=BAD, retries=1)
    assert (passed, feedback) == (False, "1 of 1 public tests fail.")
    assert "42" not in str([request.messages for request in worker.requests])


def test_review_and_ensemble_and_custom() -> None:
    assert call(host(ScriptedWorker("Verdict: correct")), "review", code=GOOD) == (True, "")
    rejected = call(host(ScriptedWorker("**Verdict: Incorrect**\nUse +.")), "review", code=BAD)
    assert rejected == (False, "Use +.")
    assert call(host(ScriptedWorker("I choose B.")), "ensemble", codes=[BAD, GOOD]) == GOOD
    assert call(host(ScriptedWorker("A plan")), "custom", input="x", instruction="") == "A plan"


def test_test_reflects_until_public_tests_pass() -> None:
    worker = ScriptedWorker(WRONG, RIGHT)
    passed, code, feedback = call(host(worker), "test", code=BAD, retries=2)
    assert (passed, code, feedback) == (True, GOOD, "All 1 public tests pass.")
    assert [request.operator for request in worker.requests] == ["test", "test"]
    assert "assert add(1, 2) == 3" in worker.requests[0].messages[-1]["content"]


def test_test_gives_up_after_its_retries() -> None:
    worker = ScriptedWorker(WRONG)
    passed, code, feedback = call(host(worker), "test", code=BAD, retries=1)
    assert (passed, code, len(worker.requests)) == (False, BAD, 1)
    assert feedback == "1 of 1 public tests fail:\nassert add(1, 2) == 3"


def test_no_secret_is_in_a_message() -> None:
    worker = ScriptedWorker(WRONG)
    operators = host(worker)
    call(operators, "generate", instruction="")
    call(operators, "review", code=BAD)
    call(operators, "revise", code=BAD, feedback="x")
    call(operators, "ensemble", codes=[BAD, BAD])
    call(operators, "test", code=BAD, retries=2)
    said = str([request.messages for request in worker.requests])
    assert "assert add(2, 2)" not in said
    assert "return a + b" not in said


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("fly", {}),
        ("generate", {}),
        ("generate", {"instruction": 3}),
        ("generate", {"instruction": "", "problem": "another"}),
        ("review", {"code": None}),
        ("ensemble", {"codes": []}),
        ("ensemble", {"codes": [GOOD] * 17}),
        ("test", {"code": GOOD, "retries": 99}),
        ("test", {"code": GOOD, "retries": -1}),
        ("test", {"code": GOOD, "retries": True}),
        ("generate", {"instruction": "", "worker": None}),
        ("generate", {"instruction": "", "temprature": 1.0}),
        ("custom", {"input": "x" * 200_000, "instruction": ""}),
        ("generate", {"instruction": "", "operator": "test"}),
    ],
)
def test_a_wrong_call_is_the_workflows_fault(method: str, params: dict[str, Any]) -> None:
    worker = ScriptedWorker(RIGHT)
    if "operator" in params:
        assert call(host(worker), method, **params) == GOOD
        return
    with pytest.raises(CallError):
        call(host(worker), method, **params)
    assert not worker.requests


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(["generate", "custom", "review", "revise", "ensemble", "test", ""]) | st.text(),
    st.dictionaries(st.sampled_from(["code", "codes", "instruction", "retries", "input"]) | st.text(), JSON),
)
def test_any_message_is_answered_or_refused(method: str, params: dict[str, Any]) -> None:
    with contextlib.suppress(CallError):
        call(host(ScriptedWorker(RIGHT)), method, **params)


def test_the_budget_counts_requests_and_test_runs() -> None:
    worker, pool = ScriptedWorker(WRONG), TrustingPool()
    with pytest.raises(CallError, match="used up its 4"):
        call(host(worker, pool, calls=4), "test", code=BAD, retries=8)
    assert (len(worker.requests), len(pool.runs)) == (2, 2)


def test_failures_of_ours_are_not_call_errors() -> None:
    with pytest.raises(WorkerError, match="unreachable"):
        call(host(ScriptedWorker(WorkerError("unreachable"))), "generate", instruction="")
    with pytest.raises(WorkerError, match=r"within 0\.05 s"):
        call(host(ScriptedWorker(RIGHT, seconds=5), call_s=0.05), "generate", instruction="")
    with pytest.raises(JailFailure, match="the jail is gone"):
        call(host(ScriptedWorker(RIGHT), TrustingPool("infrastructure")), "test", code=BAD, retries=0)


def test_a_rejected_request_is_the_workflows_fault() -> None:
    with pytest.raises(CallError, match="too long"):
        call(host(ScriptedWorker(RequestRejected("too long"))), "generate", instruction="")


def seeds(operators: OperatorHost, worker: ScriptedWorker, instructions: list[str]) -> dict[str, list[int]]:
    async def ask() -> None:
        await asyncio.gather(*[operators("generate", {"instruction": text}) for text in instructions])

    asyncio.run(ask())
    found: dict[str, list[int]] = {}
    for request in worker.requests:
        found.setdefault(request.messages[-1]["content"], []).append(request.seed)
    return found


def test_request_seeds_depend_on_content_not_on_the_order_of_arrival() -> None:
    first, second, third = ScriptedWorker(RIGHT), ScriptedWorker(RIGHT), ScriptedWorker(RIGHT)
    one = seeds(host(first), first, ["a", "a", "b"])
    assert one == seeds(host(second), second, ["b", "a", "a"])
    assert one != seeds(host(third, seed=1), third, ["a", "a", "b"])
    drawn = [seed for several in one.values() for seed in several]
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**31 for seed in drawn)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("Text\n```py\nx = 1\n```\nand\n```python\ny = 2\n```\nend", "y = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("x = 1", "x = 1\n"),
        ('```python\ns = """\n  ```\n"""\n```', 's = """\n  ```\n"""\n'),
    ],
)
def test_code_of_a_reply(reply: str, code: str) -> None:
    assert extract_code(reply) == code.rstrip()


def test_choice_and_verdict_without_any() -> None:
    assert messages.extract_choice("none of them", 3) == 0
    assert messages.extract_choice("Z", 3) == 0
    assert messages.extract_choice("A or B: B", 2) == 1
    assert messages.extract_verdict("looks bad") == (False, "looks bad")
    assert messages.extract_verdict("") == (False, "")
    assert last_line("") == ""


@settings(deadline=None)
@given(st.text(), st.integers(1, 16))
def test_any_reply_is_understood(reply: str, count: int) -> None:
    assert isinstance(extract_code(reply), str)
    assert 0 <= messages.extract_choice(reply, count) < count
    assert isinstance(messages.extract_verdict(reply)[0], bool)


@pytest.mark.parametrize("reply", ["\n" * 50_000, " \n" * 30_000, "verdict\n" * 10_000, "```python\n" * 10_000])
def test_a_reply_that_runs_away_is_read_in_no_time(reply: str) -> None:
    # Each was the square of its length: a minute.
    assert thread_seconds(lambda: messages.extract_verdict(reply)) < 2
    assert thread_seconds(lambda: extract_code(reply)) < 2


def test_messages_show_problem_and_code(problem: Problem) -> None:
    system, user = messages.review(problem, BAD)
    assert system["role"] == "system"
    assert problem.prompt in user["content"]
    assert BAD.strip() in user["content"]


@pytest.mark.parametrize(
    "code",
    [
        "from __future__ import annotations\nx: Later = 1",
        '"""Text."""\nfrom __future__ import annotations\nx: Later = 1',
        "from __future__ import (\n    annotations,\n    division,\n)\nx: Later = 1",
        "x = 1",
    ],
)
def test_a_program_after_its_preamble(code: str) -> None:
    names: dict[str, object] = {}
    exec(program_after("import math", code), names)
    assert names["x"] == 1
    assert "math" in names
    assert program_after("", code) == code


def test_a_workflow_that_asks_what_nobody_answers_ends_by_its_own_fault() -> None:
    """Else it could leave its group's baseline, and begin anew, whenever its public tests fail."""
    own: list[tuple[str, dict[str, Any]]] = [
        ("generate", {"instruction": "Swear."}),
        ("custom", {"input": "", "instruction": "Swear."}),
        ("generate", {"instruction": "", "temperature": 2.0}),  # at which it may reason until it is cut off
    ]
    for method, params in own:
        operators = host(ScriptedWorker(NoAnswer("filtered its answer out")))
        with pytest.raises(CallError, match="no answer"):
            call(operators, method, **params)
        assert [(each.requests, each.answered) for each in operators.calls] == [(1, 0)]
    with pytest.raises(NoAnswer):
        call(host(ScriptedWorker(NoAnswer("filtered its answer out"))), "generate", instruction=" ")


def test_a_flood_of_refused_calls_hides_no_request() -> None:
    operators = host(ScriptedWorker(RIGHT))

    async def use() -> None:
        for _ in range(256):
            with contextlib.suppress(CallError):
                await operators("fly", {})
        await operators("generate", {"instruction": ""})

    asyncio.run(use())
    assert len(operators.calls) == 257
    assert (operators.calls[-1].operator, operators.calls[-1].answered) == ("generate", 1)


# A worker's reply and a workflow's solution are read on the host, in the loop that everything runs in.
HOSTILE = [
    "\n",
    " ",
    "*\n",
    "*",
    "(",
    "```\n",
    "'''\n",
    "A ",
    "1 ",
    "- ",
    "answer is ",
    "best is ",
    "\\boxed{",
    "</think>",
    "```python\n",
]
TEXTS = {repr(text): "x" + text * (20_000 // len(text)) + "x" for text in HOSTILE}
TEXTS |= {"fence": "```" + "a" * 20_000 + "`", "blanks": "```" + " " * 20_000 + "`", "tildes": "~" * 20_000 + "`"}
TEXTS["score"] = "score" + "*" * 20_000 + "x"


@pytest.mark.parametrize("long", TEXTS.values(), ids=TEXTS)
def test_a_vote_over_hostile_texts_holds_nobody_up(long: str) -> None:
    assert vote([long] * 16) == 0
    assert thread_seconds(lambda: vote([long] * 16)) < 1.0


@pytest.mark.parametrize("long", TEXTS.values(), ids=TEXTS)
def test_a_hostile_text_is_read_in_no_time(long: str) -> None:
    def read_by_all() -> None:
        read_answer(long)
        messages.extract_choice(long, 4)
        messages.extract_verdict(long)
        extract_code(long, "f")
        program_after("import math", long)
        with contextlib.suppress(InvalidWorkflow):
            parse_completion(f"</think>{long}")
        extract_score(long)

    assert thread_seconds(read_by_all) < 2
