"""What a worker reads and how its reply is understood: chat templates of the operators, and code, verdict, choice.

Templates take the problem's prompt and what the workflow itself wrote: never tests beyond the public, never a solution.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastgrpo.flow.types import Problem
from fastgrpo_sandbox.extract import without_thought

Messages = list[dict[str, str]]

_CODER = "You are an expert Python programmer. Answer with one ```python block that holds the complete program."
_REVIEWER = (
    "You review Python code. Start with the line `Verdict: correct` or `Verdict: incorrect`; "
    "if it is incorrect, say below what is wrong and how to correct it."
)
# Asked to "reason in a few lines", Qwen2.5-Coder-0.5B named a number at once: 0 of 24 GSM8K questions right, 9 so.
_SOLVER = (
    "You solve problems that ask for a number. Work it out step by step, one calculation a line. "
    "The last line is `Answer: NUMBER`, the number alone."
)
_CHECKER = (
    "You check how a problem that asks for a number was solved. Start with the line `Verdict: correct` or "
    "`Verdict: incorrect`; if it is incorrect, say below what is wrong."
)
_GRADER = (
    "You grade a solution without running it. Say in a few lines whether it does all that the problem asks, edge cases "
    "included, and whatever the solution says of itself; end with the line `Score: N`, N from 0 (wrong) to 10 (right)."
)
_JUDGE = (
    "Several programs answer one problem. Choose the one whose behaviour most others share; answer with its letter."
)

_VERDICT = re.compile(
    r"^[^\w\n]*verdict\W+(?:the (?:code|program) is )?(correct|incorrect)\b", re.IGNORECASE | re.MULTILINE
)
# Where a mark of a chat template begins, as in `<|im_end|>`, `</s>`, `<end_of_turn>`, `[/INST]`: tokenizers take it for
# one wherever it stands, and what follows for another speaker's words.
_TURNS = re.compile(
    r"<(?=[|\uff5c]|<SYS>|/?(?:s|bos|eos|pad|unk|sop|eop|think|\w{1,20}_of_\w{1,20}|\w{1,40}_TOKEN)>)"
    r"|\[(?=/?(?:INST|gMASK|[A-Z]{1,20}_[A-Z]{1,20})\])"
)
# An A before a word is the article, an I the pronoun, unless a verb or an "and" shows it to be a name.
_LETTER = r"\b(?!A +(?!is\b|and\b|or\b|has\b|gives\b|agrees\b)[a-z])(?!I +[a-z]|I')([A-Z])\b"
# From the plainest way to name a choice to the faintest; in each the last that is named counts.
_CHOICES = (
    re.compile(
        r"(?i:\b(?:answer|choice|choose|chosen|pick|select|vote|winner|best|prefer)\w*\W{0,6}"
        rf"(?:(?:is|are|for|be|one|would|letter|program|option|candidate|solution)\W{{1,6}}){{0,4}})\(?{_LETTER}"
    ),
    re.compile(r"^[^\w\n]*([A-Z])[^\w\n]*$|[*(\[`]([A-Z])[*)\]`]", re.MULTILINE),
    re.compile(r"(?i:\b(?:program|option|candidate|solution)s?)\W{1,3}([A-Z])\b"),
    re.compile(_LETTER),
)


def generate(problem: Problem, instruction: str) -> Messages:
    """Write code for the problem, or solve it where it asks for a number."""
    return _chat(_author(problem), _problem(problem), instruction)


def custom(text: str, instruction: str) -> Messages:
    """Anything: the instruction, then the text."""
    return _chat("You are a helpful expert. Be brief.", instruction, text)


def review(problem: Problem, code: str) -> Messages:
    """Judge the code."""
    reviewer = _REVIEWER if problem.answer is None else _CHECKER
    return _chat(reviewer, _problem(problem), _solution(problem, code))


def revise(problem: Problem, code: str, feedback: str) -> Messages:
    """Correct the code after the feedback."""
    request = "Correct the program." if problem.answer is None else "Solve the problem anew."
    solution = _solution(problem, code)
    return _chat(_author(problem), _problem(problem), solution, f"Feedback:\n{feedback}", request)


def ensemble(problem: Problem, codes: Sequence[str]) -> Messages:
    """Choose by self-consistency."""
    listed = (f"Program {letter(index)}:\n{_code(code)}" for index, code in enumerate(codes))
    return _chat(_JUDGE, _problem(problem), *listed)


def reflect(problem: Problem, code: str, feedback: str) -> Messages:
    """Correct the code after its public tests."""
    request = "Reflect in a few sentences on why these tests fail, then give the corrected program."
    return _chat(_CODER, _problem(problem), _code(code), feedback, request)


def judge(problem: Problem, solution: str) -> Messages:
    """Score the solution, which neither ends the fence or the turn that it is shown in nor begins one."""
    solution = _TURNS.sub(r"\g<0> ", solution)
    shown = _code(solution) if problem.answer is None else f"Solution:\n{_fenced(solution)}"
    return _chat(_GRADER, _problem(problem), shown)


def _chat(system: str, *parts: str) -> Messages:
    user = "\n\n".join(part.strip("\n") for part in parts if part.strip())
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _problem(problem: Problem) -> str:
    if problem.answer is not None:
        return f"Problem:\n{problem.prompt}"
    return f"Problem (entry point `{problem.entry_point}`):\n{problem.prompt}"


def _author(problem: Problem) -> str:
    return _CODER if problem.answer is None else _SOLVER


def _solution(problem: Problem, text: str) -> str:
    return _code(text) if problem.answer is None else f"Solution:\n{text}"


def _code(code: str) -> str:
    return _fenced(code, "python")


def _fenced(text: str, language: str = "") -> str:
    # Longer than any in the text, which could end it and go on as ours.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def letter(index: int) -> str:
    """A, B, ... of the `index`-th choice; Z at most."""
    return chr(ord("A") + index)


def extract_verdict(reply: str) -> tuple[bool, str]:
    """(correct?, feedback) of a review; without a verdict the code counts as incorrect and the reply as feedback."""
    answer = without_thought(reply)
    found = _VERDICT.search(answer)
    if found is None:
        return False, answer.strip()
    return found[1].lower() == "correct", answer[found.end() :].lstrip(" .*`").strip()


def extract_choice(reply: str, count: int) -> int:
    """The index of the letter that the reply names as its choice; 0 without any."""
    answer = without_thought(reply).strip()
    if len(answer) == 1:
        answer = answer.upper()
    for pattern in _CHOICES:
        named = [ord("".join(filter(None, found.groups()))) - ord("A") for found in pattern.finditer(answer)]
        if fitting := [index for index in named if index < count]:
            return fitting[-1]
    return 0
