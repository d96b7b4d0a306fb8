"""Replies of reviewers and judges in the forms that models give them: the choice, the verdict."""

from __future__ import annotations

import pytest

from fastgrpo.flow.messages import extract_choice, extract_verdict


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("**B**", 1),
        ("B.", 1),
        ("Program B", 1),
        ("Answer: B", 1),
        ("The answer is B.", 1),
        ("The answer is **B**.", 1),
        ("Answer: Program B", 1),
        ("I choose B because A program like C fails.", 1),
        ("B is the best: A simple loop is enough.", 1),
        ("B\n\nA is wrong on empty input.", 1),
        ("Most programs share the behaviour of B. A good choice.", 1),
        ("A and C loop for ever. My choice is B", 1),
        ("Program A fails on [] and program C raises. The best one is program B.", 1),
        ("A", 0),
        ("A is right.", 0),
        ("A and C agree", 2),
        ("C. I think so.", 2),
        ("<think>A or B? A. </think>C", 2),
        ("Option (C)", 2),
        ("The programs agree. A tie.", 0),
    ],
)
def test_the_letter_that_is_meant(reply: str, chosen: int) -> None:
    assert extract_choice(reply, 3) == chosen


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: correct", (True, "")),
        ("**Verdict:** incorrect\nIt loops.", (False, "It loops.")),
        ("Verdict: the code is correct.", (True, "")),
        ("<think>Verdict: incorrect</think>Verdict: correct", (True, "")),
        ("Verdict: not correct", (False, "Verdict: not correct")),
    ],
)
def test_the_verdict_that_is_meant(reply: str, verdict: tuple[bool, str]) -> None:
    assert extract_verdict(reply) == verdict
