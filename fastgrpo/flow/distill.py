"""Stage 1a, distillation (FlowReasoner, section 3.2): a teacher writes l rounds of {reasoning, workflow}, each followed
by execution feedback; the reasonings are concatenated to R^, the last workflow is S^, a trace is {prompt, R^, S^}.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from fastgrpo.errors import UserError
from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.parse import InvalidWorkflow, parse_completion
from fastgrpo.flow.prompt import query_prompt
from fastgrpo.flow.types import Execution, Problem
from fastgrpo.flow.workers.protocol import Request, Worker


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
