"""A judge model's score of a solution, in the place of hidden tests: LLM-as-a-judge (arXiv 2306.05685) by one worker.

The judge reads the problem and the solution and no test. What it cannot be asked or does not say is no score: a failure
of ours, as where a jail fails, and never 0; where it scores others of the group, an answer without a score is the
solution's failure (`environment.silent_ones_failed`).
"""

from __future__ import annotations

import hashlib
import re

import msgspec

from fastgrpo.flow import messages
from fastgrpo.flow.clock import reply_within
from fastgrpo.flow.types import Judgement, Problem, Reply, Request, Worker, WorkerError, WorkflowLimits
from fastgrpo_sandbox.extract import without_thought

_BEST = 10
_ATTEMPTS = 2
_SHOWN_CHARS = 80
_SCORE = re.compile(
    r"(?i)\bscore\b[\s*_`:=]{0,20}(?:is\s{1,5})?[*_`]{0,5}"
    r"(\d{1,3}(?:\.\d{1,3})?)(?![\d.]*\d)(?:\s{0,5}/\s{0,5}(\d{1,4}))?"
)


class NoScore(WorkerError):
    """The judge answered without a score."""


async def judged(worker: Worker, name: str, problem: Problem, solution: str, limits: WorkflowLimits) -> Judgement:
    """The score in [0, 1] of a solution by the worker called `name`, each of two attempts within `limits.call_s`.

    Raises `WorkerError` where it cannot be had, `NoScore` where the answers hold none, and `RequestRejected` where the
    solution is more than the judge reads.
    """
    chat = messages.judge(problem, solution)
    digest = hashlib.blake2b(f"{problem.id}/{solution}".encode(errors="replace"), digest_size=4).digest()
    spent = Judgement(score=0.0)
    said = ""
    for attempt in range(_ATTEMPTS):
        request = Request(
            operator="judge",
            problem=problem,
            messages=chat,
            codes=(solution,),
            worker=name,
            # The same solution is judged alike; only where the first answer was none is another drawn.
            temperature=0.0 if attempt == 0 else None,
            seed=(int.from_bytes(digest) >> 1) + attempt,
            order=limits.order,
        )
        reply = await reply_within(worker, request, limits.call_s)
        spent = _with(spent, reply)
        score = extract_score(reply.text)
        if score is not None:
            return msgspec.structs.replace(spent, score=score)
        said = reply.text
    raise NoScore(f"the judge gave no `Score: N` from 0 to {_BEST}: it ends with {said.strip()[-_SHOWN_CHARS:]!r}")


def _with(spent: Judgement, reply: Reply) -> Judgement:
    tokens = spent.tokens + reply.prompt_tokens + reply.completion_tokens
    return msgspec.structs.replace(spent, tokens=tokens, cost_usd=spent.cost_usd + reply.cost_usd)


def extract_score(reply: str) -> float | None:
    """The last score of 10 that a judge's answer names, in [0, 1]; None without one, or for one of another scale."""
    found = _SCORE.findall(without_thought(reply))
    if not found:
        return None
    number, of = found[-1]
    score = float(number)
    return score / _BEST if score <= _BEST and of in ("", str(_BEST)) else None
