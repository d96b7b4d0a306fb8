"""What a workflow finds in its jail: the operators, each one message to the host. This file's text runs in the jail."""

import asyncio
from collections import namedtuple

Problem = namedtuple("Problem", "prompt entry_point")
Review = namedtuple("Review", "ok feedback")
TestResult = namedtuple("TestResult", "passed code feedback")


def operators(call):
    """The six operators over `call`, by name; `options` are `worker` and `temperature`, which the host checks."""

    async def generate(problem, instruction="", **options):
        """Code for the problem."""
        return await call("generate", instruction=instruction, **options)

    async def custom(input, instruction="", **options):
        """The answer to any text."""
        return await call("custom", input=input, instruction=instruction, **options)

    async def review(problem, code, **options):
        """Whether the code looks right, and what is wrong."""
        return Review(*await call("review", code=code, **options))

    async def revise(problem, code, feedback, **options):
        """The code, corrected after the feedback."""
        return await call("revise", code=code, feedback=feedback, **options)

    async def ensemble(problem, codes, **options):
        """The most consistent one of several codes."""
        return await call("ensemble", codes=list(codes), **options)

    async def test(problem, code, retries=2, **options):
        """The code after the public tests, corrected at most `retries` times."""
        return TestResult(*await call("test", code=code, retries=retries, **options))

    return {each.__name__: each for each in (generate, custom, review, revise, ensemble, test)}


async def main(call, code, problem):
    """Run the workflow in `code`; its solution, which must be text."""
    names = {"__name__": "workflow", "asyncio": asyncio, "Review": Review, "TestResult": TestResult, **operators(call)}
    exec(compile(code, "<workflow>", "exec"), names)
    solution = await names["workflow"](Problem(**problem))
    if not isinstance(solution, str):
        raise TypeError(f"workflow() returned {type(solution).__name__}, not the solution's code")
    return str(solution)
