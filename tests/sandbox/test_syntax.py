"""Source into trees while garbage that parses is collected in the middle (CPython gh-106905)."""

import ast
import gc

import pytest

from fastgrpo_sandbox.guest.syntax import parse

SOURCE = "\n".join(f"def f{i}(a, b):\n    return [x for x in range(a) if x % {i + 1} == b]" for i in range(60))


class Parsing:
    """Garbage in a cycle whose finalizer parses."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        ast.parse("a = 1\nb = 2")


def test_a_collection_in_the_middle_is_no_error() -> None:
    thresholds = gc.get_threshold()
    gc.set_threshold(1000, 1, 1)
    try:
        for _ in range(50):
            Parsing()
            assert len(parse(SOURCE).body) == 60
    finally:
        gc.set_threshold(*thresholds)


def test_errors_are_those_of_the_source() -> None:
    with pytest.raises(SyntaxError):
        parse("def f(:")


def test_warnings_of_the_source_are_not_ours(recwarn: pytest.WarningsRecorder) -> None:
    assert parse(r"x = '\.'").body
    assert not [warning for warning in recwarn.list if "escape sequence" in str(warning.message)]
