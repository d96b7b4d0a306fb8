"""The host's side of the operators: answers, accounts, budgets, and what a hostile jail may send."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.flow import messages
from fastgrpo.flow.extract import extract_code
from fastgrpo.flow.limits import WorkflowLimits
from fastgrpo.flow.operators import JailFailure, OperatorHost, last_line
from fastgrpo.flow.workers.protocol import RequestRejected, WorkerError
from fastgrpo.types import Problem
from fastgrpo_sandbox import CallError
from tests.flow.conftest import ADD, RIGHT, WRONG, ScriptedWorker, TrustingPool

GOOD, BAD = ADD.solution, "def add(a, b):\n    return a - b\n"


def host(worker: ScriptedWorker, pool: Any = None, seed: int = 0, **limits: Any) -> OperatorHost:
    return OperatorHost(ADD, worker, pool or TrustingPool(), WorkflowLimits(**limits), seed)


def call(operators: OperatorHost, method: str, **params: Any) -> Any:
    return asyncio.run(operators(method, params))


def test_generate_returns_the_code_and_accounts_for_it() -> None:
    operators = host(ScriptedWorker(f"Here:\n{RIGHT}\nDone."))
    assert call(operators, "generate", instruction="") == GOOD
    [account] = operators.calls
    assert (account.operator, account.prompt_tokens, account.cost_usd) == ("generate", 10, 0.01)


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
    assert extract_code(reply) == code


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
    began = time.process_time()
    messages.extract_verdict(reply)
    extract_code(reply)
    assert time.process_time() - began < 2  # was the square of its length: a minute


def test_messages_show_problem_and_code(problem: Problem) -> None:
    system, user = messages.review(problem, BAD)
    assert system["role"] == "system"
    assert problem.prompt in user["content"]
    assert BAD.strip() in user["content"]
