"""What the policy reads: the query, and how much it is told about workflows."""

from __future__ import annotations

from typing import Literal

from fastgrpo.flow.types import Execution, Problem

Instruction = Literal["short", "full"]

_FULL = """\
Write a multi-agent workflow in Python that solves the programming problem below. The workflow does not solve the
problem itself: it asks worker models through operators and returns the code of the solution as text. Use as few
operators as the problem needs; simple problems deserve a simple workflow.

Operators (all asynchronous; `import asyncio` is done, and asyncio.gather runs calls in parallel):
- generate(problem, instruction="") -> str: code for the problem.
- custom(input, instruction="") -> str: the answer to any text, for example a plan.
- review(problem, code) -> Review(ok, feedback): whether the code looks right, and what is wrong.
- revise(problem, code, feedback) -> str: the code, corrected after the feedback.
- ensemble(problem, codes) -> str: the most consistent one of several codes.
- test(problem, code, retries=2) -> TestResult(passed, code, feedback): runs public tests, reflects and corrects.
`problem` has the attributes `prompt` and `entry_point`.

Answer with your reasoning in <think>...</think>, then exactly one ```python block that defines
`async def workflow(problem):`, for example

<think>One draft may be wrong, and tests will tell.</think>
```python
async def workflow(problem):
    code = await generate(problem)
    result = await test(problem, code)
    return result.code
```

The problem:
"""


def query_prompt(problem: Problem, instruction: Instruction) -> str:
    """The policy's prompt. "short", a few fixed words, is for a policy that learned the operators by SFT."""
    if instruction == "full":
        return _FULL + problem.prompt
    return f"Problem:\n{problem.prompt.strip()}\nWorkflow:\n"


def round_feedback(execution: Execution) -> str:
    """What the policy reads between two rounds: how its workflow fared, by public tests only."""
    lines = [f"Status: {execution.status}.", execution.feedback, "Write a better workflow.\n"]
    return "\n" + "\n".join(line for line in lines if line)
