"""The offline default: two workers that are simulated, not models. They know the solutions and err by the dice.

They answer `generate` with the canonical solution or with a really broken mutation of it (checked in a jail to fail
hidden tests), by odds that fall with the problem's difficulty; the other operators change those odds in the way they do
for real workers. What a run with it measures is how well a policy uses the operators, never how well anything writes
code: replies are drawn from the host's secrets.
"""

from __future__ import annotations

import ast
import asyncio
import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Literal

import msgspec

from fastgrpo.flow.messages import letter
from fastgrpo.flow.problems.numbers import is_right
from fastgrpo.flow.problems.splitting import describe_tests
from fastgrpo.flow.types import Problem, Reply, Request, WorkerError
from fastgrpo.flow.workers.mutants import Mutation, mutations
from fastgrpo_sandbox import Limits, Outcome, SandboxPool
from fastgrpo_sandbox.guest.memo import memo
from fastgrpo_sandbox.guest.syntax import parse

# A mutant that needs more CPU is left out: mutants are to be wrong, not slow. The wall limit is wide, because what a
# busy machine delays must not change which mutants there are.
_TRIAL = Limits(wall_s=30.0, cpu_s=0.5)
# What a workflow wrote itself may sleep, and must not make the answer late.
_FOREIGN = Limits(wall_s=5.0, cpu_s=0.5)
_TRIALS = 12
_MUTANTS = 5
_SHOWN_CHARS = 200


class Skill(msgspec.Struct, frozen=True, kw_only=True):
    """The odds of one worker, for a problem of difficulty d in [0, 1].

    As with real workers of 0.5 to 1.5 B (`docs/experiments.md`), a new draft helps more than a correction. The figures
    themselves are guesses, chosen so that the demo has something to learn.
    """

    # `generate` is right with easiest - (easiest - hardest) / (1 + exp((midpoint - d) / width)): reliable up to some
    # difficulty, unreliable beyond it.
    easiest: float = 0.985
    hardest: float = 0.2
    midpoint: float = 0.45
    width: float = 0.06
    visible: float = 0.85  # that what is broken fails public tests too, where the problem has such answers
    plan: float = 0.15  # share of the failures that a plan from `custom` in the instruction removes
    notices: float = 0.6  # that `review` notices broken code
    false_alarm: float = 0.06  # that it rejects right code
    # That `revise` and the reflection of `test` correct broken code, by the best feedback they got, times 1 - d/2.
    fixes_blind: float = 0.1
    fixes_reviewed: float = 0.3
    fixes_tested: float = 0.45
    spoils: float = 0.05  # that they spoil right code
    judges: float = 0.4  # that `ensemble`, which takes the majority, sees the right one in a tie
    tokens_per_s: float = 100.0
    first_token_s: float = 0.4
    prompt_price: float = 1.1  # US dollars for a million tokens
    completion_price: float = 4.4

    def generates(self, difficulty: float) -> float:
        """Probability that one plain generate is right."""
        fall = 1.0 / (1.0 + math.exp((self.midpoint - difficulty) / self.width))
        return self.easiest - (self.easiest - self.hardest) * fall


# The second worker is far cheaper, and right where problems are easy.
SKILLS = {
    "large": Skill(),
    "small": Skill(
        easiest=0.95,
        hardest=0.1,
        midpoint=0.3,
        plan=0.05,
        notices=0.4,
        fixes_reviewed=0.2,
        fixes_tested=0.3,
        judges=0.2,
        tokens_per_s=300.0,
        first_token_s=0.2,
        prompt_price=0.15,
        completion_price=0.6,
    ),
}


class Mutant(msgspec.Struct, frozen=True):
    """Broken code that failed hidden tests in a jail; `visible` if public tests fail too."""

    source: str
    hint: str
    visible: bool


class Bank(msgspec.Struct, frozen=True):
    """What the worker can answer to one problem, by normalised source."""

    right: str
    mutants: tuple[Mutant, ...]

    def mutant(self, normal: str) -> Mutant | None:
        """The mutant with this normalised source."""
        return next((mutant for mutant in self.mutants if mutant.source == normal), None)

    def broken(self, draw: random.Random, visible: float) -> str:
        """A broken program: with the odds `visible`, where there are both kinds, one that public tests notice."""
        noticed = draw.random() < visible
        return draw.choice([mutant for mutant in self.mutants if mutant.visible == noticed] or self.mutants).source


class SimulatedWorker:
    """Deterministic: all draws come from (seed, problem id, operator, request seed). Mutants are made on first use.

    At temperature 0 the request's seed draws nothing: the same question has the same answer.
    """

    def __init__(
        self,
        pool: SandboxPool,
        *,
        seed: int = 0,
        latency_scale: float = 0.0,
        skills: Mapping[str, Skill] = SKILLS,
    ) -> None:
        self.names = tuple(skills)
        self._pool, self._seed, self._latency_scale, self._skills = pool, seed, latency_scale, skills
        self._banks: dict[str, asyncio.Task[Bank]] = {}
        self._verdicts: dict[tuple[str, str], bool] = {}

    async def prepare(self, problems: Iterable[Problem]) -> None:
        """Make the mutants of many problems at once, instead of each on its first request."""
        await asyncio.gather(*[self.bank(problem) for problem in problems])

    async def bank(self, problem: Problem) -> Bank:
        """The right answer and the broken ones for `problem`. Raises `WorkerError` where jails fail."""
        task = self._banks.get(problem.id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._banks[problem.id] = asyncio.create_task(self._make_bank(problem))
        return await asyncio.shield(task)

    async def ask(self, request: Request) -> Reply:
        """Answer by the odds of `Skill`; waits the simulated latency times `latency_scale`."""
        bank = await self.bank(request.problem)
        seed = 0 if request.temperature == 0 else request.seed
        draw = random.Random(f"{self._seed}/{request.problem.id}/{request.operator}/{seed}")
        text = await self._answer(request, bank, draw)
        prompt_tokens = sum(len(message["content"]) for message in request.messages) // 4
        completion_tokens = len(text) // 4 + 1
        skill = self._skill(request)
        seconds = skill.first_token_s + completion_tokens / skill.tokens_per_s
        if self._latency_scale:
            await asyncio.sleep(seconds * self._latency_scale)
        return Reply(
            text=text,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_usd=(prompt_tokens * skill.prompt_price + completion_tokens * skill.completion_price) / 1e6,
            seconds=seconds,
        )

    async def aclose(self) -> None:
        """End what is being prepared."""
        for task in self._banks.values():
            task.cancel()
        await asyncio.gather(*self._banks.values(), return_exceptions=True)

    def _skill(self, request: Request) -> Skill:
        return self._skills[request.worker or self.names[0]]

    async def _answer(self, request: Request, bank: Bank, draw: random.Random) -> str:
        match request.operator:
            case "generate":
                return self._generate(request, bank, draw)
            case "custom":
                return f"Plan: settle the edge cases first, then the general case. {_plan_mark(request.problem)}"
            case "review":
                return await self._review(request, bank, draw)
            case "ensemble":
                return await self._ensemble(request, bank, draw)
            case "judge":
                return await self._judge(request, bank)
            case "revise" | "test":
                return await self._revise(request, bank, draw)

    def _generate(self, request: Request, bank: Bank, draw: random.Random) -> str:
        skill = self._skill(request)
        failure = 1.0 - skill.generates(request.problem.difficulty)
        if _plan_mark(request.problem) in request.messages[-1]["content"]:
            failure *= 1.0 - skill.plan
        return _block(request, bank.right if draw.random() >= failure else bank.broken(draw, skill.visible))

    async def _review(self, request: Request, bank: Bank, draw: random.Random) -> str:
        code, skill = normalised(request.codes[0]), self._skill(request)
        right = await self._is_right(request.problem, bank, code)
        if draw.random() >= (skill.false_alarm if right else skill.notices):
            return "Verdict: correct"
        mutant = bank.mutant(code)
        return f"Verdict: incorrect\n{mutant.hint if mutant else 'An edge case is not handled.'}"

    async def _judge(self, request: Request, bank: Bank) -> str:
        """A score as good as the worker's reviews; asked again, the same solution has the same score."""
        code, skill = normalised(request.codes[0]), self._skill(request)
        draw = random.Random(f"{self._seed}/{request.problem.id}/judge/{request.worker}/{code}")
        right = await self._is_right(request.problem, bank, code)
        faulty = draw.random() < (skill.false_alarm if right else skill.notices)
        return f"Score: {draw.randint(0, 3) if faulty else draw.randint(8, 10)}"

    async def _revise(self, request: Request, bank: Bank, draw: random.Random) -> str:
        code, skill = normalised(request.codes[0]), self._skill(request)
        if await self._is_right(request.problem, bank, code):
            keep = draw.random() >= skill.spoils
            return _block(request, code if keep else bank.broken(draw, skill.visible))
        odds = {"test": skill.fixes_tested, "review": skill.fixes_reviewed, "": skill.fixes_blind}
        fixed = draw.random() < odds[_usefulness(request, bank.mutant(code))] * (1 - request.problem.difficulty / 2)
        return _block(request, bank.right if fixed else bank.broken(draw, skill.visible))

    async def _ensemble(self, request: Request, bank: Bank, draw: random.Random) -> str:
        codes = [normalised(code) for code in request.codes]
        votes = Counter(codes)
        tied = [code for code, count in votes.items() if count == max(votes.values())]
        verdicts = await asyncio.gather(*[self._is_right(request.problem, bank, code) for code in tied])
        right = [code for code, fine in zip(tied, verdicts, strict=True) if fine]
        chosen = (
            right[0] if len(tied) > 1 and right and draw.random() < self._skill(request).judges else draw.choice(tied)
        )
        return letter(codes.index(chosen))

    async def _is_right(self, problem: Problem, bank: Bank, normal: str) -> bool:
        """Whether code is right; code that is not the worker's own is run against the hidden tests."""
        if normal == bank.right or bank.mutant(normal):
            return normal == bank.right
        if problem.answer is not None:
            return is_right(normal, problem.answer)
        key = (problem.id, normal)
        if key not in self._verdicts:
            outcome = await self._try(problem, normal, hidden=True, limits=_FOREIGN)
            self._verdicts[key] = outcome.pass_rate == 1.0
        return self._verdicts[key]

    async def _make_bank(self, problem: Problem) -> Bank:
        if problem.answer is not None:
            return _bank_of_numbers(problem, self._seed)
        if problem.solution is None:
            raise WorkerError(f"simulated workers have no solution of {problem.id} to imitate")
        candidates = mutations(problem.solution, _TRIALS, seed=f"{self._seed}/{problem.id}")
        mutants: list[Mutant] = []
        for batch in (candidates[: _TRIALS // 2], candidates[_TRIALS // 2 :]):
            if len(mutants) < _MUTANTS:
                tried = await asyncio.gather(*[self._trial(problem, mutation) for mutation in batch])
                mutants += [mutant for mutant in tried if mutant is not None]
        gave_up = Mutant("raise NotImplementedError", "nothing is written", True)
        return Bank(normalised(problem.solution), tuple(mutants[:_MUTANTS]) or (gave_up,))

    async def _trial(self, problem: Problem, mutation: Mutation) -> Mutant | None:
        """The mutation as a mutant; None where hidden tests pass or the run is too slow."""
        hidden, public = await asyncio.gather(
            self._try(problem, mutation.source, hidden=True), self._try(problem, mutation.source, hidden=False)
        )
        if hidden.status not in ("ok", "failed") or hidden.pass_rate == 1.0:
            return None
        return Mutant(mutation.source, mutation.hint, public.pass_rate < 1.0)

    async def _try(self, problem: Problem, code: str, *, hidden: bool, limits: Limits = _TRIAL) -> Outcome:
        tests = problem.hidden_tests if hidden else problem.public_tests
        outcome = await self._pool.run(code, tests=tests, limits=limits)
        if outcome.status == "infrastructure":
            raise WorkerError(f"the simulated worker's jail failed: {outcome.error}")
        return outcome


@memo
def normalised(code: str) -> str:
    """`code` without comments and layout, so that equal programs compare equal; as it is where it does not parse."""
    try:
        return ast.unparse(parse(code))
    except (SyntaxError, ValueError, RecursionError):
        return code


def _usefulness(request: Request, mutant: Mutant | None) -> Literal["test", "review", ""]:
    """What feedback is worth: only words that really name a failing test or the defect count, not their tone."""
    shown = [test[:_SHOWN_CHARS] for test in describe_tests(request.problem.public_tests)]
    if any(test in request.feedback for test in shown) and (mutant is None or mutant.visible):
        return "test"
    return "review" if mutant is not None and mutant.hint in request.feedback else ""


def _plan_mark(problem: Problem) -> str:
    """Words of a plan that no workflow can guess."""
    return f"(outline {hashlib.blake2b(problem.id.encode(), digest_size=4).hexdigest()})"


def _block(request: Request, code: str) -> str:
    return code if request.problem.answer is not None else f"```python\n{code}\n```"


def _bank_of_numbers(problem: Problem, seed: int) -> Bank:
    """The worked answer, and others that end with a number near it."""
    text, _, answer = (problem.solution or "").rpartition("Answer: ")
    right = Fraction(answer)
    near = [right + 1, right - 1, right + 10, 2 * right, right / 2, -right]
    wrong = [number for number in dict.fromkeys(near) if number != right]
    chosen = random.Random(f"{seed}/{problem.id}/numbers").sample(wrong, min(len(wrong), _MUTANTS))
    mutants = (Mutant(normalised(f"{text}Answer: {number}"), f"It is not {number}.", False) for number in chosen)
    return Bank(normalised(problem.solution or ""), tuple(mutants))
