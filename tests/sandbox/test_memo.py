"""What is kept of tests that were read once is bounded in bytes, and what is asked for often stays."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest

from fastgrpo.flow.problems.splitting import describe_tests
from fastgrpo.flow.workers.simulated import normalised
from fastgrpo_sandbox import AssertTests, unittest_source
from fastgrpo_sandbox.guest import asserts, memo, names
from fastgrpo_sandbox.scripts import as_run
from fastgrpo_sandbox.source_text import preamble
from fastgrpo_sandbox.unrolling import check_tests, script_tests

MB = 1 << 20
SMALL = 8 * MB


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST_BYTES", SMALL)
    monkeypatch.setattr(memo, "_kept", memo._Kept())


def long_text(number: int) -> str:
    return f"assert f({number}) == 1  # {'x' * MB}"


@pytest.mark.parametrize(
    "read",
    [
        unittest_source.unittest_names,
        unittest_source.compile_unittest,
        unittest_source.imported_modules,
        unittest_source.own_names,
        asserts.special_words,
        asserts.compile_asserts,
        asserts.compile_setup,
        names.wanted_names,
        names.solution_imports,
        as_run,
        script_tests,
        lambda text: check_tests(text, "f", text),
        lambda text: preamble(text, "f"),
        lambda text: describe_tests(AssertTests((text,))),
        normalised,
    ],
)
def test_many_long_texts_are_not_all_kept(read: Callable[[str], object]) -> None:
    read("assert f(0) == 1")
    gc.collect()
    tracemalloc.start()
    for number in range(24):
        read(long_text(number))
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < SMALL + 3 * MB


def test_what_is_asked_for_again_stays() -> None:
    asked = []

    @memo.memo
    def answer(text: str) -> str:
        asked.append(text)
        return text.upper()

    for number in range(40):
        assert answer("often") == "OFTEN"
        assert answer(f"{number} {'x' * MB}")[:2] == f"{number} "[:2].upper()
    assert asked.count("often") == 1
    answer(f"39 {'x' * MB}")
    assert len(asked) == 41
    answer(f"0 {'x' * MB}")
    assert len(asked) == 42


def test_one_answer_that_is_too_long_displaces_nothing() -> None:
    answer = memo.memo(lambda text: text * 2)
    short = answer("short")
    assert answer("x" * SMALL) == "x" * 2 * SMALL
    assert answer("short") is short
    assert sum(memo.bytes_of(key) for key in memo._kept.young) < MB


def test_no_answer_is_an_answer_and_an_error_is_none() -> None:
    asked = []

    @memo.memo
    def answer(text: str) -> None:
        asked.append(text)
        if text == "wrong":
            raise ValueError(text)

    assert answer("none") is answer("none") is None
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            answer("wrong")
    assert asked == ["none", "wrong", "wrong"]


def test_functions_do_not_take_one_anothers_answers() -> None:
    upper, twice = memo.memo(str.upper), memo.memo(lambda text: text * 2)
    assert [upper("a"), twice("a"), upper("a")] == ["A", "aa", "A"]


def test_every_byte_of_an_answer_counts() -> None:
    tests = AssertTests(("x" * MB, "y" * MB), "z" * MB)
    assert 3 * MB < memo.bytes_of((tests, frozenset({"w"}))) < 3 * MB + 2000
