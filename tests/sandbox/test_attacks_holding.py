"""Containers, texts and numbers of a solution's classes that answer for what they hold, equal or come after: wrong ones
pass in no form of tests, right ones in each."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import AssertTests, CheckTests, UnittestTests

pytestmark = pytest.mark.jail
FORMS = ("asserts", "check", "unittest")
EQUAL = "class Y:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    __hash__ = None\n"
DECIDES = """class C({0}):
    def __eq__(s, o): return True
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __ne__(s, o): return False
    def __sub__(s, o): return 0
    __rsub__ = __sub__
    def __hash__(s): return 0
    def __len__(s): return 3
def f(x): return C({1})
"""
HOLDS_ALL = "class C({0}):\n    def __contains__(s, x): return True\ndef f(x): return C({1})\n"
GIVES = f"""{EQUAL}class C({{0}}):
    def __len__(s): return 3
    def __getitem__(s, i):
        if i in (0, 1, 2): return Y()
        raise IndexError
    def get(s, *k): return Y()
def f(x): return C({{1}})
"""
TURNS = f"""{EQUAL}class C({{0}}):
    looks = 0
    def __len__(s): return 3
    def __iter__(s):
        C.looks += 1
        return iter([Y(), Y(), Y()] if C.looks % 2 == 0 else [])
def f(x): return C({{1}})
"""
BASES = ("object", ""), ("list", "[77]"), ("dict", "{77: 77}"), ("tuple", "(77,)"), ("set", "{77}"), ("str", "'x'")
NUMBERS = ("int", "77"), ("float", "77")
WRONG = (
    *("f(0) == [1, 2, 3]", "not f(0) != [1, 2, 3]", "[1, 2, 3] == f(0)", "f(0) == (1, 2, 3)", "f(0) == {1, 2, 3}"),
    *("f(0) == {1: 2}", "{1: 2} == f(0)", "f(0) == 'abc'", "f(0) == 1", "f(0) < 1", "abs(f(0) - 1.5) < 1e-6"),
    *("1.5 - f(0) == 0", "1 in f(0)", "not 1 not in [f(0)]", "[f(0)] == [1]", "1 in [f(0)]", "f(0) in [1, 2]"),
    *("'b' in f(0)", "f(0)[0] == 1", "list(f(0)) == [1, 2, 3]", "tuple(f(0)) == (1, 2, 3)"),
)
ASSERTIONS = (
    *("In(1, f(0))", "In('b', f(0))", "In(1, [f(0)])", "ListEqual(f(0), [1, 2, 3])", "SequenceEqual(f(0), [1, 2, 3])"),
    *("SequenceEqual([1, 2, 3], f(0))", "CountEqual(f(0), [1, 2, 3])", "CountEqual([1, 2, 3], f(0))"),
    *("Equal(f(0), [1, 2, 3])", "Equal(f(0), {1: 2})", "DictEqual(f(0), {1: 2})", "SetEqual(f(0), {1, 2, 3})"),
    *("TupleEqual(f(0), (1, 2, 3))", "Equal(f(0), 1)", "AlmostEqual(f(0), 1.5)", "Less(f(0), 1)", "Equal(f(0), 'abc')"),
    *("MultiLineEqual(f(0), 'abc')", "Equal(list(f(0)), [1, 2, 3])"),
)


def passed(pool, form: str, code: str, lines: tuple[str, ...], assertions: tuple[str, ...] = ()) -> list[str]:
    """Those that hold of the expressions and, under unittest, of what is behind `self.assert`."""
    if form == "asserts":
        tests = AssertTests(tuple(f"assert {line}" for line in lines))
    elif form == "check":
        tests = CheckTests("def check(candidate):\n" + "".join(f"    assert {line}\n" for line in lines), "f")
    else:
        asked = (*(f"True({line})" for line in lines), *assertions)
        body = "".join(f"    def test_{n:02}(self): self.assert{each}\n" for n, each in enumerate(asked))
        tests = UnittestTests("import unittest\nclass T(unittest.TestCase):\n" + body)
        lines = (*lines, *assertions)
    outcome = pool.run(code, tests=tests)
    assert len(outcome.tests) == len(lines), outcome
    return [line for line, held in zip(lines, outcome.tests, strict=True) if held]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [*BASES, *NUMBERS], ids=lambda base: base[0])
def test_no_class_over_a_plain_one_decides(pool, form, base):
    for program in (DECIDES, *((HOLDS_ALL, GIVES, TURNS) if base in BASES else ())):
        asked = [each for each in WRONG if "f(0)[0]" not in each or program is GIVES]
        assert passed(pool, form, program.format(*base), tuple(asked), ASSERTIONS) == []


RIGHT = """class Bag:
    def __init__(self, items): self.items = list(items)
    def __iter__(self): return iter(self.items)
    def __len__(self): return len(self.items)
    def __contains__(self, item): return item in self.items
    def __getitem__(self, i): return self.items[i]
class Loud(dict):
    def __contains__(self, key): return dict.__contains__(self, key.lower())
    def __getitem__(self, key): return dict.__getitem__(self, key.lower())
class Interval:
    def __init__(self, low, high): self.low, self.high = low, high
    def __contains__(self, x): return self.low <= x <= self.high
    def __sub__(self, by): return Interval(self.low - by, self.high - by)
class Word(str):
    def __contains__(self, part): return str.__contains__(self, part)
class Stack(list):
    def __iter__(self): return reversed(self[:])
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return isinstance(other, Point) and self.x == other.x
    def __hash__(self): return hash(self.x)
    def __sub__(self, other): return Point(self.x - other.x)
def f(x): return Bag(x)
def w(x): return Word(x)
def points(*xs): return [Point(x) for x in xs]
"""
HELD = (
    *("1 in f([1, 2])", "3 not in f([1, 2])", "len(f([1, 2])) == 2", "f([1, 2])[1] == 2", "list(f([1])) == [1]"),
    *("bool(f([])) == False", "sum(x for x in f([1, 2])) == 3", "sorted(f([2, 1])) == [1, 2]"),
    *("'A' in Loud(a=1)", "Loud(a=1)['A'] == 1", "5 in Interval(1, 9)", "0 not in Interval(1, 9)"),
    *("1 in (Interval(3, 9) - 2)", "Point(1) in [Point(1), Point(2)]", "Point(3) not in [Point(1)]"),
    *("(Point(3) - Point(1)).x == 2", "list(Stack([1, 2])) == [2, 1]"),
)
HELD_IN_ASSERTIONS = (
    *(
        "In(1, f([1, 2]))",
        "NotIn(3, f([1, 2]))",
        "In('A', Loud(a=1))",
        "In(5, Interval(1, 9))",
        "NotIn(0, Interval(1, 9))",
    ),
    *("In(Point(1), points(1, 2))", "NotIn(Point(3), points(1))", "In('b', w('abc'))", "NotIn('z', w('abc'))"),
    *(
        "CountEqual(f([2, 1]), [1, 2])",
        "SequenceEqual(f([1, 2]), [1, 2])",
        "CountEqual(points(1, 2), [Point(2), Point(1)])",
    ),
    *("CountEqual({1: 2}, [1])", "SequenceEqual('ab', 'ab')", "SequenceEqual(Stack([1, 2]), [1, 2])", "In(1, {1: 2})"),
)


@pytest.mark.parametrize("form", FORMS)
def test_right_containers_of_own_classes_are_what_they_hold(pool, form):
    held = passed(pool, form, RIGHT, HELD, HELD_IN_ASSERTIONS)
    assert held == [*HELD, *(HELD_IN_ASSERTIONS if form == "unittest" else ())]
