"""Fixed workflows: the controls that a policy is measured against, each written for every query alike."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Sequence

from fastgrpo.flow.environment import WorkflowEnvironment
from fastgrpo.flow.teachers import ScriptedTeacher
from fastgrpo.flow.types import Problem
from fastgrpo.rollouts.asking import all_of
from fastgrpo.types import Group, Rollout

# A problem and a sample's seed to the completion that a control answers with.
Control = Callable[[Problem, int], Awaitable[str]]

_BODIES = {
    "generate": "return await generate(problem)",
    "until passed": """for _ in range(4):
        code = await generate(problem)
        if (await test(problem, code, retries=0)).passed:
            break
    return code""",
    "3 generate, first passed": """for code in await asyncio.gather(*[generate(problem) for _ in range(3)]):
        if (await test(problem, code, retries=0)).passed:
            break
    return code""",
    "small until passed, then large": """for _ in range(2):
        code = await generate(problem, worker="small")
        if (await test(problem, code, retries=0)).passed:
            return code
    return await generate(problem)""",
    "plan, until passed": """plan = await custom(problem.prompt, "Plan.")
    for _ in range(4):
        code = await generate(problem, plan)
        if (await test(problem, code, retries=0)).passed:
            break
    return code""",
    "generate, review, revise": """code = await generate(problem)
    notes = await review(problem, code)
    if not notes.ok:
        code = await revise(problem, code, notes.feedback)
    return code""",
    "generate, test": """code = await generate(problem)
    result = await test(problem, code)
    return result.code""",
    "3 generate, ensemble": """codes = await asyncio.gather(*[generate(problem) for _ in range(3)])
    return await ensemble(problem, codes)""",
    "3 generate, ensemble, test": """codes = await asyncio.gather(*[generate(problem) for _ in range(3)])
    code = await ensemble(problem, codes)
    result = await test(problem, code)
    return result.code""",
    "generate, test, review, revise": """code = await generate(problem)
    result = await test(problem, code)
    notes = await review(problem, result.code)
    if not notes.ok:
        return await revise(problem, result.code, notes.feedback)
    return result.code""",
}
WORKFLOWS = {name: f"async def workflow(problem):\n    {body}" for name, body in _BODIES.items()}

ALONE = "worker alone"
RANDOM = "random workflow"
# The further candidates for the best fixed workflow: these need no second worker.
_FURTHER = ("plan, until passed", "3 generate, ensemble, test", "generate, test, review, revise")


def completion(code: str) -> str:
    """The code in the policy's format."""
    return f"<think>Let me see.</think>\n```python\n{code}\n```"


def fixed_workflows(drafts: int) -> dict[str, str]:
    """The code of the controls that the literature compares with, by name; `drafts` for those that draw several.

    Of the drafts that are tested the first to pass all public tests is returned, the last one where none does.
    """
    return {
        ALONE: WORKFLOWS["generate"],
        f"self-consistency of {drafts}": _drawing("3 generate, ensemble", drafts),
        "test and retry": WORKFLOWS["generate, test"],
        f"until passed, {drafts} drafts": WORKFLOWS["until passed"].replace("range(4)", f"range({drafts})"),
        f"best of {drafts} by public tests": _drawing("3 generate, first passed", drafts),
        "review and revise": WORKFLOWS["generate, review, revise"],
    }


def _drawing(name: str, drafts: int) -> str:
    return WORKFLOWS[name].replace("range(3)", f"range({drafts})")


def candidates(drafts: int) -> dict[str, str]:
    """Among which the best fixed workflow is chosen: the controls and a few that combine them."""
    return fixed_workflows(drafts) | {name: WORKFLOWS[name] for name in _FURTHER}


def always(code: str) -> Control:
    """The control that answers every query with `code`."""

    async def write(problem: Problem, seed: int) -> str:
        return completion(code)

    return write


def drawn(workers: Sequence[str]) -> Control:
    """The control that draws any workflow of the scripted teacher's grammar, by the seed and the problem's id."""
    teacher = ScriptedTeacher(workers)

    async def write(problem: Problem, seed: int) -> str:
        return await teacher.write(problem, (), seed)

    return write


async def run_control(
    environment: WorkflowEnvironment, problems: Iterable[Problem], control: Control, *, samples: int, seed: int
) -> list[Group]:
    """`samples` rollouts of each problem, run as a policy's are; equal seeds for all controls, so that they pair."""
    runs = (_group(environment, problem, control, samples, f"{seed}/{problem.id}") for problem in problems)
    return await all_of(runs)


async def _group(
    environment: WorkflowEnvironment, problem: Problem, control: Control, samples: int, name: str
) -> Group:
    async def rollout(seed: int) -> Rollout:
        text = await control(problem, seed)
        return Rollout([], [], [], [text], [await environment.execute(problem, text, seed)])

    seeds = [random.Random(f"{name}/{sample}").getrandbits(31) for sample in range(samples)]
    rollouts = await all_of(map(rollout, seeds))
    for each, result in zip(rollouts, environment.results(problem, rollouts), strict=True):
        each.result = result
    return Group(problem, environment.prompt(problem), rollouts)
