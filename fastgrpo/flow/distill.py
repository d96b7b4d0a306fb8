"""Stage 1a, distillation (FlowReasoner, section 3.2): a teacher writes l rounds of {reasoning, workflow}, each followed
by execution feedback; the reasonings are concatenated to R^, the last workflow is S^, a trace is {prompt, R^, S^}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fastgrpo.errors import UserError
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.parse import InvalidWorkflow, parse_completion
from fastgrpo.flow.teachers import Teacher
from fastgrpo.flow.types import Execution, Problem


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """One distilled sample: `text` is what the policy learns to write after `prompt`."""

    problem_id: str
    prompt: str
    reasoning: str
    workflow: str
    rounds: int
    pass_rate: float

    @property
    def text(self) -> str:
        """The completion in the policy's format: R^ in think tags, then S^ in one Python block."""
        return f"<think>{self.reasoning}</think>\n```python\n{self.workflow}\n```"


async def distill(
    environment: WorkflowEnvironment,
    teacher: Teacher,
    problems: Sequence[Problem],
    *,
    rounds: int,
    samples: int,
    seed: int,
    concurrency: int = 32,
) -> list[Trace]:
    """`samples` traces of each problem, at most `rounds` rounds each; unparsable or unexecutable ones are left out."""
    limit = asyncio.Semaphore(concurrency)

    async def one(problem: Problem, sample: int) -> Trace | None:
        async with limit:
            return await _trace(environment, teacher, problem, rounds, seed * 1_000_003 + sample)

    traces = await asyncio.gather(*[one(problem, sample) for problem in problems for sample in range(samples)])
    return [trace for trace in traces if trace is not None]


async def _trace(
    environment: WorkflowEnvironment, teacher: Teacher, problem: Problem, rounds: int, seed: int
) -> Trace | None:
    history: list[tuple[str, Execution]] = []
    for turn in range(rounds):
        completion = await teacher.write(problem, history, seed)
        execution = await environment.execute(problem, completion, seed + turn)
        if execution.status == "infrastructure":
            return None
        history.append((completion, execution))
        if execution.public_pass_rate == 1.0:
            break
    try:
        parsed = [parse_completion(completion) for completion, _ in history]
    except InvalidWorkflow:
        return None
    return Trace(
        problem_id=problem.id,
        prompt=environment.prompt(problem),
        reasoning=" ".join(part.reasoning for part in parsed),
        workflow=parsed[-1].source,
        rounds=len(history),
        pass_rate=history[-1][1].pass_rate,
    )


def write_traces(path: Path, traces: Sequence[Trace]) -> None:
    """Traces as JSON lines, `{problem_id, prompt, reasoning, workflow, rounds, pass_rate}`."""
    path.write_bytes(b"".join(msgspec.json.encode(trace) + b"\n" for trace in traces))


def read_traces(path: Path) -> list[Trace]:
    """The traces of a JSONL file; UserError names the file and line that is not one."""
    decoder, traces = msgspec.json.Decoder(Trace), []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the traces {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            traces.append(decoder.decode(line))
        except msgspec.MsgspecError as error:
            raise UserError(f"{path}:{number} is not a trace: {error}") from error
    return traces
