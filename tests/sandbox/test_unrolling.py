"""Tests that loop and assert in helpers, one by one: what counts as one, and that each still means the same."""

from __future__ import annotations

import json

import pytest

from fastgrpo_sandbox import BlockingSandboxPool
from fastgrpo_sandbox.guest.syntax import parse
from fastgrpo_sandbox.source_text import TO_THE_END
from fastgrpo_sandbox.unrolling import GATHERED, SINGLE_ROWS, one_by_one

SAME = "def same(out, exp):\n    assert out == exp\n"


def texts(source: str, candidate: str = "f") -> tuple[str, ...]:
    return tuple(text.removesuffix(TO_THE_END) for text in one_by_one(source, parse(source), candidate).asserts)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("for i, o in [(1, 2), (3, 4)]:\n    same(f(i), o)", ("same(f(1), 2)", "same(f(3), 4)")),
        ("t = [[1, 2], []]\nfor i in t:\n    same(f(*i), 0)", ("same(f(1, 2), 0)", "same(f(*[]), 0)")),
        (
            "t = ['a)', (1,)]\nfor i in t:\n    assert f(i) == i",
            ("i = 'a)'\nassert f(i) == i", "i = (1,)\nassert f(i) == i"),
        ),
        ("for i in [-1]:\n    assert i ** 2 == f(i)", ("i = -1\nassert i ** 2 == f(i)",)),
        ("for i in [1 < 2]:\n    assert f(0) == i", ("assert f(0) == (1 < 2)",)),
        ("for n, i in enumerate(['x']):\n    assert f(i), f'{n}'", ("n = 0\nassert f('x'), f'{n}'",)),
        ("same(f(1), 2)\nassert f(2) == 3", ("same(f(1), 2)", "assert f(2) == 3")),
        ("for i in range(3):\n    same(f(i), i)", ("for i in range(3):\n    same(f(i), i)",)),
        ("for i in [1, 2]:\n    if i == 2: break\n    same(f(i), i)", None),
        ("for i in [1, 2]:\n    i += 1\n    same(f(i), i)", None),
    ],
)
def test_what_counts_as_one_test(body: str, wanted: tuple[str, ...] | None) -> None:
    found = texts(SAME + body)
    assert found == wanted if wanted else len(found) == 1


@pytest.mark.parametrize(
    "body", ["x = f(1)\nsame(x, 1)", "x = 1\nsame(f(x), 1)\nx = 2\nsame(f(x), 2)", "if f(1):\n    return\n"]
)
def test_tests_that_depend_on_each_other_are_one(body: str) -> None:
    inner = "".join(f"    {line}\n" for line in body.replace("f(", "candidate(").splitlines())
    assert texts(f"{SAME}def check(candidate):\n{inner}    same(candidate(0), 0)\n") == ("check(f)",)


def test_a_long_table_is_gathered_after_its_first_rows() -> None:
    rows = SINGLE_ROWS + 10 * GATHERED + 1
    found = texts(f"{SAME}for i in {list(range(rows))}:\n    same(f(i), i)\n")
    assert len(found) <= SINGLE_ROWS + GATHERED
    assert sum(text.count("same(") for text in found) == rows
    assert found[SINGLE_ROWS - 1] == f"i = {SINGLE_ROWS - 1}\nsame(f(i), i)"


def test_text_beyond_ascii_and_over_lines_is_kept() -> None:
    source = SAME + "t = [\n  'é\\x0c\u2028', [1,\n   2],\n]\nfor i in t:\n    same(f(i), i)\n"
    found = texts(source)
    assert [ast_of(text) for text in found] == [("é\x0c\u2028",), ([1, 2],)]


def test_long_cells_are_values_that_the_judge_reads() -> None:
    numbers, words, escaped = list(range(200)), ["it's"] * 99, ["\\"] * 99
    [text] = texts(f"{SAME}for i, o, p in [({numbers}, {words}, {escaped})]:\n    same(f(i, o), p)\n")
    assert text.count("json.loads(") == 2
    assert text.count("eval(") == 1
    given: list[object] = []
    exec(text, {"json": json, "f": lambda *args: args, "same": lambda *args: given.append(args)})
    assert given == [((numbers, words), escaped)]


def ast_of(text: str) -> tuple[object, ...]:
    """The arguments that f is called with."""
    given: list[tuple[object, ...]] = []
    exec(text, {"f": lambda *args: given.append(args), "same": lambda *_: None})
    return given[0]


BRANCHES = """
def check(candidate):
    for i in [1, -1]:
        if i > 0:
            assert candidate(i) == i
        else:
            assert candidate(i) == 0
"""


@pytest.mark.jail
@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        (SAME + BRANCHES, "def f(i): return max(i, 0)", "def f(i): return i"),
        (
            SAME
            + "for i in [1, 2]:\n    try:\n        f(-i)\n        assert False\n    except ValueError:\n        pass",
            "def f(i): raise ValueError",
            "def f(i): return 1",
        ),
        (SAME + "total = []\nfor i in range(2):\n    same(f(i), i)", "def f(i): return i", "def f(i): return 0"),
        (
            SAME + "def check(candidate):\n    x = candidate(1)\n    same(x, 1)\n    same(candidate(2), 2)\ncheck(f)",
            "def f(i): return i",
            "def f(i): return 1",
        ),
        (
            "import numpy\ndef same(a, b):\n    assert numpy.allclose(a, b)\nsame(f(0.1), [0.3, 0.3])",
            "def f(i): return [i + 0.2, i * 3]",
            "def f(i): return 0.31",
        ),
        (
            "import numpy as np\nx = 0.1\nassert np.isclose(f(x), x)\nx = 0.2\nif x:\n    assert np.isclose(f(x), x)",
            "def f(i): return i + 1e-12",
            "def f(i): return 0.1",
        ),
    ],
)
def test_each_means_what_it_meant(pool: BlockingSandboxPool, source: str, right: str, wrong: str) -> None:
    tests = one_by_one(source, parse(source), "f")
    assert pool.run(right, tests=tests).pass_rate == 1.0
    assert pool.run(wrong, tests=tests).pass_rate < 1.0
