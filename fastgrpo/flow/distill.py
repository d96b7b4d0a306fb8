"""Stage 1a, distillation (FlowReasoner, section 3.2): a teacher writes l rounds of {reasoning, workflow}, each followed
by execution feedback; the reasonings are concatenated to R^, the last workflow is S^, a trace is {prompt, R^, S^}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.parse import InvalidWorkflow, parse_completion
from fastgrpo.flow.teachers import Teacher
from fastgrpo.flow.traces import Trace, TraceFile
from fastgrpo.flow.types import Execution, Problem
from fastgrpo.flow.workers.protocol import RequestRejected, WorkerError
from fastgrpo.types import Rollout


async def distill(
    environment: WorkflowEnvironment,
    teacher: Teacher,
    problems: Sequence[Problem],
    traces: TraceFile,
    *,
    rounds: int,
    samples: int,
    seed: int,
    concurrency: int,
) -> list[str]:
    """Append `samples` traces of each problem, at most `rounds` rounds each, to `traces`,
    `concurrency` of them at once; none that is there already.

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
    completions, executions = map(list, zip(*history, strict=True))
    [result] = environment.results(problem, [Rollout([], [], [], completions, executions)])
    reasoning, workflow = _joined(completions)
    last = executions[-1]
    return Trace(
        problem_id=problem.id,
        sample=sample,
        prompt=environment.prompt(problem),
        reasoning=reasoning,
        workflow=workflow,
        rounds=len(history),
        status=last.status if workflow else "invalid",
        pass_rate=last.performance,
        reward=result.reward.total if result.reward else 0.0,
    )


def _joined(completions: Sequence[str]) -> tuple[str, str]:
    """R^ and S^ of the rounds' completions; both empty where one cannot be parsed."""
    try:
        parsed = [parse_completion(completion) for completion in completions]
    except InvalidWorkflow:
        return "", ""
    return " ".join(part.reasoning for part in parsed), parsed[-1].source
