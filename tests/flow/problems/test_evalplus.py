"""EvalPlus' own files: arguments of the types that the record's assertions have, and its ways to compare."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from fastgrpo.flow.problems.evalplus import EvalPlus
from fastgrpo.flow.types import Problem
from tests.flow.problems.conftest import Judge, Load


def record(solution: str, assertion: str, *inputs: list[Any], prompt: str = "", plus: Any = ()) -> dict[str, Any]:
    name = solution.partition("def ")[2].partition("(")[0]
    return {
        "task_id": f"Mbpp/{name}",
        "prompt": prompt or f'"""\nDo it.\n{assertion.splitlines()[0]}\n"""\n',
        "entry_point": name,
        "canonical_solution": solution,
        "base_input": list(inputs),
        "plus_input": list(plus),
        "atol": 0,
        "assertion": assertion,
    }


PAIRS = record(
    "def pairs(rows, cut):\n    return sorted(hash(row) and row[0] for row in rows)[:cut]\n",
    "assert pairs([(3, 5), (1, 7)], 1) == [1]",
    [[[3, 5], [1, 7]], 1],
    plus=[[[[2, 2]], 4], [[], 0]],
)
NESTED = record(
    "def flat(t):\n    return tuple(x for e in t for x in (flat(e) if isinstance(e, tuple) else (e,)))\n",
    "assert flat((1, (2, 3))) == (1, 2, 3)",
    [[1, [2, 3]]],
    plus=[[[1, [2, [3, [4, [5, [6]]]]]]], [[]]],
)
SETS = record(
    "def empty(sets):\n    return [type(s).__name__ for s in sets]\n",
    "assert empty([{1, 2}, {}]) == ['set', 'dict']",
    [[[1, 2], []]],
)
COMPLEX = record(
    "def turn(a, b):\n    return a + b * 1j\n", "assert turn(0, 1j) == -1", ["0", "1j"], plus=[["2.5", "0j"]]
)
TEXTS = record(
    "def count(xs, x):\n    return sum(each is not None and each == x for each in xs)\n",
    "assert count([1, 2], 2) == 1",
    [[1, 2], 2],
    plus=[[["pear", 1], "pear"], [["5"], "5"]],
)
NO_MORE = record("def last(xs):\n    return xs[-1]\n", "assert last([1, 2]) == 2", [[1, 2]]) | {"plus_input": {}}
WITHIN = record(
    "def best(d):\n    return max((v, k) for k, v in d.items() if hash(v))\n",
    "assert best({'a': (1, 2)}) == ((1, 2), 'a')",
    [{"a": [1, 2]}],
    plus=[[{"b": [3, 4], "c": [5, 1]}]],
)
ENDLESS = record(
    "def least(a, b):\n    return min(a, b)\n", "assert least(1, 2) == 1", [1, 2], plus=[[-inf, inf], [inf, 3]]
)


@pytest.mark.jail
@pytest.mark.parametrize(
    "sample", [PAIRS, NESTED, SETS, COMPLEX, TEXTS, NO_MORE, WITHIN, ENDLESS], ids=lambda each: each["entry_point"]
)
def test_a_canonical_solution_passes_and_none_that_returns_nothing(load: Load, judge: Judge, sample: Any) -> None:
    [problem] = load(sample)
    public, hidden = judge(problem, problem.solution or "")
    assert public.pass_rate == hidden.pass_rate == 1.0, public.error or hidden.error
    public, hidden = judge(problem, f"def {problem.entry_point}(*args): return None")
    assert not any((*public.tests, *hidden.tests))


@pytest.mark.jail
def test_sets_and_truth_are_compared_where_the_prompts_example_does(load: Load, judge: Judge) -> None:
    shared = record(
        "def both(a, b):\n    return tuple(set(a) & set(b))\n", "assert set(both((1, 2), (2,))) == {2}", [[1, 2], [2]]
    )
    [problem] = load(shared | {"plus_input": [[[1, 2, 3], [3, 2]]]})
    for code, wanted in (("sorted(set(a) & set(b), reverse=True)", True), ("[2]", False)):
        public, hidden = judge(problem, f"def both(a, b): return {code}")
        assert (public.tests, hidden.tests) == ((True,), (wanted,))
    [problem] = load(
        record(
            "import re\ndef has(s):\n    return bool(re.search('ab', s))\n",
            "assert not has('ba')",
            ["ba"],
            plus=[["ab"]],
        )
    )
    public, hidden = judge(problem, "import re\ndef has(s): return re.search('ab', s)")
    assert public.pass_rate == hidden.pass_rate == 1.0


@pytest.mark.jail
def test_any_zero_of_a_polynomial_is_right(load: Load, judge: Judge) -> None:
    poly = "def poly(xs, x):\n    return sum(c * x ** i for i, c in enumerate(xs))\n\n\n"
    prompt = poly + "def find_zero(xs):\n    '''A zero.'''\n"
    sample = record("    return -xs[0] ** 0.5 if xs == [4, 0, -1] else 1\n", "", [[4, 0, -1]], [[-1, 1]], prompt=prompt)
    [problem] = load(sample | {"entry_point": "find_zero", "task_id": "a"})
    public, hidden = judge(problem, "def find_zero(xs): return 2.0 if len(xs) > 2 else 1.0")
    assert public.pass_rate == hidden.pass_rate == 1.0
    assert judge(problem, "def find_zero(xs): return 7")[0].pass_rate == 0.0


@pytest.mark.jail
def test_values_are_compared_as_evalplus_does(load: Load, judge: Judge) -> None:
    """Floats nearly, lists and tuples as what they are, and whole numbers exactly where no tolerance is given."""
    given = [[1], [10**9], [(1, 2)], [[1, 2]], [0.5], [[0.5, 1.5]], [[[]]], [True]]
    sample = record("def f(x): return x\n", "assert f(1) == 1", *given[:1], plus=given[1:])
    [problem] = load(sample)
    wrong = {
        "x + 1e-9 if type(x) is int else x": (0,),
        "x + 7.0 if x == 10 ** 9 else x": (1,),
        "tuple(x) if type(x) is list else x": (2, 3, 5, 6),  # JSON has no tuples
        "[] if isinstance(x, float) else x": (4,),
        "None if x == [[]] else x": (6,),
        "x and 1e-9 + x if x is True else x": (7,),
        "float('nan') if x == 0.5 else x": (4,),
    }
    for answer, failed in wrong.items():
        outcome = judge_all(judge, problem, f"def f(x): return {answer}")
        assert [place for place, passed in enumerate(outcome) if not passed] == list(failed), answer
    assert all(judge_all(judge, problem, "def f(x): return x * (1 + 1e-8) if type(x) is float else x"))
    [problem] = load(record("def f(x): return float(x)\n", "assert f('1') == 1", ["nan"], plus=[["inf"], ["1"]]))
    assert all(judge_all(judge, problem, problem.solution or ""))
    assert judge_all(judge, problem, "def f(x): return 1.0") == [False, False, True]
    [problem] = load(sample | {"atol": 1e-6})
    assert all(judge_all(judge, problem, "def f(x): return x * (1 + 1e-8) if type(x) is float else x"))
    assert judge_all(judge, problem, "def f(x): return x + 1e-9 if x == 1 else x") == [False, *[True] * 6, False]


@pytest.mark.jail
@pytest.mark.parametrize(
    ("wanted", "got", "room", "passes"),
    [
        ("1.0000001", "1", 0, False),  # a float is near, and an int is none
        ("1.5", "1.5 + 1e-8", 0, True),
        ("1", "1.0000001", 1e-6, False),
        ("2.0", "2", 0, True),  # equal
        ("[1.0, 2]", "[1 + 1e-9, 2]", 0, False),  # not all floats: exact
        ("[1.0, 2]", "[1 + 1e-9, 2]", 1e-6, True),
        ("[1.0, 2.0]", "[1 + 1e-9, 2.0]", 0, True),
        ("(1.0, 2.0)", "[1.0, 2.0]", 0, False),
        ("[[1.0]]", "[[1 + 1e-9]]", 0, False),
        ("[[1.0]]", "[[1 + 1e-9]]", 1e-6, True),
        ("[1.0]", "[[1.0]]", 0, False),
        ("1e300", "'1e300'", 0, False),
    ],
)
def test_what_is_near_is_what_evalplus_takes_for_it(
    load: Load, judge: Judge, wanted: str, got: str, room: float, passes: bool
) -> None:
    """Held to `untrusted_check` of EvalPlus 0.3.1, but for [[1.0]], which numpy takes for [1.0]."""
    [problem] = load(record(f"def f(x): return {wanted}\n", "assert f(1) == 1", [1]) | {"atol": room})
    assert judge(problem, f"def f(x): return {got}")[1].tests == (passes,)


def judge_all(judge: Judge, problem: Problem, code: str) -> list[bool]:
    """The verdicts of all tests in their order."""
    public, hidden = (list(outcome.tests) for outcome in judge(problem, code))
    return [(public if place in problem.public else hidden).pop(0) for place in range(len(public + hidden))]


def test_a_record_without_an_assertion_is_as_its_json() -> None:
    problem = EvalPlus(
        task_id=1, prompt="", entry_point="f", canonical_solution="def f(x): return x\n", base_input=[[[1, "2"]]]
    )
    assert "same(f([1, '2'])" in str(problem.problem("").tests)
