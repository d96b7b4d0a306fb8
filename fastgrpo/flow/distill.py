"""Stage 1a, distillation (FlowReasoner, section 3.2): traces made, kept on disk as JSON lines, and selected.

A teacher writes l rounds of {reasoning, workflow}, each followed by execution feedback; the reasonings are concatenated
to R^, the last workflow is S^, a trace is {prompt, R^, S^}.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from fastgrpo.config import Sft
from fastgrpo.errors import UserError, writing
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.parse import InvalidWorkflow, parse_completion
from fastgrpo.flow.teachers import Teacher
from fastgrpo.flow.types import Execution, ExecutionStatus, Problem, RequestRejected, WorkerError
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
    """Append to `traces` what they lack of `samples` traces of each problem, made `concurrency` at once.

    A trace has at most `rounds` rounds. Returns why traces failed, for each that failures of our own prevented. After
    `concurrency` failures in a row no more are tried: an endpoint that is gone would be waited for again and again.
    Raises UserError on a full disk.
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
) -> TeacherTrace:
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
    return TeacherTrace(
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


class TeacherTrace(msgspec.Struct, frozen=True, kw_only=True):
    """One distilled sample: `text` is what the policy learns to write after `prompt`.

    `sample` counts the problem's traces; `status`, `pass_rate` and `reward` are those of the last round's execution.
    """

    problem_id: str
    prompt: str
    reasoning: str
    workflow: str
    rounds: int
    pass_rate: float
    sample: int = 0
    status: ExecutionStatus = "ok"
    reward: float = 0.0

    @property
    def text(self) -> str:
        """The completion in the policy's format: R^ in think tags, then S^ in one Python block."""
        return f"<think>{self.reasoning}</think>\n```python\n{self.workflow}\n```"


class TraceFile:
    """The traces at `path`, to which more are appended; `found` are those that were there.

    A line that a crash has torn is cut off. Raises `UserError` for a file that cannot be written or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(f"the traces {path}"):
            path.touch()
            with path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self.found = read_traces(path)

    def append(self, trace: TeacherTrace) -> None:
        """Write one trace whole, or leave the file as it was and raise `UserError` (disk full)."""
        size = self.path.stat().st_size
        with writing(f"the traces {self.path}"):
            try:
                with self.path.open("ab") as file:
                    file.write(msgspec.json.encode(trace) + b"\n")
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path, size)
                raise


def read_traces(path: Path) -> list[TeacherTrace]:
    """The traces of a JSONL file; UserError names the file and line that is not one. A torn last line is left out."""
    decoder, traces = msgspec.json.Decoder(TeacherTrace), []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read the traces {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            traces.append(decoder.decode(line))
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise UserError(f"{path}:{number} is not a trace: {error}") from error
    return traces


def selected(traces: Sequence[TeacherTrace], problems: Sequence[Problem], config: Sft) -> list[TeacherTrace]:
    """The traces worth learning, in the order of `problems` and samples: those "ok" with at least `sft.min_pass_rate`.

    With `sft.keep` "best" only each problem's trace of the highest reward, the first among equals.
    """
    order = {problem.id: index for index, problem in enumerate(problems)}
    good = [trace for trace in traces if trace.status == "ok" and trace.pass_rate >= config.min_pass_rate]
    good.sort(key=lambda trace: (order.get(trace.problem_id, len(order)), trace.problem_id, trace.sample))
    if config.keep == "all":
        return good
    best: dict[str, TeacherTrace] = {}
    for trace in good:
        if trace.problem_id not in best or trace.reward > best[trace.problem_id].reward:
            best[trace.problem_id] = trace
    return list(best.values())
