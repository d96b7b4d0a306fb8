"""What a worker reads and how its reply is understood: chat templates of the operators, and code, verdict, choice.

Templates take the problem's prompt and what the workflow itself wrote: never tests beyond the public, never a solution.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastgrpo.flow.types import Problem

Messages = list[dict[str, str]]

_CODER = "You are an expert Python programmer. Answer with one ```python block that holds the complete program."
_REVIEWER = (
    "You review Python code. Start with the line `Verdict: correct` or `Verdict: incorrect`; "
    "if it is incorrect, say below what is wrong and how to correct it."
)
_JUDGE = (
    "Several programs answer one problem. Choose the one whose behaviour most others share; answer with its letter."
)

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_VERDICT = re.compile(r"^[^\w\n]*verdict\W+(correct|incorrect)\b", re.IGNORECASE | re.MULTILINE)
_LETTER = re.compile(r"\b([A-Z])\b")


def generate(problem: Problem, instruction: str) -> Messages:
    """Write code for the problem."""
    return _chat(_CODER, _problem(problem), instruction)


def custom(text: str, instruction: str) -> Messages:
    """Anything: the instruction, then the text."""
    return _chat("You are a helpful expert. Be brief.", instruction, text)


def review(problem: Problem, code: str) -> Messages:
    """Judge the code."""
    return _chat(_REVIEWER, _problem(problem), _code(code))


def revise(problem: Problem, code: str, feedback: str) -> Messages:
    """Correct the code after the feedback."""
    return _chat(_CODER, _problem(problem), _code(code), f"Feedback:\n{feedback}", "Correct the program.")


def ensemble(problem: Problem, codes: Sequence[str]) -> Messages:
    """Choose by self-consistency."""
    listed = (f"Program {letter(index)}:\n{_code(code)}" for index, code in enumerate(codes))
    return _chat(_JUDGE, _problem(problem), *listed)


def reflect(problem: Problem, code: str, feedback: str) -> Messages:
    """Correct the code after its public tests."""
    request = "Reflect in a few sentences on why these tests fail, then give the corrected program."
    return _chat(_CODER, _problem(problem), _code(code), feedback, request)


def _chat(system: str, *parts: str) -> Messages:
    user = "\n\n".join(part.strip("\n") for part in parts if part.strip())
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _problem(problem: Problem) -> str:
    return f"Problem (entry point `{problem.entry_point}`):\n{problem.prompt}"


def _code(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def letter(index: int) -> str:
    """A, B, ... of the `index`-th choice; Z at most."""
    return chr(ord("A") + index)


def extract_code(reply: str) -> str:
    """The last non-empty code block of a reply (an unclosed one runs to the end), or the whole reply without any."""
    blocks = [block for block in _BLOCK.findall(reply) if block.strip()]
    return (blocks[-1] if blocks else reply).strip("\n") + "\n"


def extract_verdict(reply: str) -> tuple[bool, str]:
    """(correct?, feedback) of a review; without a verdict the code counts as incorrect and the reply as feedback."""
    found = _VERDICT.search(reply)
    if found is None:
        return False, reply.strip()
    return found[1].lower() == "correct", reply[found.end() :].lstrip(" .*`").strip()


def extract_choice(reply: str, count: int) -> int:
    """The index of the chosen letter: the last one standing alone that names a choice; 0 without any."""
    named = [ord(found) - ord("A") for found in _LETTER.findall(reply)]
    return next((index for index in reversed(named) if index < count), 0)
