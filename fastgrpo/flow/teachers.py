"""Who writes the workflows that the policy is warmed up with: a large model, or a grammar that draws them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from fastgrpo.flow.prompt import query_prompt, round_feedback
from fastgrpo.flow.types import Execution, Problem, Request, Worker


class Teacher(Protocol):
    """Who writes the traces: sees the query and the rounds so far, answers with a completion in the policy's format."""

    async def write(self, problem: Problem, rounds: Sequence[tuple[str, Execution]], seed: int) -> str:
        """The next round's completion; raises WorkerError where the teacher cannot be reached."""


class ModelTeacher:
    """A large model behind `worker`, asked in one growing conversation; its workflows may name the worker's models."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def write(self, problem: Problem, rounds: Sequence[tuple[str, Execution]], seed: int) -> str:
        """One more assistant turn of the conversation."""
        messages = [{"role": "user", "content": query_prompt(problem, "full", self._worker.names)}]
        for completion, execution in rounds:
            messages.append({"role": "assistant", "content": completion})
            messages.append({"role": "user", "content": round_feedback(execution)})
        request = Request(operator="custom", problem=problem, messages=messages, seed=seed)
        return (await self._worker.ask(request)).text


class ScriptedTeacher:
    """The offline teacher: draws workflows from a grammar, cheap and dear ones alike, and drafts on where tests failed.

    Its reasoning opens with the query's length, but what it draws does not depend on it, nor on the reward's weights:
    it teaches the language of workflows; what a query deserves is left to GRPO. `workers`: those to choose from.
    """

    def __init__(self, workers: Sequence[str] = ()) -> None:
        cheaply = (partial(_cheaply, worker=name) for name in workers[1:])
        self._begins: tuple[_Begin, ...] = (_directly, _directly, _planned, *cheaply)

    async def write(self, problem: Problem, rounds: Sequence[tuple[str, Execution]], seed: int) -> str:
        """Any workflow; after a failed round one that drafts until the tests pass."""
        draw = random.Random(f"{seed}/{problem.id}/{len(rounds)}")
        first, draft = draw.choice(self._begins)(draw)
        kind = draw.choice(_PERSISTENT if rounds else _KINDS)
        then = kind(draft, draw.choice(_MANY if rounds else _COUNTS))
        opening = "The tests fail, so do more." if rounds else _length(problem.prompt)
        reasoning = " ".join(filter(None, (opening, first.say, then.say, draft.say)))
        body = "\n    ".join((*first.lines, *then.lines))
        return f"<think>{reasoning}</think>\n```python\nasync def workflow(problem):\n    {body}\n```"


def _length(prompt: str) -> str:
    words = len(prompt.split())
    return f"A {'short' if words < 45 else 'long' if words > 75 else 'middling'} query."


class _Step(NamedTuple):
    """Lines of code, and the words that say all that they do, so that the code is learned exactly."""

    say: str
    lines: tuple[str, ...]


class _Draft(NamedTuple):
    """How `generate` is asked: its instruction, an expression, and its other arguments."""

    say: str
    instruction: str = ""
    options: str = ""

    def asked(self, more: str = "") -> str:
        """The call; `more` is one more expression of the instruction."""
        instruction = " + ".join(filter(None, (self.instruction, more)))
        return f"generate({', '.join(filter(None, ('problem', instruction, self.options)))})"


_Begin = Callable[[random.Random], tuple[_Step, _Draft]]

_DRAFTS = (
    _Draft(""),
    _Draft(""),
    _Draft("Handle edge cases.", instruction='"Handle edge cases."'),
    _Draft("Follow the examples.", instruction='"Follow the examples."'),
    _Draft("Be bold.", options="temperature=1.0"),
)


def _directly(draw: random.Random) -> tuple[_Step, _Draft]:
    return _Step("", ()), draw.choice(_DRAFTS)


def _planned(draw: random.Random) -> tuple[_Step, _Draft]:
    return _Step("Plan first.", ('plan = await custom(problem.prompt, "Plan.")',)), _Draft("", instruction="plan")


def _cheaply(draw: random.Random, worker: str) -> tuple[_Step, _Draft]:
    lines = (
        f'code = await generate(problem, worker="{worker}")',
        "if (await test(problem, code, retries=0)).passed:",
        "    return code",
    )
    return _Step(f"Try the {worker} worker first.", lines), draw.choice(_DRAFTS)


def _once(draft: _Draft, count: int) -> _Step:
    return _Step("Draft once.", (f"return await {draft.asked()}",))


def _until_passed(draft: _Draft, count: int) -> _Step:
    return _loop(f"Draft until tests pass, {count} times at most.", f"for _ in range({count}):", draft.asked())


def _hint_by_hint(draft: _Draft, count: int) -> _Step:
    hints = '"", "Handle edge cases.", "Follow the examples."'
    return _loop("Another hint for each draft until tests pass.", f"for hint in ({hints}):", draft.asked("hint"))


def _hotter(draft: _Draft, count: int) -> _Step:
    call = draft._replace(options="temperature=heat").asked()
    return _loop("A hotter draft each time until tests pass.", "for heat in (0.3, 0.7, 1.0, 1.3):", call)


def _loop(say: str, head: str, call: str) -> _Step:
    return _Step(say, (head, f"    code = await {call}", *_STOP))


def _first_passed(draft: _Draft, count: int) -> _Step:
    head = f"for code in await asyncio.gather(*[{draft.asked()} for _ in range({count})]):"
    return _Step(f"Draft {count} at once, take the first that passes.", (head, *_STOP))


_STOP = ("    if (await test(problem, code, retries=0)).passed:", "        break", "return code")


def _vote(draft: _Draft, count: int) -> _Step:
    drafts = f"drafts = await asyncio.gather(*[{draft.asked()} for _ in range({count})])"
    return _Step(f"Draft {count} at once and vote.", (drafts, "return await ensemble(problem, drafts)"))


def _corrected(draft: _Draft, count: int) -> _Step:
    test = f"return (await test(problem, code, retries={count})).code"
    return _Step(f"Draft once, correct it {count} times while tests fail.", (f"code = await {draft.asked()}", test))


def _reviewed(draft: _Draft, count: int) -> _Step:
    lines = (
        f"code = await {draft.asked()}",
        "notes = await review(problem, code)",
        "if not notes.ok:",
        "    code = await revise(problem, code, notes.feedback)",
        "return code",
    )
    return _Step("Draft once, review and revise.", lines)


_PERSISTENT: tuple[Callable[[_Draft, int], _Step], ...] = (_until_passed, _hint_by_hint, _hotter)
# How many drafts are made at most; after a failed round.
_COUNTS, _MANY = (2, 3, 4, 6, 8), (4, 6, 8)
_KINDS = (_once, _once, _once, *_PERSISTENT, _until_passed, _first_passed, _vote, _corrected, _reviewed)
