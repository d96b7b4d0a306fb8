# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Classes that the tests' setup and the solution both define, as the `TreeNode` or the dataclass that a prompt begins with
is put before both: in one program there would be one class."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastgrpo_sandbox import AssertTests, BlockingSandboxPool, CheckTests

pytestmark = pytest.mark.jail

GIVEN = """
from dataclasses import dataclass
class Node:
    kind = 'node'
    def __init__(self, val=0, next=None): self.val, self.next, self._seen = val, next, 0
    def touch(self):
        self._seen += 1
        return self._seen
    @property
    def twice(self): return 2 * self.val
class Leaf(Node):
    def touch(self): return -super().touch()
@dataclass
class Point:
    x: int
    y: int = 0
@dataclass(frozen=True, order=True)
class Fixed:
    x: int
class Slim:
    __slots__ = ('val', 'left')
    def __init__(self, val, left=None): self.val, self.left = val, left
class Link:
    def __init__(self, val, next=None): self.val, self.next = val, next
    def __eq__(self, other): return isinstance(other, Link) and self.val == other.val and self.next == other.next
    def __hash__(self): return hash(self.val)
class Dicts:
    def __init__(self, a): self.a = a
    def __eq__(self, other): return type(self) == type(other) and self.__dict__ == other.__dict__
"""
GIVEN_THE_TESTS = """
Node.__lt__ = lambda a, b: a.val < b.val
Node.depth = lambda self: 1 + (self.next.depth() if self.next else 0)
class Other:
    def m(self): return 'mine'
def smallest(nodes): return min(nodes).val
def depth(node): return node.depth()
def looks(node): return [isinstance(node, Node), isinstance(node, Leaf), issubclass(type(node), Node), node.kind, node.touch(), node.touch(), node.twice]
def matched(node):
    match node:
        case Point(x, y): return ['point', x, y]
        case Slim(val=v): return ['slim', v]
        case Node(val=v, next=None): return ['last', v]
        case Node(): return ['node']
    return ['none']
def points(a, b): return [a == b, isinstance(a, Point), a.x, Point(1, 2) == a, a == Point(1, 2), a.__class__ is Point]
def write(node):
    node.val += 1
    node.extra, node.next = 5, Node(7)
    del node.extra
    return hasattr(node, 'extra'), node.val
def count(nodes): return len(set(nodes)), len({node: 1 for node in nodes})
def other(o): return [o.m(), o.a, isinstance(o, Other)]
def slim(s):
    s.left = Slim(3)
    return isinstance(s, Slim), s.left.val, s.val
def again(node): return type(node)(9).val, type(node).__name__
def sub(node): return isinstance(node, Node), node.val, node.touch()
"""
GIVEN_BY_THE_SOLUTION = """
def point(x): return Point(x)
def points(n): return [Point(i, i) for i in range(n)]
def fixed(x): return Fixed(x)
def links(*values):
    made = None
    for value in reversed(values): made = Link(value, made)
    return made
def dicts(a): return Dicts(a)
def leaf(v): return Leaf(v)
def both(p): return [p, Point(1)]
"""
RIGHT = (
    "assert point(1) == Point(1) and Point(1, 0) == point(1) and point(1) != Point(2)",
    "assert isinstance(point(1), Point) and type(point(1)) is Point and {'a': (point(1),)} == {'a': (Point(1),)}",
    "assert points(3) == [Point(0, 0), Point(1, 1), Point(2, 2)]",
    "assert fixed(1) < Fixed(2) and fixed(2) == Fixed(2) and not fixed(3) < Fixed(2)",
    "assert {fixed(1), fixed(2)} == {Fixed(2), Fixed(1)} and fixed(1) in [Fixed(1)] and Fixed(1) in [fixed(1)]",
    "assert links(1, 2) == Link(1, Link(2)) and Link(1, Link(2)) == links(1, 2) and links(1, 2) in {Link(1, Link(2))}",
    "assert dicts([1]) == Dicts([1])",
    "assert leaf(3).twice == 6 and isinstance(leaf(3), Node) and leaf(3) != Leaf(3)",
    "assert both(Point(1)) == [Point(1), Point(1)]",
)
WRONG = (
    "assert point(1) == Point(2)",
    "assert Point(2) == point(1)",
    "assert points(2) == [Point(0, 0), Point(2, 1)]",
    "assert fixed(1) == Fixed(2)",
    "assert {fixed(1)} == {Fixed(2)}",
    "assert links(1, 3) == Link(1, Link(2))",
    "assert links(1, 2) != Link(1, Link(2))",
    "assert dicts([2]) == Dicts([1])",
    "assert isinstance(point(1), Node)",
    "assert leaf(3) == Leaf(3)",
)
LIAR = "class Y:\n    def __init__(self, *a): pass\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __lt__ = __gt__ = __le__ = __ge__ = __eq__\n    __hash__ = lambda self: 1\n"
LIAR += "".join(
    f"class {name}(Y):\n    x = y = val = next = a = __dict__ = property(lambda self: Y())\n"
    for name in ("Point", "Fixed", "Link", "Dicts", "Leaf")
)


def test_an_object_of_the_tests_is_one_of_the_solutions_class(every_assertion_passes: Callable[..., None]) -> None:
    lines = (
        "assert smallest([Node(3), Node(1)]) == 1 and depth(Node(1, Node(2))) == 2",
        "assert looks(Node(4)) == [True, False, True, 'node', 1, 2, 8] and looks(Leaf(4)) == [True, True, True, 'node', -1, -2, 8]",
        "assert matched(Point(1, 2)) == ['point', 1, 2] and matched(Slim(6)) == ['slim', 6] and matched(3) == ['none']",
        "assert matched(Node(5)) == ['last', 5] and matched(Node(5, Node())) == ['node']",
        "assert points(Point(1, 2), Point(1, 2)) == [True, True, 1, True, True, True]",
        "n = Node(1)\nassert write(n) == (False, 2)\nassert n.val == 2 and n.next.val == 7 and not hasattr(n, 'extra')",
        "n = Node(1)\nassert count([n, n, Node(1)]) == (2, 2)",
        "class Other:\n    def __init__(self): self.a = 2\n    def m(self): return 'tests'\nassert other(Other()) == ['tests', 2, True]",
        "s = Slim(1)\nassert slim(s) == (True, 3, 1)\nassert s.left.val == 3",
        "assert again(Node(1)) == (9, 'Node')",
        "class Mine(Node):\n    def touch(self): return 'mine'\nassert sub(Mine(3)) == (True, 3, 'mine')",
    )
    every_assertion_passes(GIVEN + GIVEN_THE_TESTS, GIVEN, lines)


def test_an_object_of_the_solution_is_one_of_the_tests_class(every_assertion_passes: Callable[..., None]) -> None:
    every_assertion_passes(GIVEN + GIVEN_BY_THE_SOLUTION, GIVEN, RIGHT)


def test_it_is_compared_as_the_tests_class_does_and_by_what_it_holds(pool: BlockingSandboxPool) -> None:
    assert not any(pool.run(GIVEN + GIVEN_BY_THE_SOLUTION, tests=AssertTests(WRONG, GIVEN)).tests)
    equal = tuple(line for line in (*RIGHT, *WRONG) if "isinstance" not in line and "!=" not in line)
    outcome = pool.run(LIAR + GIVEN_BY_THE_SOLUTION, tests=AssertTests(equal, GIVEN))
    assert not any(outcome.tests)


MEMBERS = """
import enum
class Color(enum.Enum):
    RED = 1
    BLUE = 2
    def low(self): return self.name.lower()
class Level(enum.IntEnum):
    A = 1
    B = 2
class Mode(enum.Flag):
    X = 1
    Y = 2
class Bad(ValueError):
    def __init__(self, text, code=3):
        super().__init__(text)
        self.code = code
class Base(Exception): pass
class Sub(Base): pass
"""
MEMBERS_USED = """
def first(): return Color.RED
def swap(c): return Color.BLUE if c is Color.RED else Color.RED
def look(c): return {Color.RED: 'r', Color.BLUE: 'b'}[c], isinstance(c, Color), c == Color.RED, c in (Color.RED,)
def matched(c):
    match c:
        case Color.RED: return 'red'
        case Level.A: return 'a'
    return ''
def level(x): return Level(x)
def is_a(x): return x is Level.A, x + 1
def mode(x): return Mode.X | Mode.Y if x else Mode.X
def modes(x): return bool(x & Mode.X), x == Mode.X | Mode.Y
def bad(): raise Bad('no', 7)
def sub(): raise Sub('s')
def caught(g):
    try: g()
    except Bad as error: return ['bad', error.code, str(error), error.args]
    except Sub: return ['sub']
    except Base: return ['base']
def kinds(): return list(Color), {Color.RED: 1}
"""


def test_members_of_an_enumeration_and_exceptions_are_one_too(
    pool: BlockingSandboxPool, every_assertion_passes: Callable[..., None]
) -> None:
    lines = (
        "assert first() == Color.RED and first() is Color.RED and first().value == 1 and first().low() == 'red'",
        "assert swap(Color.RED) is Color.BLUE and look(Color.RED) == ('r', True, True, True)",
        "assert matched(Color.RED) == 'red' and matched(Level.A) == 'a' and kinds() == ([Color.RED, Color.BLUE], {Color.RED: 1})",
        "assert level(1) is Level.A and level(2) == 2 and isinstance(level(1), Level) and is_a(Level.A) == (True, 2)",
        "assert mode(0) is Mode.X and mode(1) == Mode.X | Mode.Y and modes(Mode.X | Mode.Y) == (True, True)",
        "try:\n    bad()\n    assert False\nexcept Bad as e:\n    assert e.code == 7 and str(e) == 'no' and e.args == ('no',)",
        "try:\n    sub()\n    assert False\nexcept Base as e:\n    assert isinstance(e, Sub)",
        "def g(): raise Bad('x', 9)\nassert caught(g) == ['bad', 9, 'x', ('x',)]",
        "def g(): raise Sub\nassert caught(g) == ['sub']",
        "def g(): raise Base\nassert caught(g) == ['base']",
    )
    every_assertion_passes(MEMBERS + MEMBERS_USED, MEMBERS, lines)
    wrong = (
        "assert swap(Color.RED) == Color.RED",
        "assert first() == Color.BLUE",
        "assert first() == 1",
        "assert level(1) is Level.B",
        "try:\n    sub()\n    assert False\nexcept Bad:\n    assert True",
    )
    liar = MEMBERS.replace("RED = 1", "RED = 1\n    __eq__ = lambda self, other: True\n    __hash__ = lambda self: 1")
    for code in (MEMBERS, liar):
        assert not any(pool.run(code + MEMBERS_USED, tests=AssertTests(wrong, MEMBERS)).tests)


KINDS = """
from abc import ABC, abstractmethod
from collections import namedtuple
from typing import Generic, NamedTuple, TypeVar
T = TypeVar('T')
class Shape(ABC):
    registered = []
    def __init_subclass__(cls, **named):
        super().__init_subclass__(**named)
        Shape.registered.append(cls.__name__)
    @abstractmethod
    def area(self): ...
    def name(self): return type(self).__name__
class Square(Shape):
    def __init__(self, a): self.a = a
    def area(self): return self.a ** 2
    def __eq__(self, other): return isinstance(other, Square) and other.a == self.a
class Box(Generic[T]):
    def __init__(self, v: T): self.v = v
    def get(self) -> T: return self.v
class Pair(NamedTuple):
    x: int
    y: int = 0
Two = namedtuple('Two', 'a b')
class List(list):
    def total(self): return sum(self)
class Text(str):
    def up(self): return self.upper()
class Meta(type):
    def __call__(cls, *args): return super().__call__(*args)
class Made(metaclass=Meta):
    def __init__(self, v): self.v = v
"""
KINDS_USED = """
def area(shape): return [isinstance(shape, Shape), isinstance(shape, Square), shape.area(), shape.name(), Shape.registered]
def square(a): return Square(a)
def box(b): return isinstance(b, Box), b.get()
def boxed(v): return Box(v)
def pairs(x): return Pair(x, 1), Two(1, x)
def pair(p): return isinstance(p, Pair), p.x, p + (1,), p._replace(x=9)
def listed(x): return isinstance(x, List), x.total(), x + [1], List([4])
def text(x): return isinstance(x, Text), x.up(), Text('q')
def made(o): return isinstance(o, Made), o.v
"""


def test_classes_of_every_kind_are_one(every_assertion_passes: Callable[..., None]) -> None:
    lines = (
        "assert area(Square(3)) == [True, True, 9, 'Square', ['Square']]",
        "assert square(2) == Square(2) and isinstance(square(2), Shape) and square(2).area() == 4",
        "class Tri(Shape):\n    def area(self): return 0.5\nassert area(Tri()) == [True, False, 0.5, 'Tri', ['Square']]",
        "assert box(Box(3)) == (True, 3) and boxed(4).get() == 4 and isinstance(boxed(4), Box)",
        "assert pairs(3) == (Pair(3, 1), Two(1, 3)) and isinstance(pairs(3)[0], Pair)",
        "assert pair(Pair(1, 2)) == (True, 1, (1, 2, 1), Pair(9, 2))",
        "assert listed(List([1, 2])) == (True, 3, [1, 2, 1], [4]) and listed(List())[3].total() == 4",
        "assert text(Text('ab')) == (True, 'AB', 'q') and made(Made(2)) == (True, 2)",
    )
    every_assertion_passes(KINDS + KINDS_USED, KINDS, lines)


def test_a_method_of_the_tests_hides_no_function_of_its_name(pool: BlockingSandboxPool) -> None:
    code = "def size(x): return x.size\ndef area(x): return x.area() + 1\n"
    lines = (
        "class Tri:\n    def area(self): return 2\nassert area(Tri()) == 3",
        "class Has:\n    @property\n    def width(self): return self.w\n    @width.setter\n    def width(self, w): self.w = w\n    size = 3\nh = Has()\nh.width = 2\nassert (h.width, size(h)) == (2, 3)",
    )
    assert pool.run(code, tests=AssertTests(lines)).tests == (True, True)


LISTS = """
from heapq import *
class ListNode:
    def __init__(self, val=0, next=None): self.val, self.next = val, next
def made(values):
    head = None
    for value in reversed(values): head = ListNode(value, head)
    return head
def held(node): return [node.val, *held(node.next)] if node else []
"""
MERGE = """
class Solution:
    def merge(self, lists):
        ListNode.__lt__ = lambda a, b: a.val < b.val
        heads = [head for head in lists if head]
        heapify(heads)
        start = last = ListNode()
        while heads:
            last.next = last = heappop(heads)
            if last.next: heappush(heads, last.next)
        return start.next
"""


def test_a_solution_may_give_the_prompts_class_an_order(pool: BlockingSandboxPool) -> None:
    check = "def check(candidate):\n    assert held(candidate([made([1, 4]), made([2, 3]), None])) == [1, 2, 3, 4]\n"
    tests = CheckTests(check, "Solution().merge", LISTS)
    assert pool.run(LISTS + MERGE, tests=tests).tests == (True,)
    assert pool.run(LISTS + MERGE.replace("<", ">"), tests=tests).tests == (False,)


def test_a_setup_that_is_no_python_is_said_before_any_job(pool: BlockingSandboxPool) -> None:
    outcome = pool.run("def f(): return 1", tests=AssertTests(("assert f() == 1",), "def ("))
    assert (outcome.status, "the tests cannot be compiled" in outcome.error) == ("rejected", True)
