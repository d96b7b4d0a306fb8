"""What the policy reads: the query, and how much it is told about workflows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastgrpo.flow.types import Execution, Problem

Instruction = Literal["short", "full"]

_FULL = """\
Write a multi-agent workflow in Python that solves the programming problem below. The workflow does not solve the
problem itself: it asks worker models through operators and returns the code of the solution as text. Every call costs:
ask for as much as this problem needs. A problem that the worker will get right at once deserves one call; for a harder
one, ask further only after what you have seen.

Operators (all asynchronous; `import asyncio` is done, and asyncio.gather runs calls in parallel):
- generate(problem, instruction="") -> str: code for the problem, another draft at each call.
- custom(input, instruction="") -> str: the answer to any text, for example a plan that an instruction may hold.
- review(problem, code) -> Review(ok, feedback): whether the code looks right, and what is wrong.
- revise(problem, code, feedback) -> str: the code, corrected after the feedback.
- ensemble(problem, codes) -> str: the most consistent one of several codes.
- test(problem, code, retries=2) -> TestResult(passed, code, feedback): runs the public tests and has a worker correct
  the code at most `retries` times; with retries=0 it only runs them and asks no worker.
Each also takes `temperature` (0 to 2).{workers}
`problem` has the attributes `prompt` and `entry_point`.

Some ways to use them: draft until the tests pass; several drafts at once, then the first that passes; a plan first,
then drafts that follow it; another instruction or a higher temperature for each draft; correct a draft after its
feedback only if its tests failed.

Answer with your reasoning in <think>...</think>, then exactly one ```python block that defines
`async def workflow(problem):`, for example

<think>One draft may be wrong, and tests will tell.</think>
```python
async def workflow(problem):
    for _ in range(4):
        code = await generate(problem)
        if (await test(problem, code, retries=0)).passed:
            break
    return code
```
{special}
The problem:
"""

# What sets a problem apart from the one that the instruction describes.
_OF_NUMBERS = """\
This problem asks for a number: what generate, revise and the workflow return is a text that ends with the answer;
ensemble takes the answer that most of the texts give, at no cost.
"""
_WITHOUT_TESTS = "This problem has no public tests, so test() passes nothing.\n"


def query_prompt(problem: Problem, instruction: Instruction, workers: Sequence[str] = ()) -> str:
    """The policy's prompt: the problem's, and whether there are public tests, which a workflow's worth hangs on.

    "short", a few fixed words, is for a policy that learned the operators by SFT. `workers`: those that a workflow may
    choose from, the default first.
    """
    if instruction == "short":
        tests = "" if problem.shown_tests else "There are no public tests.\n"
        return f"Problem:\n{problem.prompt.strip()}\n{tests}Workflow:\n"
    special = "" if problem.answer is None else _OF_NUMBERS
    special += "" if problem.shown_tests else _WITHOUT_TESTS
    full = _FULL.replace("{workers}", _choice(workers)).replace("{special}", f"\n{special}" if special else "")
    return full + problem.prompt


def _choice(workers: Sequence[str]) -> str:
    if len(workers) < 2:
        return ""
    others = " or ".join(f'"{name}"' for name in workers[1:])
    return f' The worker is "{workers[0]}"; worker={others} asks another one.'


def round_feedback(execution: Execution) -> str:
    """What the policy reads between two rounds: how its workflow fared, by public tests only."""
    lines = [f"Status: {execution.status}.", execution.feedback, "Write a better workflow.\n"]
    return "\n" + "\n".join(line for line in lines if line)
