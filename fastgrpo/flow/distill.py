"""Stage 1a, distillation (FlowReasoner, section 3.2): a teacher writes l rounds of {reasoning, workflow}, each followed
by execution feedback; the reasonings are concatenated to R^, the last workflow is S^, a trace is {prompt, R^, S^}.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Sequence
from typing import Protocol

from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.parse import InvalidWorkflow, parse_completion
from fastgrpo.flow.prompt import query_prompt
from fastgrpo.flow.traces import Trace, TraceFile
from fastgrpo.flow.workers.protocol import Request, RequestRejected, Worker, WorkerError
from fastgrpo.types import Execution, Problem


class Teacher(Protocol):
    """Who writes the traces: sees the query and the rounds so far, answers with a completion in the policy's format."""

    async def write(self, problem: Problem, rounds: Sequence[tuple[str, Execution]], seed: int) -> str:
        """The next round's completion; raises WorkerError where the teacher cannot be reached."""


class ModelTeacher:
    """A large model behind any worker, asked in one growing conversation."""

    def __init__(self, worker: Worker, environment: WorkflowEnvironment) -> None:
        self._worker = worker
        self._environment = environment

    async def write(self, problem: Problem, rounds: Sequence[tuple[str, Execution]], seed: int) -> str:
        """One more assistant turn of the conversation."""
        messages = [{"role": "user", "content": query_prompt(problem, "full")}]
        for completion, execution in rounds:
            messages.append({"role": "assistant", "content": completion})
            messages.append({"role": "user", "content": self._environment.feedback_text(execution)})
        request = Request(operator="custom", problem=problem, messages=messages, seed=seed)
        return (await self._worker.ask(request)).text


class ScriptedTeacher:
    """The demo's offline teacher: frugal, composes workflows at random, and adds a stage where public tests failed.

    Its reasoning opens with the query's length, but its first plan does not depend on it, nor on the reward's weights:
    it teaches the language of workflows and the habit of escalating; what a query deserves is left to GRPO.
    """

    async def write(self, problem: Problem, rounds: Sequence[tuple[str, Execution]], seed: int) -> str:
        """A random plan; after a failed round, a plan with at least one more stage than the last."""
        draw = random.Random(f"{seed}/{problem.id}/{len(rounds)}")
        if not rounds:
            (plan,) = draw.choices(((), ("review",), ("ensemble",), ("test",)), weights=(2, 1, 1, 1))
            return _compose(draw, plan, opening=_length(problem.prompt))
        last = rounds[-1][1]
        stages = {name for name in ("review", "ensemble", "test") if f"await {name}(" in last.workflow}
        missing = [name for name in ("review", "ensemble", "test") if name not in stages]
        stages.update(draw.sample(missing, min(len(missing), 1)))
        return _compose(draw, stages, opening="The tests fail, so do more.")


def _length(prompt: str) -> str:
    words = len(prompt.split())
    return f"A {'short' if words < 45 else 'long' if words > 75 else 'middling'} query."


_HINTS = ("", "", "Handle edge cases.", "Follow the examples.")


def _compose(draw: random.Random, stages: Collection[str], opening: str) -> str:
    """A completion with `stages`; its reasoning says all that its code does, so that the code is learned exactly."""
    hint = draw.choice(_HINTS)
    ask = f'generate(problem, "{hint}")' if hint else "generate(problem)"
    plan, body = [opening], []
    if "ensemble" in stages:
        count = draw.choice((2, 3, 3, 4))
        plan.append(f"Draft {count} times and vote.")
        body.append(f"drafts = await asyncio.gather(*[{ask} for _ in range({count})])")
        body.append("code = await ensemble(problem, drafts)")
    else:
        plan.append("Draft once.")
        body.append(f"code = await {ask}")
    if hint:
        plan.append(hint)
    if "review" in stages:
        plan.append("Review and revise.")
        body.append("notes = await review(problem, code)")
        body.append("if not notes.ok:\n        code = await revise(problem, code, notes.feedback)")
    if "test" in stages:
        retries = draw.choice((1, 2, 3))
        plan.append(f"Test with {retries} retries.")
        body.append(f"result = await test(problem, code, retries={retries})")
        body.append("code = result.code")
    lines = "\n    ".join([*body, "return code"])
    return f"<think>{' '.join(plan)}</think>\n```python\nasync def workflow(problem):\n    {lines}\n```"


async def distill(
    environment: WorkflowEnvironment,
    teacher: Teacher,
    problems: Sequence[Problem],
    traces: TraceFile,
    *,
    rounds: int,
    samples: int,
    seed: int,
    concurrency: int = 32,
) -> list[str]:
    """Append `samples` traces of each problem, at most `rounds` rounds each, to `traces`; none that is there already.

    Returns the reasons of those that our own failures prevented. After `concurrency` of these in a row the rest is not
    tried: an endpoint that is gone would be waited for again and again. Raises UserError on a full disk.
    """
    limit, failures, in_a_row = asyncio.Semaphore(concurrency), [], 0
    there = {(trace.problem_id, trace.sample) for trace in traces.found}

    async def one(problem: Problem, sample: int) -> None:
        nonlocal in_a_row
        async with limit:
            if in_a_row >= concurrency:
                return
            try:
                traces.append(await _trace(environment, teacher, problem, rounds, sample, seed * 1_000_003 + sample))
                in_a_row = 0
            except (WorkerError, RequestRejected) as error:
                failures.append(str(error))
                in_a_row += 1

    wanted = [(problem, sample) for problem in problems for sample in range(samples)]
    try:
        async with asyncio.TaskGroup() as group:
            for problem, sample in wanted:
                if (problem.id, sample) not in there:
                    group.create_task(one(problem, sample))
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return failures


async def _trace(
    environment: WorkflowEnvironment, teacher: Teacher, problem: Problem, rounds: int, sample: int, seed: int
) -> Trace:
    """Raises `WorkerError` or `RequestRejected` where teacher, worker or jail fails."""
    history: list[tuple[str, Execution]] = []
    for turn in range(rounds):
        completion = await teacher.write(problem, history, seed)
        execution = await environment.execute(problem, completion, seed + turn)
        if execution.status == "infrastructure":
            raise WorkerError(execution.error)
        history.append((completion, execution))
        if execution.public_pass_rate == 1.0:
            break
    last = history[-1][1]
    [terms] = environment.rewards(problem, [last])
    reasoning, workflow = _joined([completion for completion, _ in history])
    return Trace(
        problem_id=problem.id,
        sample=sample,
        prompt=environment.prompt(problem),
        reasoning=reasoning,
        workflow=workflow,
        rounds=len(history),
        status=last.status if workflow else "invalid",
        pass_rate=last.pass_rate,
        reward=terms.total if terms else 0.0,
    )


def _joined(completions: Sequence[str]) -> tuple[str, str]:
    """R^ and S^ of the rounds' completions; both empty where one cannot be parsed."""
    try:
        parsed = [parse_completion(completion) for completion in completions]
    except InvalidWorkflow:
        return "", ""
    return " ".join(part.reasoning for part in parsed), parsed[-1].source
