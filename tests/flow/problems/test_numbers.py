"""Answers that are numbers: what a text gives as its answer, and when it is right."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import msgspec
import pytest

from fastgrpo.errors import UserError
from fastgrpo.flow.problems.files import load
from fastgrpo.flow.problems.numbers import is_right, read_answer, vote
from tests.helpers.work import thread_seconds


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("#### 1,234", 1234),
        ("#### 1,234,567.50", Fraction(2469135, 2)),
        ("Answer: $1,000", 1000),
        ("Answer: -$5", -5),
        ("Answer: \u22127", -7),
        ("Answer: 18 km/h", 18),
        ("Answer: 12.5%", Fraction(25, 2)),
        ("Answer: .5", Fraction(1, 2)),
        ("Answer: 3/4 of the cake", Fraction(3, 4)),
        ("Answer: 1 1/2 cups", Fraction(3, 2)),
        (r"so \boxed{42}", 42),
        (r"so \boxed{\frac{3}{4}} of 8", Fraction(3, 4)),
        (r"\boxed{1\frac{1}{2}}", Fraction(3, 2)),
        (r"\boxed{18\text{ km}}, not 20", 18),
        (r"\boxed{\$1,200}", 1200),
        ("first \\boxed{1}, then \\boxed{2}", 2),
        ("Answer: 1e3", 1000),
        ("Answer: x = 3", 3),
        ("Answer: 3 + 4 = 7", 7),
        ("**Answer:** **9**", 9),
        ("The answer is 5. No: the final answer is 6", 6),
        ("2 + 2 = 4\nAnswer:\n4", 4),
        ("It took 3 days, or 72 hours.", 72),
        ("Answer: unknown, about 8", 8),
        ("10-5", 5),
        ("no number at all", None),
        ("", None),
        ("Answer: 1/0", None),
        ("v2 of file3", None),
        ("9" * 40, None),
    ],
)
def test_the_answer_of_a_text(text: str, wanted: int | Fraction | None) -> None:
    assert read_answer(text) == wanted


def test_whole_numbers_are_right_exactly_and_others_within_the_tolerance() -> None:
    assert is_right("Answer: 123456", "123456")
    assert is_right("Answer: 123456.0", "123456")
    assert not is_right("Answer: 123456.1", "123456")
    assert not is_right("Answer: 123457", "123456")
    assert is_right("Answer: 0.33333", "1/3")
    assert not is_right("Answer: 0.333", "1/3")
    assert is_right("Answer: 6/8", "0.75")
    assert not is_right("I do not know", "0")


@pytest.mark.parametrize(
    "text",
    ["1" * 100_000, "1," * 50_000, "\\boxed{" * 14_000, "Answer: 1e99" * 8000, "answer is " * 9000, "- " * 50_000],
)
def test_no_text_takes_long(text: str) -> None:
    assert thread_seconds(lambda: read_answer(text)) < 2


def test_the_majority_is_of_answers_not_of_texts() -> None:
    assert vote(["Answer: 3", "it is 4", "so \\boxed{4}", "unknown"]) == 1
    assert vote(["unknown", "Answer: 2"]) == 1
    assert vote(["unknown", "nor here"]) == 0
    assert vote(["Answer: 1", "Answer: 2"]) == 0


@pytest.mark.parametrize("number", [0, 7, -7, Fraction(1, 3), Fraction(-5, 2), 10**20])
def test_what_is_written_is_read_as_itself(number: int | Fraction) -> None:
    assert read_answer(f"Answer: {Fraction(number)}") == number


def save(tmp_path: Path, *records: dict[str, object]) -> str:
    path = tmp_path / "gsm.jsonl"
    path.write_bytes(b"\n".join(map(msgspec.json.encode, records)))
    return str(path)


def test_gsm8k_and_plain_fields_are_one_form(tmp_path: Path) -> None:
    gsm8k = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    plain = {"id": 7, "question": "Half of 3?", "answer": 1.5}
    first, second = load(save(tmp_path, gsm8k, plain))
    assert (first.id, first.prompt, first.answer) == ("gsm/1", "Two and two?", "4")
    assert first.solution == "2 + 2 = <<2+2=4>>4\nAnswer: 4"
    assert (second.id, second.answer, second.solution) == ("7", "3/2", "Answer: 3/2")
    assert not first.shown_tests
    assert not first.shared_test
    assert first.difficulty > second.difficulty


def test_an_answer_without_a_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gsm.jsonl:1: the problem has an answer without a number: 'none'"):
        load(save(tmp_path, {"question": "How many?", "answer": "none"}))
