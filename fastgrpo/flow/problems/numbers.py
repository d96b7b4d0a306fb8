"""Problems that ask for a number and have no tests: GSM8K and files of its form, answers read and compared by the host.

A whole number is right exactly, any other within 1e-4 of the wanted one, relative. Of a text the last `\\boxed{...}`
counts, else what follows the last `####`, else the last "answer is" or "Answer:", else its last number.
"""

from __future__ import annotations

import re
from fractions import Fraction

import msgspec

from fastgrpo.flow.types import NO_TESTS, Problem

TOLERANCE = Fraction(1, 10_000)
# An answer stands at the end; a text may be as long as a workflow likes.
_READ_CHARS = 4000
# Up to 30 digits and an exponent of two: no number is so large that comparing it takes time.
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,30})"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d{{1,30}})?|\.\d{{1,30}})(?:[eE][-+]?\d{{1,2}}(?!\d))?"
# Blanks are bounded too: two runs beside one another take the square of their length, from each place anew.
_BLANKS = r"\s{0,3}"
_FRACTION = rf"\\[dt]?frac{_BLANKS}\{{{_BLANKS}(\d{{1,30}}){_BLANKS}\}}{_BLANKS}\{{{_BLANKS}(\d{{1,30}}){_BLANKS}\}}"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-\u2212+]?){_BLANKS}(?:\\?\$|[€£])?{_BLANKS}(?P<minus>[-\u2212]?)"
    rf"(?:(?:(?P<whole>\d{{1,30}}){_BLANKS})?{_FRACTION}"
    rf"|(?P<mixed>\d{{1,30}})\s{{1,3}}(?P<over>\d{{1,30}}){_BLANKS}/{_BLANKS}(?P<under>\d{{1,30}})"
    rf"|(?P<first>{_DECIMAL})(?:{_BLANKS}/{_BLANKS}(?P<second>\d{{1,30}}))?)(?!\d)"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\}){0,200})\}")
_MARKS = (re.compile("####"), re.compile(r"(?i)\banswer\b\s*(?:is|:|=)"))


class NumberProblem(msgspec.Struct, frozen=True):
    """A `question` and its `answer`: a number, its text, or GSM8K's worked text that ends with `#### number`."""

    question: str
    answer: str | int | float
    id: str | int = ""

    def problem(self, name: str) -> Problem:
        """The problem, whose solution is the answer as it is written. Raises ValueError where it holds no number."""
        text = str(self.answer).strip()
        wanted = read_answer(text)
        if wanted is None:
            raise ValueError(f"has an answer without a number: {text[-40:]!r}")
        working, marked, _ = text.rpartition("####")
        lines = [working.strip()] if marked and working.strip() else []
        return Problem(
            id=str(self.id) or name,
            prompt=self.question,
            entry_point="",
            solution="\n".join([*lines, f"Answer: {wanted}"]),
            public_tests=NO_TESTS,
            hidden_tests=NO_TESTS,
            answer=str(wanted),  # which `read_answer` reads as itself
        )


def read_answer(text: str) -> Fraction | None:
    """The number that `text` gives as its answer; None without any."""
    text = text[-_READ_CHARS:]
    if boxed := _BOXED.findall(text):
        return _first(boxed[-1])
    for mark in _MARKS:
        # Of the last first, and each to the next: a text may consist of marks.
        lines = (part.partition("\n")[0] for part in reversed(mark.split(text)[1:]))
        said = next((number for line in lines if (number := _first(line)) is not None), None)
        if said is not None:
            return said
    numbers = map(_value, reversed(list(_NUMBER.finditer(text))))
    return next((number for number in numbers if number is not None), None)


def _first(text: str) -> Fraction | None:
    """The number of a short answer; of an equation, as `x = 3`, what is behind the last sign."""
    match = _NUMBER.search(text.rpartition("=")[2])
    return _value(match) if match else None


def _value(match: re.Match[str]) -> Fraction | None:
    """The number of a match; None where it divides by 0."""
    parts = match.groupdict()
    over, under = match[4] or parts["over"], match[5] or parts["under"]
    try:
        if over:
            value = int(parts["whole"] or parts["mixed"] or 0) + Fraction(int(over), int(under))
        else:
            value = Fraction(parts["first"].replace(",", "")) / int(parts["second"] or 1)
    except ZeroDivisionError:
        return None
    return -value if parts["sign"] in ("-", "\u2212") or parts["minus"] else value


def is_right(text: str, answer: str) -> bool:
    """Whether `text` gives the number `answer`: a whole number exactly, any other within `TOLERANCE`, relative."""
    got, wanted = read_answer(text), read_answer(answer)
    assert wanted is not None, "it was read when the problem was"
    room = 0 if wanted.denominator == 1 else TOLERANCE * abs(wanted)
    return got is not None and abs(got - wanted) <= room


def vote(texts: list[str]) -> int:
    """The index of the first text whose answer most of them give; without a number they count as one answer."""
    answers = [read_answer(text) for text in texts]
    counts = [0 if answer is None else answers.count(answer) for answer in answers]
    return counts.index(max(counts))
